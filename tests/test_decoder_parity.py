"""The decoder computes what transformers 5.6.2 computes: logits, losses and gradients, on random weights.

transformers sizes its label tensor for eight codebooks whatever the config says, so its audio loss exists only for
K = 8 (and, by broadcasting, K = 1). For other K the loss is derived here from the documentation.
"""

import pytest
import torch
from decoder_cases import SHAPES, SMALL, Pair, chat_sizes, make_batch, make_hf, make_ours, make_pair
from torch import Tensor

from higgs import HiggsAudioV2Config, HiggsAudioV2Model, UserError
from higgs.model import LossSums, decoder_loss

transformers = pytest.importorskip("transformers")

ROWS = [[5, 3, 4], [9, 1, 2, 6, 3], [12]]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(**SHAPES[request.param])


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The logits at tokens that are not padding; reference and project differ in what they compute for padding."""
    return logits[batch["attention_mask"].bool()]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert 0.3 < theirs.std() < 3, "the tolerance below means something only for logits of order 1"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["default", "counted"])
@torch.no_grad()
def test_logits_of_padded_batches(pair: Pair, side: str, positions: str):
    batch = make_batch(pair.config, ROWS, side)
    if positions == "counted":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    ours, theirs = pair.ours(**batch).logits, pair.theirs(**batch).logits
    assert (
        ours.shape
        == theirs.shape
        == (3, batch["input_ids"].shape[1], pair.config.num_codebooks * pair.config.codebook_size)
    )
    assert_close(real(ours, batch), real(theirs, batch))
    assert ours.isfinite().all()


@torch.no_grad()
def test_logits_without_masks_and_of_text_alone(pair: Pair):
    batch = make_batch(pair.config, [[6, 4, 3]])
    del batch["attention_mask"], batch["audio_input_ids_mask"]
    assert_close(pair.ours(**batch).logits, pair.theirs(**batch).logits)
    text = make_batch(pair.config, [[20], [20]])
    assert_close(pair.ours(**text).logits, pair.theirs(**text).logits)
    # Placeholders without frames: audio weights, text embeddings.
    ids = batch["input_ids"]
    assert_close(pair.ours(input_ids=ids).logits, pair.theirs(input_ids=ids).logits)


@torch.no_grad()
def test_logits_of_audio_alone(pair: Pair):
    frames = torch.randint(0, pair.config.codebook_size, (2, 13, pair.config.num_codebooks))
    assert_close(pair.ours(audio_input_ids=frames).logits, pair.theirs(audio_input_ids=frames).logits)


@torch.no_grad()
def test_logits_from_embeddings(pair: Pair):
    """transformers recognises `audio_token` placeholders alone in embeddings; here the delay's are as well."""
    batch = make_batch(pair.config, ROWS)
    marked = batch["input_ids"].clone()
    marked[marked == pair.config.audio_delay_token_id] = pair.config.audio_token_id
    inputs = {**batch, "inputs_embeds": pair.theirs.model.embed_tokens(marked), "input_ids": None}
    for frames in (True, False):
        if not frames:
            del inputs["audio_input_ids"], inputs["audio_input_ids_mask"]
        assert_close(real(pair.ours(**inputs).logits, batch), real(pair.theirs(**inputs).logits, batch))
    embeds = pair.ours.model.embed_tokens(batch["input_ids"])
    unmarked = pair.ours(**{**batch, "input_ids": None}, inputs_embeds=embeds).logits
    torch.testing.assert_close(unmarked, pair.ours(**batch).logits)


@pytest.mark.parametrize("keep", [1, 4, 0, torch.tensor([2, 3, 11]), torch.tensor([7])], ids=str)
@torch.no_grad()
def test_logits_to_keep(keep: int | Tensor):
    pair = make_pair()
    batch = make_batch(pair.config, [[5, 3, 4], [5, 3, 4]])
    theirs = pair.theirs(**batch, logits_to_keep=keep).logits
    ours = pair.ours(**batch, logits_to_keep=keep).logits
    assert ours.shape == theirs.shape
    assert_close(ours, theirs)
    whole = pair.ours(**batch).logits
    chosen = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(ours, chosen, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cut", [1, 7, 16])
@torch.no_grad()
def test_two_cached_chunks_equal_the_whole(pair: Pair, cut: int):
    batch = make_batch(pair.config, [[5, 3, 4], [9, 1, 6]])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    whole = pair.ours(**batch, position_ids=positions).logits
    placeholder = pair.ours.model.audio_placeholders(batch["input_ids"])
    caches = {"ours": None, "theirs": None}
    parts: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for part in (slice(0, cut), slice(cut, None)):
        # Each row's frames of this chunk: those whose placeholders it holds.
        first = placeholder[:, : part.start].sum(1)
        frames = [
            row[f : f + n]
            for row, f, n in zip(batch["audio_input_ids"], first, placeholder[:, part].sum(1), strict=True)
        ]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(f), dtype=torch.bool) for f in frames], True)
        inputs = {
            "input_ids": batch["input_ids"][:, part],
            "attention_mask": batch["attention_mask"][:, : part.stop],
            "position_ids": positions[:, part],
            "audio_input_ids": torch.nn.utils.rnn.pad_sequence(frames, True, pair.config.audio_stream_eos_id),
            "audio_input_ids_mask": mask,
            "use_cache": True,
        }
        if not mask.any():
            del inputs["audio_input_ids"], inputs["audio_input_ids_mask"]
        for name, model in (("ours", pair.ours), ("theirs", pair.theirs)):
            out = model(**inputs, past_key_values=caches[name])
            caches[name] = out.past_key_values
            parts[name].append(out.logits)
    assert caches["ours"].get_seq_length() == caches["theirs"].get_seq_length() == batch["input_ids"].shape[1]
    assert_close(real(torch.cat(parts["ours"], 1), batch), real(torch.cat(parts["theirs"], 1), batch))
    torch.testing.assert_close(real(torch.cat(parts["ours"], 1), batch), real(whole, batch), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_bare_transformer(pair: Pair):
    theirs = transformers.HiggsAudioV2Model(pair.theirs.config).eval()
    theirs.load_state_dict(pair.theirs.model.state_dict(), strict=True)
    ours = HiggsAudioV2Model(pair.config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = make_batch(pair.config, ROWS)
    result = ours(**batch, output_hidden_states=True)
    expected = theirs(**batch, output_hidden_states=True)
    torch.testing.assert_close(
        real(result.last_hidden_state, batch), real(expected.last_hidden_state, batch), atol=1e-5, rtol=0
    )
    assert len(result.hidden_states) == len(expected.hidden_states) == pair.config.num_hidden_layers + 1
    for mine, other in zip(result.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(real(mine, batch), real(other, batch), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- losses


def with_labels(batch: dict[str, Tensor], config: HiggsAudioV2Config) -> dict[str, Tensor]:
    """As transformers' processor labels: all text but `<|audio_out_bos|>` and placeholders, every code but BOS, EOS."""
    ignored = [config.audio_token_id, config.audio_bos_token_id, config.pad_token_id]
    labels = batch["input_ids"].masked_fill(torch.isin(batch["input_ids"], torch.tensor(ignored)), -100)
    frames = batch["audio_input_ids"]
    edges = (frames == config.audio_stream_bos_id) | (frames == config.audio_stream_eos_id)
    return {**batch, "labels": labels, "audio_labels": frames.masked_fill(edges, -100)}


def loss_by_hand(logits: Tensor, text_logits: Tensor | None, batch: dict[str, Tensor], config: HiggsAudioV2Config):
    """Per codebook a mean over the positions whose next token is a labelled frame, summed; plus the text's mean."""
    placeholder = torch.isin(batch["input_ids"], torch.tensor([config.audio_token_id, config.audio_delay_token_id]))
    sums, counts = torch.zeros(config.num_codebooks), torch.zeros(config.num_codebooks)
    text, texts = torch.zeros(()), 0
    scores = logits.unflatten(-1, (config.num_codebooks, config.codebook_size)).log_softmax(-1)
    for row in range(len(logits)):
        frames = iter(batch["audio_labels"][row][batch["audio_input_ids_mask"][row]])
        for column in range(logits.shape[1]):
            label = int(batch["labels"][row, column])
            if column and label != -100 and text_logits is not None:
                text -= text_logits[row, column - 1].log_softmax(-1)[label]
                texts += 1
            if placeholder[row, column]:
                for k, code in enumerate(next(frames).tolist()):
                    if column and code != -100:
                        sums[k] -= scores[row, column - 1, k, code]
                        counts[k] += 1
    loss = (sums / counts).sum()
    return loss if text_logits is None else loss + text / texts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text_head", [False, True])
@torch.no_grad()
def test_loss(shape: str, text_head: bool):
    pair = make_pair(use_text_head=text_head, **SHAPES[shape])
    for side in ("left", "right"):
        batch = with_labels(make_batch(pair.config, ROWS, side), pair.config)
        out = pair.ours(**batch)
        by_hand = loss_by_hand(out.logits, out.text_logits, batch, pair.config)
        torch.testing.assert_close(out.loss, by_hand, rtol=1e-5, atol=0)
        if pair.config.num_codebooks in (8, 1):
            torch.testing.assert_close(out.loss, pair.theirs(**batch).loss, rtol=1e-5, atol=0)
        else:
            with pytest.raises(RuntimeError):  # if this ever passes, transformers has dropped its fixed 8
                pair.theirs(**batch)
        assert out.codebook_loss.shape == (pair.config.num_codebooks,)
        total = out.codebook_loss.sum() + (out.text_loss if text_head else 0)
        torch.testing.assert_close(out.loss, total)


@torch.no_grad()
def test_loss_of_the_processors_compatibility_labels(processor, hf_processor, clip_files):
    """The whole way from a conversation: both processors, both models, one number."""
    from conversations import workflows

    pair = make_pair(use_text_head=True, **chat_sizes(processor))
    conversations = workflows(clip_files)["training"]
    options = {"tokenize": True, "return_dict": True, "sampling_rate": 24000, "output_labels": True}
    ours = processor.apply_chat_template(conversations, labels_mode="transformers", **options)
    theirs = hf_processor.apply_chat_template(conversations, return_tensors="pt", **options)
    result, expected = pair.ours(**ours), pair.theirs(**theirs)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-5, atol=0)
    assert_close(real(result.logits, ours), real(expected.logits, ours))
    # The default labels train something else: one end code per codebook, and no user text.
    default = processor.apply_chat_template(conversations, **options)
    assert not torch.isclose(pair.ours(**default).loss, expected.loss, rtol=1e-3)


@pytest.mark.parametrize("shape", ["plain, 8 codebooks", "biases, gelu, two end tokens"])
def test_gradients(shape: str):
    pair = make_pair(use_text_head=True, **SHAPES[shape])
    batch = with_labels(make_batch(pair.config, ROWS), pair.config)
    pair.ours(**batch).loss.backward()
    pair.theirs(**batch).loss.backward()
    theirs = dict(pair.theirs.named_parameters())
    assert theirs.keys() == dict(pair.ours.named_parameters()).keys()
    for name, parameter in pair.ours.named_parameters():
        expected = theirs[name].grad
        assert parameter.grad.abs().max() > 0, name
        tolerance = 1e-4 * float(expected.abs().max())
        if name == "model.embed_tokens.weight":  # transformers freezes the padding token's row; ours is plain
            assert not expected[pair.config.pad_token_id].any()
            parameter.grad[pair.config.pad_token_id] = 0
        torch.testing.assert_close(parameter.grad, expected, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_does_not_depend_on_how_a_batch_is_split_or_padded():
    model = make_ours(use_text_head=True, num_codebooks=4)
    rows = [[5, 3, 4], [9, 1, 2, 6, 3], [12], [3, 8, 1]]

    def sums(rows: list[int], side: str = "left") -> LossSums:
        """Of some rows of the batch, cut to the width they need."""
        batch = with_labels(make_batch(model.config, all_rows, side), model.config)
        # transformers' labels train a row's first token from the padding before it; the project's own never do.
        batch["labels"][torch.arange(4), batch["attention_mask"].argmax(1)] = -100
        batch = {name: value[rows] for name, value in batch.items()}
        columns = batch["attention_mask"].any(0)
        frames = batch["audio_input_ids_mask"].any(0)
        batch = {
            name: value[:, frames] if name.startswith("audio") else value[:, columns] for name, value in batch.items()
        }
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs = {name: value for name, value in batch.items() if not name.endswith("labels")}
        hidden = model.model(**inputs, position_ids=positions).last_hidden_state
        placeholders = model.model.audio_placeholders(batch["input_ids"])
        return decoder_loss(
            model, hidden, placeholders, batch["labels"], batch["audio_labels"], batch["audio_input_ids_mask"]
        )

    all_rows = rows
    whole = sums([0, 1, 2, 3])
    right = sums([0, 1, 2, 3], "right")
    torch.testing.assert_close(whole.loss(), right.loss(), rtol=1e-5, atol=0)
    for split in ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 1, 0], [2]]):
        parts = [sums(part) for part in split]
        total = LossSums(*(sum(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))
        assert torch.equal(total.codebook_count, whole.codebook_count)
        assert torch.equal(total.text_count, whole.text_count)
        torch.testing.assert_close(total.codebook_loss, whole.codebook_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(total.loss(), whole.loss(), rtol=1e-5, atol=0)
    # A row that holds no audio at all adds nothing and breaks nothing.
    assert sums([2]).codebook_count.tolist() == [0, 0, 0, 0]
    assert sums([2]).codebook_sum.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_codebook_weights_give_the_originals_average():
    model = make_ours(num_codebooks=4)
    batch = with_labels(make_batch(model.config, ROWS), model.config)
    out = model(**batch, codebook_weights=torch.full((4,), 0.25))
    torch.testing.assert_close(out.loss, out.codebook_loss.mean())
    weighted = model(**batch, codebook_weights=torch.tensor([1.0, 0.0, 0.0, 0.5]))
    torch.testing.assert_close(weighted.loss, out.codebook_loss[0] + out.codebook_loss[3] / 2)


def test_causality_by_gradient():
    """No logit depends on a later input, nor on another row."""
    model = make_ours(num_codebooks=4, num_key_value_heads=2)
    batch = make_batch(model.config, [[6, 3, 4], [9, 2, 2]])
    embeds = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    column = 9
    logits[1, column].sum().backward()
    reach = embeds.grad.abs().sum(-1)
    assert not reach[0].any()
    assert not reach[1, column + 1 :].any()
    padding = ~batch["attention_mask"][1].bool()
    assert not reach[1, padding].any()
    assert (reach[1, : column + 1][~padding[: column + 1]] > 0).all()


def test_random_weights_are_those_of_the_config():
    """A model built from a config is usable at once: right scale, padding token and biases zero, norms one."""
    model = HiggsAudioV2Model(HiggsAudioV2Config(**{**SMALL, "attention_bias": True, "vocab_size": 500}))
    assert abs(float(model.embed_tokens.weight[:80].detach().std()) - 0.02) < 2e-3
    assert not model.embed_tokens.weight[80].any()
    assert not model.layers[0].self_attn.q_proj.bias.any()
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": 7}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_codebooks": 0}, "num_codebooks"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "sine"}, "sine"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(change: dict, said: str):
    with pytest.raises(UserError, match=said):
        make_ours(**change)


def test_inputs_that_do_not_fit_say_why():
    model = make_ours()
    batch = make_batch(model.config, [[5, 3, 4]])
    with pytest.raises(UserError, match="12 audio placeholders, but 11 audio frames"):
        model(
            **{**batch, "audio_input_ids_mask": batch["audio_input_ids_mask"].index_fill(1, torch.tensor([3]), False)}
        )
    with pytest.raises(UserError, match="none was given"):
        model()
    with pytest.raises(UserError, match="twice"):
        model(input_ids=batch["input_ids"], inputs_embeds=model.model.embed_tokens(batch["input_ids"]))
    with pytest.raises(UserError, match="beyond the vocabulary"):
        model(input_ids=torch.tensor([[3, 96]]))
    with pytest.raises(UserError, match="need the same rows and frames"):
        model(**batch, audio_labels=batch["audio_input_ids"][:, :4])
    with pytest.raises(UserError, match="4 labelled audio frames for 12 placeholders"):
        model(input_ids=batch["input_ids"], audio_labels=batch["audio_input_ids"][:, :4])


def test_the_defaults_are_the_documented_ones():
    ours, theirs = HiggsAudioV2Config(), transformers.HiggsAudioV2Config()
    for name, value in ours.to_dict().items():
        assert getattr(theirs, name) == value, name
    # num_key_value_heads and head_dim left out mean heads of their own, evenly wide.
    even = {"num_key_value_heads": None, "head_dim": None}
    assert HiggsAudioV2Config(**even).head_dim == transformers.HiggsAudioV2Config(head_dim=None).head_dim
    assert HiggsAudioV2Config(**even).num_key_value_heads == 24


@pytest.mark.parametrize("shape", SHAPES)
def test_configs_are_read_and_written_as_transformers_does(shape: str, tmp_path):
    theirs = make_hf(**SHAPES[shape]).config
    theirs.save_pretrained(tmp_path)
    import json

    ours = HiggsAudioV2Config.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert ours == HiggsAudioV2Config(**{**SMALL, **SHAPES[shape]})
    back = transformers.HiggsAudioV2Config(**ours.to_dict())
    for name in ours.to_dict():
        assert getattr(back, name) == getattr(theirs, name), name


def test_the_oracle_is_the_release_that_the_project_names():
    assert transformers.__version__ == "5.6.2"
