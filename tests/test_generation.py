"""Generation: equal to transformers where that is defined, and to the slow reference everywhere else.

Shapes: B batch, T tokens, F frames, K codebooks, V rows per codebook.
"""

from dataclasses import replace

import pytest
import torch
from conversations import SCENE, SYSTEM, user, workflows
from decoder_cases import SHAPES, Pair, chat_sizes, make_batch, make_hf, make_ours, tame_eos
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from higgs import GenerationConfig, HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor, UserError
from higgs.generation import choose, decode_one_frame, generate, prefill, reference_generate
from higgs.generation.generator import row_seeds
from higgs.generation.sampling import draw, force_delay, repeats, uniform, warp
from higgs.generation.skinny import MAX_ROWS, SkinnyDecoder
from higgs.generation.state import initial_state
from higgs.model import StaticKVCache

MULTI = [
    SYSTEM,
    {"role": "scene", "content": [*SCENE["content"], {"type": "text", "text": "SPEAKER0: feminine"}]},
    user("[SPEAKER0] The sun rises!\n[SPEAKER1] In the east."),
]
WORKFLOWS = ("single", "multi", "cloning", "scene_cloning", "batch")
CODES = {"codebook_size": 66, "audio_stream_bos_id": 64, "audio_stream_eos_id": 65}


# ------------------------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def chat(hf_processor, processor, tmp_path_factory):
    """transformers' model and processor, saved by transformers; ours, loaded from that folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = make_hf(seed=3, **chat_sizes(processor))
    tame_eos(theirs, 1.45)
    theirs.save_pretrained(folder)
    hf_processor.save_pretrained(folder)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, device_map="cpu")
    return Pair(theirs, model), HiggsAudioV2Processor.from_pretrained(folder, device_map="cpu"), hf_processor


def conversation(name: str, clip_files: list[str]) -> list:
    return MULTI if name == "multi" else workflows(clip_files)[name]


def both_inputs(chat, name: str, clip_files: list[str]):
    _, mine, theirs = chat
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "sampling_rate": 24000}
    talk = conversation(name, clip_files)
    return mine.apply_chat_template(talk, **options), theirs.apply_chat_template(talk, return_tensors="pt", **options)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_greedy_generation_equals_transformers(chat, clip_files, name: str):
    pair, mine, other = chat
    ours_in, theirs_in = both_inputs(chat, name, clip_files)
    how = {"max_new_tokens": 50, "do_sample": False}
    ours, theirs = pair.ours.generate(**ours_in, **how), pair.theirs.generate(**theirs_in, **how)
    assert torch.equal(ours, theirs)
    start = ours_in["audio_input_ids"].shape[1] if "audio_input_ids" in ours_in else 0
    assert ours[:, start:].unique().numel() > 100, "a model that says one thing proves little"
    # The same frames are the same sound.
    waveforms = mine.batch_decode(ours[:, start:])
    for waveform, expected in zip(waveforms, _decode_one_by_one(other, theirs[:, start:]), strict=True):
        assert waveform.shape == expected.shape
        torch.testing.assert_close(waveform, expected, atol=1e-5, rtol=0)


def _decode_one_by_one(processor, frames: Tensor) -> list[Tensor]:
    """transformers' batch_decode searches its start in the whole batch at once; by row it is exact."""
    return [processor.batch_decode(row[None])[0].reshape(-1) for row in frames]


def test_some_workflows_end_and_others_do_not(chat, clip_files):
    """Guards the test above: both the end of a stream and running out of steps are seen."""
    pair = chat[0]
    lengths = {}
    for name in WORKFLOWS:
        inputs = both_inputs(chat, name, clip_files)[0]
        out = pair.ours.generate(**inputs, max_new_tokens=50, return_dict_in_generate=True)
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        for row, tokens in enumerate((new == pair.config.eos_token_id).long()):
            lengths[name, row] = int(tokens.argmax()) if tokens.any() else None
    assert None in lengths.values() and any(lengths.values())
    assert lengths["batch", 0] != lengths["batch", 1]
    assert lengths["batch", 0] == lengths["cloning", 0] and lengths["batch", 1] == lengths["scene_cloning", 0]


@pytest.mark.parametrize("name", ["single", "batch"])
def test_sequences_scores_and_logits_of_each_step(chat, clip_files, name: str):
    pair, _, _ = chat
    ours_in, theirs_in = both_inputs(chat, name, clip_files)
    how = {"max_new_tokens": 30, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours = pair.ours.generate(**ours_in, **how)
    theirs = pair.theirs.generate(**theirs_in, do_sample=False, **how)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours["audio_sequences"], theirs.audio_sequences)
    assert len(ours.scores) == len(theirs.scores) == len(ours.logits) == len(theirs.logits)
    # What a finished row computes from its padding is nobody's business.
    new = ours.sequences[:, ours_in["input_ids"].shape[1] :]
    running = (new == pair.config.eos_token_id).cumsum(1) - (new == pair.config.eos_token_id).long() == 0
    for step, (mine, other) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        assert mine.shape == other.shape == (len(new), 8, 1026)
        rows = running[:, step]
        assert torch.equal(mine[rows].isinf(), other[rows].isinf())
        torch.testing.assert_close(mine[rows], other[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.logits[step][rows], theirs.logits[step][rows], atol=1e-5, rtol=0)


def test_sampled_scores_equal_transformers_for_the_same_history(chat, clip_files, monkeypatch):
    """transformers draws by torch.multinomial; made to take what we drew, it must see the same processed scores."""
    pair, _, _ = chat
    ours_in, theirs_in = both_inputs(chat, "cloning", clip_files)
    how = {"max_new_tokens": 25, "do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9}
    how |= {"return_dict_in_generate": True, "output_scores": True}
    ours = pair.ours.generate(**ours_in, **how, seed=5)
    drawn = iter(ours.audio_sequences[0, ours_in["audio_input_ids"].shape[1] :])
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: next(drawn)[:, None])
    theirs = pair.theirs.generate(**theirs_in, **how)
    assert torch.equal(ours.audio_sequences, theirs.audio_sequences)
    for mine, other in zip(ours.scores, theirs.scores, strict=True):
        assert torch.equal(mine.isinf(), other.isinf())
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["single", "cloning"])
@pytest.mark.parametrize(("window", "most"), [(7, 2), (3, 1)])
def test_the_same_codes_are_drawn_again(chat, clip_files, monkeypatch, name: str, window: int, most: int):
    """Which codes transformers redraws is read off the distributions that it hands to Tensor.multinomial."""
    pair, _, _ = chat
    _, inputs = both_inputs(chat, name, clip_files)
    redrawn: list[Tensor] = []

    def record(probabilities: Tensor, *args, **kwargs) -> Tensor:
        redrawn.append(probabilities.clone())
        return probabilities.topk(3).indices[:, 2:]  # any rule will do; a repeatable one keeps the test exact

    import transformers

    monkeypatch.setattr(Tensor, "multinomial", record)
    config = transformers.GenerationConfig.from_dict(
        {**pair.theirs.generation_config.to_dict(), "ras_win_len": window, "ras_win_max_num_repeat": most}
    )
    out = pair.theirs.generate(
        **inputs, generation_config=config, max_new_tokens=40, do_sample=False,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    steps = len(out.scores)
    start = out.audio_sequences.shape[1] - steps
    redrawn = [torch.zeros(0, 1026)] * (steps - len(redrawn)) + redrawn  # the first step without a prompt's audio
    bos, eos = pair.config.audio_stream_bos_id, pair.config.audio_stream_eos_id
    total = 0
    for step in range(steps):
        picked = out.scores[step].argmax(-1)
        history = out.audio_sequences[:, max(0, start + step - window) : start + step]
        again = repeats(picked, history, most, bos, eos)[0]
        expected = out.logits[step].view(8, 1026)[again].softmax(-1)
        torch.testing.assert_close(redrawn[step], expected)
        frame = out.audio_sequences[0, start + step]
        assert torch.equal(frame[~again], picked[0][~again])
        total += int(again.sum())
    assert total > 3, "nothing was repeated, so nothing was tested"


def test_a_prompt_of_repeats_counts_and_padding_does_not():
    """The window holds the row's own last frames, also those of its prompt, and skips padding (unlike transformers)."""
    model = make_ours(num_codebooks=2, **CODES)
    batch = make_batch(model.config, [[4, 5, 3], [4, 1, 3]], open_audio=True)
    seeds = torch.zeros(2, dtype=torch.long)
    state = initial_state(
        model.config, batch["input_ids"], batch["attention_mask"], batch["audio_input_ids"],
        batch["audio_input_ids_mask"], seeds, 4,
    )  # fmt: skip
    assert torch.equal(state.window[0], batch["audio_input_ids"][0, -4:])
    assert torch.equal(state.window[1], batch["audio_input_ids"][1, :4])


@given(
    st.integers(1, 4), st.integers(2, 6), st.integers(5, 40),
    st.sampled_from([None, 0.3, 1.0, 1.7]), st.sampled_from([None, 0, 1, 3, 100]),
    st.sampled_from([None, 1.0, 0.95, 0.5, 0.01]), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_warping_equals_transformers(batch, codebooks, size, temperature, top_k, top_p, seed, forced):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = 3 * torch.randn(batch, codebooks, size, generator=torch.Generator().manual_seed(seed))
    if forced:
        scores[:, 0, 1:] = -float("inf")
    expected = scores.flatten(0, 1)
    if temperature not in (None, 1.0):
        expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p not in (None, 1.0):
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(warp(scores, temperature, top_k, top_p).flatten(0, 1), expected)


@given(st.data())
def test_forcing_equals_transformers(data):
    """Over whole sequences of steps, in batches whose rows stand at different places.

    Prompts that go on within open audio are kept shorter than K frames and out of the tail: beyond that, transformers
    starts its counters from the wrong place (it looks at the last K tokens only).
    """
    from transformers.models.higgs_audio_v2.generation_higgs_audio_v2 import HiggsAudioV2DelayPatternLogitsProcessor

    codebooks, rows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    text, opener, audio, delay, bos, eos, size = 5, 6, 7, 8, 10, 11, 12
    oracle = HiggsAudioV2DelayPatternLogitsProcessor(
        list(range(1, codebooks + 1)), opener, delay, bos, eos, codebooks, size
    )
    begun = [data.draw(st.integers(0, codebooks - 1)) for _ in range(rows)]
    ids = torch.tensor([[text] * (codebooks + 2 - n) + [opener] + [audio] * n for n in begun])
    spoken, delayed = torch.tensor(begun), torch.zeros(rows, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([data.draw(st.integers(1, 12)) for _ in range(rows)])
    for step in range(14 + codebooks):
        scores = torch.randn(rows, codebooks, size, generator=generator)
        expected = oracle(ids, scores.flatten(1)).view_as(scores)
        assert torch.equal(force_delay(scores, spoken, delayed, bos, eos), expected)
        token = torch.where(step >= ends, delay, audio)
        ids = torch.cat((ids, token[:, None]), dim=1)
        spoken, delayed = spoken + 1, delayed + (token == delay)


# ------------------------------------------------------------------------------- against the slow reference


def check_against_reference(model, batch: dict[str, Tensor], how: GenerationConfig) -> list[tuple[int, int]]:
    """Every row of a batch is what the slow reference makes of it alone; returns each row's (tokens, frames)."""
    out = generate(model, **batch, how=how)
    prompt, first = batch["input_ids"].shape[1], batch["audio_input_ids"].shape[1] if "audio_input_ids" in batch else 0
    counts = []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        frames = None
        if first:
            frames = batch["audio_input_ids"][row][batch["audio_input_ids_mask"][row]]
        alone = replace(how, seed=None if how.seed is None else how.seed + row)
        tokens, spoken = reference_generate(model, ids[mask.bool()], frames, alone)
        written = out.sequences[row, prompt:].tolist()
        assert written[: len(tokens)] == tokens
        assert all(token == model.config.eos_token_ids[0] for token in written[len(tokens) :])
        generated, valid = out.audio_sequences[row, first:], out.audio_sequences_mask[row, first:]
        assert valid.tolist() == [True] * len(spoken) + [False] * (len(valid) - len(spoken))
        assert generated[valid].tolist() == spoken
        assert (generated[~valid] == model.config.audio_stream_eos_id).all()
        if first:
            assert torch.equal(out.audio_sequences[row, :first], batch["audio_input_ids"][row])
        counts.append((len(tokens), len(spoken)))
    assert out.sequences.shape[1] - prompt == max(count for count, _ in counts), "no step more than the longest row needs"
    return counts


SETTINGS = {
    "greedy": GenerationConfig(max_new_tokens=24),
    "sampling": GenerationConfig(max_new_tokens=24, do_sample=True, temperature=0.8, top_k=20, top_p=0.9, seed=11),
    "greedy, redrawing": GenerationConfig(max_new_tokens=24, ras_win_len=5, ras_win_max_num_repeat=1, seed=4),
    "sampling, redrawing": GenerationConfig(
        max_new_tokens=24, do_sample=True, top_k=4, seed=2**61, ras_win_len=3, ras_win_max_num_repeat=1
    ),
}
PROMPTS = [[5, 3, 4], [9, 1, 2, 6, 3], [12], [3, 2, 1]]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fast_equals_slow_for_a_few_rows(setting: str, rows: int):
    model = make_ours(seed=2, num_codebooks=4, num_key_value_heads=2, **CODES)
    tame_eos(model, 0.9)
    assert SkinnyDecoder.serves(model, rows)
    counts = check_against_reference(model, make_batch(model.config, PROMPTS[:rows], open_audio=True), SETTINGS[setting])
    if rows == 4:
        assert len(set(counts)) > 1, "rows must end at different steps for this to mean something"


@pytest.mark.parametrize("setting", ["greedy", "sampling, redrawing"])
def test_fast_equals_slow_on_the_general_path(setting: str):
    model = make_ours(seed=2, num_codebooks=4, num_key_value_heads=2, **CODES)
    tame_eos(model, 0.9)
    many = make_batch(model.config, [[3 + row % 5, 1 + row % 3, 2] for row in range(MAX_ROWS + 1)], open_audio=True)
    assert not SkinnyDecoder.serves(model, MAX_ROWS + 1)
    check_against_reference(model, many, replace(SETTINGS[setting], max_new_tokens=12))
    double = model.double()
    assert not SkinnyDecoder.serves(double, 3)
    check_against_reference(double, make_batch(model.config, PROMPTS, open_audio=True), SETTINGS[setting])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_fast_equals_slow_for_every_shape(shape: str, rows: int):
    model = make_ours(seed=1, **SHAPES[shape])
    batch = make_batch(model.config, PROMPTS[:rows], open_audio=True)
    check_against_reference(model, batch, replace(SETTINGS["sampling"], max_new_tokens=14))


def test_sixteen_rows_and_a_prompt_without_audio():
    model = make_ours(seed=2, num_codebooks=2, **CODES)
    batch = make_batch(model.config, [[3 + row] for row in range(MAX_ROWS)], open_audio=True)
    assert SkinnyDecoder.serves(model, MAX_ROWS)
    check_against_reference(model, batch, replace(SETTINGS["sampling"], max_new_tokens=10))


def test_half_precision_runs_on_the_general_path():
    model = make_ours(num_codebooks=4, **CODES).to(torch.bfloat16)
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    out = generate(model, **batch, how=GenerationConfig(max_new_tokens=10))
    assert (out.audio_sequences >= 0).all() and (out.audio_sequences <= model.config.audio_stream_eos_id).all()
    assert out.past_key_values.keys.dtype is torch.bfloat16


# ------------------------------------------------------------------------------------------ rows and padding


def test_a_batch_is_its_rows_alone():
    """With seeds seed + i; so a row that ends early changes no other, and neither do padding and its content."""
    model = make_ours(seed=2, num_codebooks=4, **CODES)
    tame_eos(model, 0.9)
    how = {"max_new_tokens": 24, "do_sample": True, "top_p": 0.9, "ras_win_len": 4, "ras_win_max_num_repeat": 1}
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    whole = model.generate(**batch, **how, seed=7, return_dict_in_generate=True)
    first = batch["audio_input_ids"].shape[1]
    lengths = whole.audio_sequences_mask[:, first:].sum(1)
    assert lengths.unique().numel() > 1
    for row in range(len(PROMPTS)):
        alone = make_batch(model.config, PROMPTS, open_audio=True)
        tokens = alone["attention_mask"][row].bool()
        inputs = {"input_ids": alone["input_ids"][row][tokens][None]}
        frames = alone["audio_input_ids"][row][alone["audio_input_ids_mask"][row]]
        if len(frames):
            inputs["audio_input_ids"] = frames[None]
        out = model.generate(**inputs, **how, seed=7 + row)
        assert torch.equal(out[0, len(frames) :], whole.audio_sequences[row, first : first + lengths[row]])
    # What stands in the padding is of no consequence.
    spoilt = {name: value.clone() for name, value in batch.items()}
    spoilt["input_ids"][~batch["attention_mask"].bool()] = 7
    spoilt["audio_input_ids"][~batch["audio_input_ids_mask"]] = 3
    again = model.generate(**spoilt, **how, seed=7)
    assert torch.equal(again[:, first:], whole.audio_sequences[:, first:])


def test_the_seed_decides():
    model = make_ours(num_codebooks=2, **CODES)
    batch = make_batch(model.config, [[6], [6]], open_audio=True)
    how = {"max_new_tokens": 12, "do_sample": True}
    one = model.generate(**batch, **how, seed=1)
    assert torch.equal(one, model.generate(**batch, **how, seed=1))
    assert not torch.equal(one, model.generate(**batch, **how, seed=2))
    torch.manual_seed(0)
    free = model.generate(**batch, **how)
    assert not torch.equal(free, model.generate(**batch, **how))
    torch.manual_seed(0)
    assert torch.equal(free, model.generate(**batch, **how))
    # The same text twice in a batch is not said in the same way twice.
    twice = {name: value[:1].expand(2, -1) for name, value in batch.items()}
    said = model.generate(**twice, **how, seed=3)
    assert not torch.equal(said[0], said[1])


def test_a_prompt_that_ends_within_audio_goes_on_with_it():
    model = make_ours(seed=4, num_codebooks=3, **CODES)
    config = model.config
    batch = make_batch(config, [[6], [9]], open_audio=True)
    whole = model.generate(**batch, max_new_tokens=20, return_dict_in_generate=True)
    for cut in (1, 2, 5, 9):
        tokens = whole.sequences[:, : batch["input_ids"].shape[1] + cut]
        frames = whole.audio_sequences[:, :cut]
        mask = torch.cat((batch["attention_mask"], torch.ones(2, cut, dtype=torch.long)), 1)
        rest = model.generate(
            input_ids=tokens, attention_mask=mask, audio_input_ids=frames, max_new_tokens=20 - cut
        )
        assert torch.equal(rest, whole.audio_sequences[:, : rest.shape[1]])
        assert rest.shape == whole.audio_sequences.shape


def test_a_full_window_changes_nothing():
    """The cache with shapes that never change (for graphs) computes what the growing one does."""
    model = make_ours(seed=2, num_codebooks=4, num_key_value_heads=2, **CODES)
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    hidden = {}
    for full in (False, True):
        cache = StaticKVCache(model.config, 4, 120, full_window=full)
        state = initial_state(model.config, **batch, seeds=torch.arange(4), window=0)
        with torch.no_grad():
            states = [prefill(model, cache, **batch)]
            for step in range(60):
                picked = choose(model.config, model.audio_logits(states[-1]), state, step, GenerationConfig())
                state = replace(picked.state, position=picked.state.position + (step > 0))
                states.append(decode_one_frame(model, cache, state))
        hidden[full] = torch.stack(states)
    torch.testing.assert_close(hidden[True], hidden[False], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- text mode


def scripted_model() -> HiggsAudioV2ForConditionalGeneration:
    """A model that follows a script written into its weights: layers that add nothing, one-hot embeddings, heads that
    map each token or frame to its successor.

    Text: 1 2 <audio> 3 4 <eot>; after 10 an audio of its own. Frames (2 codebooks of 4 codes): 0 1 2, then the end.
    """
    from higgs import HiggsAudioV2Config

    vocab, codes = 24, 6
    config = HiggsAudioV2Config(
        vocab_size=vocab, hidden_size=48, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=20, bos_token_id=0, eos_token_id=21,
        audio_bos_token_id=17, audio_token_id=18, audio_delay_token_id=19, num_codebooks=2, codebook_size=codes,
        audio_stream_bos_id=4, audio_stream_eos_id=5,
    )  # fmt: skip
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
    bos, eos, opener, end = 4, 5, 17, 21
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if type(module).__name__ == "RMSNorm":
                module.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, :vocab] = torch.eye(vocab)
        model.model.embed_audio_tokens.embed_audio_tokens.weight[:, vocab : vocab + 2 * codes] = torch.eye(2 * codes)
        for token, following in {1: 2, 2: opener, 3: 4, 4: end, 10: opener}.items():
            model.text_lm_head.weight[following, token] = 1.0
        # After a frame of ends the text goes on with 3. The placeholders are likelier still, and must not be written.
        for k in range(2):
            model.text_lm_head.weight[3, vocab + k * codes + eos] = 1.0
            model.text_lm_head.weight[[18, 19], vocab + k * codes + eos] = 2.0
            for code, following in {bos: 0, 0: 1, 1: 2, 2: eos, eos: eos}.items():
                model.audio_lm_head.weight[k * codes + following, vocab + k * codes + code] = 1.0
    return model


SCRIPT_FRAMES = [[4, 4], [0, 4], [1, 0], [2, 1], [5, 2], [5, 5]]


def test_the_model_writes_text_opens_audio_and_goes_back_to_text():
    """A batch whose rows are in three modes: text to audio to text, audio at once, text that ends without audio."""
    model = scripted_model()
    rows = [[7, 1], [7, 8, 9, 17], [4], [10], [1, 2, 17]]
    width = max(map(len, rows))
    ids = torch.tensor([[20] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, return_dict_in_generate=True)
    audio = [18, 18, 18, 18, 19, 19]
    script = [
        [2, 17, *audio, 3, 4, 21],
        [*audio[:5], 21],
        [21],
        [17, *audio, 3, 4, 21],
        [*audio[:5], 21],
    ]
    longest = max(map(len, script))
    assert out.sequences[:, width:].tolist() == [row + [21] * (longest - len(row)) for row in script]
    frames = [SCRIPT_FRAMES, SCRIPT_FRAMES, [], SCRIPT_FRAMES, SCRIPT_FRAMES]
    assert out.audio_sequences.tolist() == [row + [[5, 5]] * (6 - len(row)) for row in frames]
    assert out.audio_sequences_mask.sum(1).tolist() == [6, 6, 0, 6, 6]
    check_against_reference(
        model, {"input_ids": ids, "attention_mask": mask}, GenerationConfig(max_new_tokens=20)
    )


def test_text_is_cut_where_the_steps_end():
    model = scripted_model()
    ids = torch.tensor([[1]])
    for steps, tokens, frames in ((1, [2], 0), (2, [2, 17], 0), (3, [2, 17, 18], 1), (8, [2, 17, 18, 18, 18, 18, 19, 19], 6)):
        out = model.generate(input_ids=ids, max_new_tokens=steps, return_dict_in_generate=True)
        assert out.sequences[0, 1:].tolist() == tokens
        assert out.audio_sequences.shape[1] == frames


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_random_text_mode_equals_the_slow_reference(setting: str, kind: torch.dtype):
    """Random weights, a head that likes to open audio: several clips and texts by turns within one row."""
    model = make_ours(seed=6, use_text_head=True, num_codebooks=3, **CODES).to(kind)
    with torch.no_grad():
        model.text_lm_head.weight[model.config.audio_bos_token_id] *= 2.5
        model.text_lm_head.weight[model.config.audio_token_id] *= 4  # never written all the same
    tame_eos(model, 1.2)
    texts = make_batch(model.config, [*PROMPTS, [7, 2, 5]], open_audio=True)
    # Three rows end in text, two have opened audio; text rows lose their last token.
    ids, mask = texts["input_ids"].clone(), texts["attention_mask"].clone()
    for row in (0, 2, 4):
        ids[row] = torch.cat((ids.new_full((1,), model.config.pad_token_id), ids[row, :-1]))
        mask[row] = torch.cat((mask.new_zeros(1), mask[row, :-1]))
    batch = {**texts, "input_ids": ids, "attention_mask": mask}
    how = replace(SETTINGS[setting], max_new_tokens=40)
    counts = check_against_reference(model, batch, how)
    assert any(frames for _, frames in (counts[0], counts[2], counts[4])), "no text row ever opened audio"
    assert any(frames < tokens - 1 for tokens, frames in (counts[0], counts[2], counts[4])), "no text was written"
    for row in range(5):
        check_row = {name: value[row : row + 1] for name, value in batch.items()}
        check_against_reference(model, check_row, replace(how, seed=None if how.seed is None else how.seed + row))


def test_text_needs_a_text_head():
    model = make_ours()
    with pytest.raises(UserError, match="use_text_head=True"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)


# --------------------------------------------------------------------------------------- what callers plug in


class Recorder:
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.frames: list[tuple[Tensor, Tensor]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens)

    def put_frames(self, frames: Tensor, is_frame: Tensor) -> None:
        self.frames.append((frames, is_frame))

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_sees_everything_as_it_comes():
    model = make_ours(seed=2, num_codebooks=4, **CODES)
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    streamer = Recorder()
    out = model.generate(**batch, max_new_tokens=15, streamer=streamer, return_dict_in_generate=True)
    assert streamer.ended == 1
    assert torch.equal(streamer.tokens[0], batch["input_ids"])
    assert torch.equal(torch.stack(streamer.tokens[1:], 1), out.sequences[:, batch["input_ids"].shape[1] :])
    first = batch["audio_input_ids"].shape[1]
    assert torch.equal(torch.stack([frames for frames, _ in streamer.frames], 1), out.audio_sequences[:, first:])
    assert torch.equal(torch.stack([mask for _, mask in streamer.frames], 1), out.audio_sequences_mask[:, first:])


def test_a_plain_streamer_of_transformers_works():
    class Plain:
        put = Recorder.put
        end = Recorder.end
        __init__ = Recorder.__init__

    model, streamer = make_ours(num_codebooks=2, **CODES), Plain()
    model.generate(**make_batch(model.config, [[5]], open_audio=True), max_new_tokens=4, streamer=streamer)
    assert len(streamer.tokens) == 5 and streamer.ended == 1


def test_logits_processors_act_between_forcing_and_sampling():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper

    model = make_ours(num_codebooks=4, **CODES)
    batch = make_batch(model.config, [[5], [7]], open_audio=True)
    seen = []

    def only_even(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((input_ids.shape, scores.shape, scores.isinf().sum().item()))
        odd = torch.arange(scores.shape[-1]) % 2 == 1
        keep_some = (scores.isinf() | odd).all(-1, keepdim=True)  # forced to an odd code: leave it
        return scores.masked_fill(odd & ~keep_some, -float("inf"))

    out = model.generate(**batch, max_new_tokens=10, logits_processor=[only_even])
    assert ((out % 2 == 0) | (out >= 64)).all()
    assert [ids[1] for ids, _, _ in seen] == [batch["input_ids"].shape[1] + step for step in range(10)]
    assert all(shape == (8, 66) for _, shape, _ in seen)
    assert seen[0][2] == 8 * 65, "in the first frame every codebook is forced to begin"
    plain = model.generate(**batch, max_new_tokens=10, do_sample=True, temperature=0.5, seed=1)
    warped = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    assert torch.equal(plain, model.generate(**batch, max_new_tokens=10, do_sample=True, logits_processor=warped, seed=1))


def test_stopping_criteria_stop_all_or_some_rows():
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    model = make_ours(num_codebooks=4, **CODES)
    tame_eos(model, 0.1)
    batch = make_batch(model.config, [[5], [7]], open_audio=True)
    prompt = batch["input_ids"].shape[1]
    free = model.generate(**batch, max_new_tokens=12)
    assert free.shape[1] == 12
    stop = StoppingCriteriaList([MaxLengthCriteria(prompt + 5)])
    assert torch.equal(model.generate(**batch, max_new_tokens=12, stopping_criteria=stop), free[:, :5])

    def first_row_after_three(input_ids: Tensor, scores: object) -> Tensor:
        assert scores is not None
        return torch.tensor([input_ids.shape[1] >= prompt + 3, False])

    how = {"max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    out = model.generate(**batch, **how, stopping_criteria=[first_row_after_three])
    assert torch.equal(out.audio_sequences[0, :3], free[0, :3])
    assert (out.audio_sequences[0, 3:] == model.config.audio_stream_eos_id).all()
    assert torch.equal(out.audio_sequences[1], free[1])
    assert out.audio_sequences_mask.sum(1).tolist() == [3, 12]
    assert model.generate(**batch, max_new_tokens=12, stopping_criteria=[lambda ids, scores: True]).shape[1] == 1


def test_the_checkpoints_generation_config_is_used(tmp_path):
    model = make_ours(num_codebooks=2, **CODES)
    model.generation_config = GenerationConfig(
        max_new_tokens=9, do_sample=True, temperature=0.7, top_k=5, top_p=0.8, ras_win_len=4, ras_win_max_num_repeat=2
    )
    model.save_pretrained(tmp_path)
    loaded = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config == replace(model.generation_config, eos_token_id=82)
    batch = make_batch(model.config, [[5], [7]], open_audio=True)
    settings = {name: value for name, value in vars(model.generation_config).items() if value is not None}
    expected = make_ours(num_codebooks=2, **CODES).generate(**batch, **settings, seed=3)
    tame_eos(model, 0.1)
    assert torch.equal(loaded.generate(**batch, seed=3), expected)
    # Arguments go before it, a config that is passed takes its place.
    assert loaded.generate(**batch, seed=3, max_new_tokens=4).shape[1] == 4
    greedy = loaded.generate(**batch, generation_config=GenerationConfig(max_new_tokens=6))
    assert torch.equal(greedy, make_ours(num_codebooks=2, **CODES).generate(**batch, max_new_tokens=6))
    # transformers reads the file too.
    import transformers

    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.temperature, theirs.top_k, theirs.ras_win_len, theirs.eos_token_id) == (0.7, 5, 4, 82)


def test_without_max_new_tokens_the_positions_are_the_limit():
    model = make_ours(num_codebooks=2, max_position_embeddings=40, **CODES)
    tame_eos(model, 0.0)
    batch = make_batch(model.config, [[9], [5]], open_audio=True)
    assert model.generate(**batch).shape[1] == 30
    assert model.generate(**batch, max_length=15).shape[1] == 5
    with pytest.raises(UserError, match="max_new_tokens=31 does not fit.*at most 30"):
        model.generate(**batch, max_new_tokens=31)
    with pytest.raises(UserError, match="41 tokens long.*40 positions"):
        model.generate(**make_batch(model.config, [[40]], open_audio=True))


REFUSED = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "assistant_model": object(),
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.6,
    "prefix_allowed_tokens_fn": print,
    "negative_prompt_ids": torch.tensor([[1]]),
    "negative_prompt_attention_mask": torch.tensor([[1]]),
    "custom_generate": "some/repository",
    "synced_gpus": True,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 2,
    "guidance_scale": 3.0,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_audio_codes_rule_out_is_refused(option: str):
    model = make_ours()
    batch = make_batch(model.config, [[5]], open_audio=True)
    with pytest.raises(UserError, match=f"{option}="):
        model.generate(**batch, max_new_tokens=2, **{option: REFUSED[option]})


def test_the_off_values_of_refused_options_are_accepted():
    model = make_ours()
    batch = make_batch(model.config, [[5]], open_audio=True)
    off = {"num_beams": 1, "assistant_model": None, "synced_gpus": False, "repetition_penalty": 1.0, "use_cache": True}
    assert torch.equal(
        model.generate(**batch, max_new_tokens=3, **off), model.generate(**batch, max_new_tokens=3)
    )


def test_an_unknown_argument_is_a_type_error():
    model = make_ours()
    with pytest.raises(TypeError, match="max_new_token"):
        model.generate(**make_batch(model.config, [[5]], open_audio=True), max_new_token=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": 0.0}, "do_sample=False"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"ras_win_len": 3}, "both or neither"),
        ({"ras_win_len": 0, "ras_win_max_num_repeat": 2}, "at least 1"),
        ({"seed": -1}, "seed"),
        ({"attention_mask": torch.ones(1, 3)}, "same shape"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "padded on the left"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"audio_input_ids": torch.zeros(1, 2, 3, dtype=torch.long)}, "3 codebooks"),
        ({"audio_input_ids": torch.zeros(1, 2, 8, dtype=torch.long)}, "0 audio placeholders, but 2"),
        (
            {"audio_input_ids": torch.zeros(1, 2, 8, dtype=torch.long), "audio_input_ids_mask": torch.ones(1, 3)},
            "audio_input_ids_mask must be",
        ),
    ],
)
def test_mistakes_are_named(options: dict, said: str):
    model = make_ours()
    batch = make_batch(model.config, [[5]], open_audio=True)
    with pytest.raises(UserError, match=said):
        model.generate(**{**batch, "max_new_tokens": 4, **options})
    with pytest.raises(UserError, match="input_ids"):
        model.generate()


# -------------------------------------------------------------------------------------------------- numbers


def test_uniform_numbers_are_uniform_and_independent():
    """Mean, spread, the largest gap to the straight line, and correlations along every way that draws differ."""
    seeds = row_seeds(0, 64, torch.device("cpu"))
    count = 64 * 8 * 1026
    streams = {
        (step, stream): uniform((64, 8, 1026), seeds, step, stream) for step, stream in ((0, 0), (1, 0), (0, 1), (2, 2))
    }
    for numbers in streams.values():
        assert numbers.min() > 0 and numbers.max() < 1
        assert abs(numbers.double().mean() - 0.5) < 4 / (12 * count) ** 0.5
        assert abs(numbers.double().var() - 1 / 12) < 4 / (180 * count) ** 0.5
        ordered = numbers.double().flatten().sort().values
        gap = (ordered - (torch.arange(count, dtype=torch.float64) + 0.5) / count).abs().max()
        assert gap < 1.95 / count**0.5  # Kolmogorov-Smirnov at 0.1 %
    base = streams[0, 0].double() - 0.5

    def related(other: Tensor, against: Tensor = base) -> float:
        return float((against * (other.double() - 0.5)).mean() * 12) * against.numel() ** 0.5

    for key in ((1, 0), (0, 1), (2, 2)):
        assert abs(related(streams[key])) < 4
    neighbours = streams[0, 0]
    assert abs(related(neighbours[1:], base[:-1])) < 4  # rows, whose seeds differ by one
    assert abs(related(neighbours[:, 1:], base[:, :-1])) < 4  # codebooks
    assert abs(related(neighbours[..., 1:], base[..., :-1])) < 4  # codes
    assert abs(related(streams[1, 0][:-1], base[1:])) < 4  # row i at step 1 beside row i+1 at step 0
    # Row i of one run and row 0 of a run whose seed is i greater are the same; far seeds are not.
    assert torch.equal(uniform((1, 4), torch.tensor([17]), 3, 0), uniform((3, 4), torch.tensor([16, 17, 18]), 3, 0)[1:2])
    assert not torch.equal(uniform((1, 4), torch.tensor([1]), 0, 0), uniform((1, 4), torch.tensor([1 + 2**32]), 0, 0))
    # A step may be a number or a tensor.
    assert torch.equal(uniform((3, 5), seeds[:3], 9, 1), uniform((3, 5), seeds[:3], torch.tensor(9), 1))


def test_draws_follow_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -float("inf"), 3.0, 1.5])
    rows, steps = 400, 50
    seeds = row_seeds(123, rows, torch.device("cpu"))
    counts = torch.zeros(8)
    for step in range(steps):
        counts += torch.bincount(draw(scores.expand(rows, 2, 8), seeds, step, 0).flatten(), minlength=8)
    expected = scores.softmax(-1) * rows * 2 * steps
    assert counts[5] == 0
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 22.5, f"{chi_square:.1f} with 6 degrees of freedom is beyond 0.1 %"


# ------------------------------------------------------------------------------------------- inside the step


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for a device: reading values, shapes that depend on values, and constants
    copied over from the host. On a CPU nothing waits, so the operators themselves are watched."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} inside a decoding step"
        if name in ("index", "index_put_", "index_put"):
            assert not any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_waits_inside_a_step(setting: str, mixed: bool, monkeypatch):
    model = make_ours(num_codebooks=4, use_text_head=True, eos_token_id=[82, 79], **CODES).double()
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    how = SETTINGS[setting]
    cache = StaticKVCache(model.config, 4, 100, dtype=torch.float64)
    seeds = row_seeds(how.seed, 4, torch.device("cpu"))
    state = initial_state(model.config, **batch, seeds=seeds, window=how.ras_win_len or 0)

    def waits(*args, **kwargs):
        raise AssertionError("the host waits inside a decoding step")

    with torch.no_grad():
        hidden = prefill(model, cache, **batch)
        with monkeypatch.context() as patch, NoWaiting():
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(Tensor, name, waits)
            for step in range(6):
                text = model.text_lm_head(hidden) if mixed else None
                state = choose(model.config, model.audio_logits(hidden), state, step, how, text).state
                hidden = decode_one_frame(model, cache, state, mixed)
                state = replace(state, position=state.position + 1)
    assert hidden.isfinite().all()
