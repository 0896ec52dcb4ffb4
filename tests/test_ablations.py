"""Every ablation trains, generates, is saved and loaded; and each does to the network what its name says.

Shapes: B batch, T tokens, F frames, K codebooks, C hidden size.
"""

import json

import pytest
import torch
import transformers
from decoder_cases import SMALL, make_batch, make_ours, randomize, tame_eos
from generation_cases import CODES, PROMPTS, SETTINGS, check_against_reference
from torch import Tensor

from higgs import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, UserError
from higgs.generation.skinny import SkinnyDecoder
from higgs.model.ablations import AudioAttentionLayer, DenseLayer, FastForwardLayer
from higgs.model.dual_ffn import DualFFNLayer

ABLATIONS = {
    "stack": {"audio_ffn_layers": "none"},
    "dual layers": {"audio_ffn_layers": [1]},
    "fast-forward": {"audio_ffn_layers": "last_half", "audio_fast_forward": True},
    "audio attention": {"audio_attention": True},
    "mean": {"audio_embed_mean": True},
    "projector": {"audio_embed_projector": True},
    "all at once": {
        "audio_ffn_layers": [0],
        "audio_fast_forward": True,
        "audio_attention": True,
        "audio_embed_mean": True,
        "audio_embed_projector": True,
        "num_key_value_heads": 2,
    },
}
each_ablation = pytest.mark.parametrize("name", ABLATIONS)


def labelled(config: HiggsAudioV2Config, rows: list[list[int]] = PROMPTS) -> dict[str, Tensor]:
    batch = make_batch(config, rows, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["audio_labels"] = batch["audio_input_ids"]
    return batch


@each_ablation
def test_it_trains(name: str):
    torch.manual_seed(0)
    model = HiggsAudioV2ForConditionalGeneration(HiggsAudioV2Config(**{**SMALL, **ABLATIONS[name]}), use_text_head=True)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    batch, losses = labelled(model.config), []
    for _ in range(4):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), "a weight that nothing uses"
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


@each_ablation
def test_cached_generation_is_the_slow_one(name: str):
    model = make_ours(use_text_head=True, **CODES, **ABLATIONS[name])
    tame_eos(model, 2)
    speaking = make_batch(model.config, PROMPTS, open_audio=True)
    writing = make_batch(model.config, [[5, 3, 4], [9], [3, 2, 1]])
    for how in SETTINGS.values():
        counts = check_against_reference(model, speaking, how)
        assert min(frames for _, frames in counts) > 8
    check_against_reference(model, writing, SETTINGS["sampling, redrawing"])


@each_ablation
def test_it_is_saved_and_loaded(name: str, tmp_path):
    model = make_ours(use_text_head=True, **ABLATIONS[name])
    model.save_pretrained(tmp_path)
    back = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path, use_text_head=True)
    assert back.config == model.config and not back.config.is_released_architecture
    batch = labelled(model.config)
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_a_plain_models_config_file_knows_nothing_of_ablations(tmp_path):
    config = HiggsAudioV2Config(**SMALL)
    assert config.is_released_architecture
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.keys() <= transformers.HiggsAudioV2Config().to_dict().keys()
    everywhere = HiggsAudioV2Config(**SMALL, audio_ffn_layers=[1, 0])
    assert everywhere == config and everywhere.audio_ffn_layers is None
    for name, changes in ABLATIONS.items():
        extra = HiggsAudioV2Config(**{**SMALL, **changes}).to_dict().keys() - written.keys()
        assert extra == {key for key in changes if key.startswith("audio_")}, name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"audio_ffn_layers": [2]}, "from 0 to 1"),
        ({"audio_ffn_layers": "upper"}, "first_half"),
        ({"audio_ffn_layers": ["0"]}, "from 0 to 1"),
        ({"audio_fast_forward": True}, "but not all"),
        ({"audio_ffn_layers": [], "audio_fast_forward": True}, "list some layers"),
        ({"audio_ffn_layers": [], "audio_attention": True}, "lists none"),
    ],
)
def test_what_means_nothing_is_refused(changes: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        HiggsAudioV2Config(**SMALL, **changes)


def test_the_layers_are_of_the_kind_that_was_asked_for():
    def kinds(**changes) -> list[type]:
        return [type(layer) for layer in make_ours(**{"num_hidden_layers": 4, **changes}).model.layers]

    assert kinds() == [DualFFNLayer] * 4
    assert kinds(audio_ffn_layers="none") == [DenseLayer] * 4
    assert kinds(audio_ffn_layers="first_half") == [DualFFNLayer] * 2 + [DenseLayer] * 2
    assert kinds(audio_ffn_layers=[1, 3], audio_fast_forward=True) == [FastForwardLayer, DualFFNLayer] * 2
    assert kinds(audio_ffn_layers=[3], audio_attention=True) == [DenseLayer] * 3 + [AudioAttentionLayer]
    stack = make_ours(audio_ffn_layers="none")
    names = [name for name, _ in stack.named_parameters() if "layers." in name]
    assert not any("audio" in name for name in names)


def test_fresh_weights_of_the_new_parts():
    torch.manual_seed(0)
    config = HiggsAudioV2Config(**SMALL, audio_attention=True, audio_embed_projector=True)
    model = HiggsAudioV2ForConditionalGeneration(config)
    layer = model.model.layers[0]
    assert (layer.audio_self_attn_layernorm.weight == 1).all()
    for weight in (layer.audio_self_attn.q_proj.weight, model.model.embed_audio_tokens.projector.weight):
        assert weight.detach().std().item() == pytest.approx(config.initializer_range, rel=0.1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_stack_is_a_plain_llama(side: str):
    """Of the same weights, transformers' LlamaModel makes the same of the same embeddings."""
    model = make_ours(audio_ffn_layers=[], num_key_value_heads=2).model
    llama = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=SMALL["vocab_size"],
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            pad_token_id=80,
            rms_norm_eps=1e-5,
            rope_parameters=SMALL["rope_parameters"],
        )
    ).eval()
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("embed_audio_tokens")}
    llama.load_state_dict(weights, strict=True)
    batch = make_batch(model.config, PROMPTS, side=side)
    mask = batch["attention_mask"]
    with torch.no_grad():
        ours = model(**batch).last_hidden_state
        embeds, _ = model.embed(batch["input_ids"], batch["audio_input_ids"], batch["audio_input_ids_mask"])
        positions = torch.arange(mask.shape[1])[None]
        theirs = llama(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    real = mask.bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-5)


def one_row(config: HiggsAudioV2Config) -> tuple[dict[str, Tensor], Tensor]:
    """6 text tokens, a clip, 4 text tokens, a clip, 3 text tokens; and which of them are audio [T]."""
    batch = make_batch(config, [[6, 3, 4, 2, 3]])
    audio = (batch["input_ids"][0] == config.audio_token_id) | (batch["input_ids"][0] == config.audio_delay_token_id)
    return batch, audio


def influence(model: torch.nn.Module, batch: dict[str, Tensor], layer: int) -> Tensor:
    """Which positions [T_in] reach which positions [T_out, T_in] through one layer, by gradient."""
    net = model.model
    seen = {}

    def keep(module: torch.nn.Module, given: tuple, out: Tensor) -> None:
        seen["out"] = out

    def start(module: torch.nn.Module, given: tuple) -> tuple:
        seen["in"] = given[0].detach().requires_grad_()
        return (seen["in"], *given[1:])

    hooks = [net.layers[layer].register_forward_pre_hook(start), net.layers[layer].register_forward_hook(keep)]
    net(**{key: batch[key] for key in ("input_ids", "audio_input_ids")})
    for hook in hooks:
        hook.remove()
    length = batch["input_ids"].shape[1]
    reach = torch.zeros(length, length, dtype=torch.bool)
    direction = torch.randn(seen["out"].shape[-1], generator=torch.Generator().manual_seed(1))
    for place in range(length):
        (grad,) = torch.autograd.grad(seen["out"][0, place] @ direction, seen["in"], retain_graph=True)
        reach[place] = (grad[0] != 0).any(dim=-1)
    return reach


def test_fast_forward_skips_audio():
    model = make_ours(audio_ffn_layers=[1], audio_fast_forward=True)
    batch, audio = one_row(model.config)
    past = torch.ones(len(audio), len(audio), dtype=torch.bool).tril()
    states = model.model(**{k: batch[k] for k in ("input_ids", "audio_input_ids")}, output_hidden_states=True)
    before, after = states.hidden_states[0][0], states.hidden_states[1][0]
    assert torch.equal(before[audio], after[audio]) and not torch.equal(before[~audio], after[~audio])
    text_only = past & ~audio & ~audio[:, None] | torch.eye(len(audio), dtype=torch.bool)
    assert torch.equal(influence(model, batch, 0), text_only)
    assert torch.equal(influence(model, batch, 1), past), "in the other layer everything sees its past"


def test_audio_attention_is_among_audio():
    model = make_ours(audio_attention=True)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()  # leaves audio's own attention
    batch, audio = one_row(model.config)
    past = torch.ones(len(audio), len(audio), dtype=torch.bool).tril()
    among_audio = past & audio & audio[:, None] | torch.eye(len(audio), dtype=torch.bool)
    assert torch.equal(influence(model, batch, 0), among_audio)
    assert torch.equal(influence(model, batch, 1), past)


def test_the_embedding_of_a_frame():
    codes = torch.randint(0, 18, (5, 8))
    plain, mean, projected = (
        make_ours(**c).model.embed_audio_tokens for c in ({}, ABLATIONS["mean"], ABLATIONS["projector"])
    )
    randomize(mean), randomize(projected)
    table = mean.embed_audio_tokens.weight.view(8, 18, -1)
    by_hand = torch.stack([table[k, codes[:, k]] for k in range(8)]).mean(dim=0)
    assert torch.allclose(mean(codes), by_hand, atol=1e-6)
    assert plain.projector is None
    table = projected.embed_audio_tokens.weight.view(8, 18, -1)
    by_hand = torch.stack([table[k, codes[:, k]] for k in range(8)]).sum(dim=0) @ projected.projector.weight.T
    assert torch.allclose(projected(codes), by_hand, atol=1e-5)


@each_ablation
def test_packed_rows_are_the_samples_alone(name: str):
    """Two samples in one row, positions restarted, give the hidden states that each has by itself, padded or not."""
    model = make_ours(**ABLATIONS[name]).model
    rows = [[5, 3, 4], [9, 1, 2, 6, 3]]
    alone = [make_batch(model.config, [row], seed=i) for i, row in enumerate(rows)]
    with torch.no_grad():
        expected = [model(b["input_ids"], b["audio_input_ids"]).last_hidden_state[0] for b in alone]
        lengths = [b["input_ids"].shape[1] for b in alone]
        packed = model(
            torch.cat([b["input_ids"] for b in alone], dim=1),
            torch.cat([b["audio_input_ids"] for b in alone], dim=1),
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        ).last_hidden_state[0]
        for side in ("left", "right"):
            batch = make_batch(model.config, rows, side=side)
            for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
                by_itself = model(
                    ids[mask][None], batch["audio_input_ids"][row][batch["audio_input_ids_mask"][row]][None]
                )
                positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
                padded = model(**batch, position_ids=positions).last_hidden_state[row][mask]
                assert torch.allclose(padded, by_itself.last_hidden_state[0], atol=2e-5)
    for ours, theirs in zip(packed.split(lengths), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_which_models_the_fast_cpu_path_serves():
    served = {name: SkinnyDecoder.serves(make_ours(**changes), 2) for name, changes in ABLATIONS.items()}
    slow = {"fast-forward", "audio attention", "all at once"}
    assert served == {name: name not in slow for name in ABLATIONS}
