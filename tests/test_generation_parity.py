"""Generation is what transformers 5.6.2 generates: codes, tokens, scores, forcing, redrawing."""

import pytest
import torch
from conversations import SCENE, SYSTEM, user, workflows
from decoder_cases import Pair, chat_sizes, make_batch, make_hf, make_ours, make_pair, tame_eos
from generation_cases import CODES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from higgs import HiggsAudioV2ForConditionalGeneration, HiggsAudioV2Processor
from higgs.generation.sampling import force_delay, repeats, warp
from higgs.generation.state import initial_state

MULTI = [
    SYSTEM,
    {"role": "scene", "content": [*SCENE["content"], {"type": "text", "text": "SPEAKER0: feminine"}]},
    user("[SPEAKER0] The sun rises!\n[SPEAKER1] In the east."),
]
WORKFLOWS = ("single", "multi", "cloning", "scene_cloning", "batch")


@pytest.fixture(scope="module")
def chat(hf_processor, processor, tmp_path_factory):
    """transformers' model and processor, saved by transformers; ours, loaded from that folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = make_hf(seed=5, **chat_sizes(processor))
    tame_eos(theirs, 1.15)
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
    pair = chat[0]
    ours_in, theirs_in = both_inputs(chat, name, clip_files)
    how = {"max_new_tokens": 50, "do_sample": False}
    ours, theirs = pair.ours.generate(**ours_in, **how), pair.theirs.generate(**theirs_in, **how)
    assert torch.equal(ours, theirs)
    start = ours_in["audio_input_ids"].shape[1] if "audio_input_ids" in ours_in else 0
    assert ours[:, start:].unique().numel() > 90, "a model that says one thing proves little"


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


@pytest.mark.parametrize("prompt", [[6], [5, 4, 3]], ids=["text", "text and audio"])
@pytest.mark.parametrize(("window", "most"), [(7, 2), (3, 1)])
def test_the_same_codes_are_drawn_again(monkeypatch, prompt: list[int], window: int, most: int):
    """Which codes transformers redraws is read off the distributions that it hands to Tensor.multinomial."""
    pair = make_pair(seed=3, num_codebooks=4)
    tame_eos(pair.theirs, 0.3)
    config = pair.config
    redrawn: list[Tensor] = []

    def record(probabilities: Tensor, *args, **kwargs) -> Tensor:
        redrawn.append(probabilities.clone())
        return probabilities.topk(3).indices[:, 2:]  # any rule will do; a repeatable one keeps the test exact

    monkeypatch.setattr(Tensor, "multinomial", record)
    monkeypatch.setattr(pair.theirs.generation_config, "ras_win_len", window, raising=False)
    monkeypatch.setattr(pair.theirs.generation_config, "ras_win_max_num_repeat", most, raising=False)
    out = pair.theirs.generate(
        **make_batch(config, [prompt], open_audio=True), max_new_tokens=40, do_sample=False,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    steps = len(out.scores)
    start = out.audio_sequences.shape[1] - steps
    if start == 0:  # without a prompt's audio transformers does not look at the first step
        redrawn.insert(0, torch.zeros(0, config.codebook_size))
    assert len(redrawn) == steps
    total = 0
    for step in range(steps):
        picked = out.scores[step].argmax(-1)
        history = out.audio_sequences[:, max(0, start + step - window) : start + step]
        again = repeats(picked, history, most, config.audio_stream_bos_id, config.audio_stream_eos_id)[0]
        expected = out.logits[step].view(4, config.codebook_size)[again].softmax(-1)
        torch.testing.assert_close(redrawn[step], expected)
        frame = out.audio_sequences[0, start + step]
        assert torch.equal(frame[~again], picked[0][~again])
        total += int(again.sum())
    assert 3 < total < 4 * steps, "all or nothing was repeated, so nothing was tested"


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
