"""The fast path is what the slow reference makes of each row, and nothing in a step waits for the device."""

from dataclasses import replace

import pytest
import torch
from decoder_cases import SHAPES, make_batch, make_ours, tame_eos
from generation_cases import CODES, PROMPTS, SETTINGS, check_against_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from higgs import GenerationConfig
from higgs.generation import choose, decode_one_frame, generate, prefill, skinny
from higgs.generation.generator import row_seeds
from higgs.generation.skinny import MAX_ROWS, SkinnyDecoder
from higgs.generation.state import initial_state
from higgs.model import StaticKVCache


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fast_equals_slow_for_a_few_rows(setting: str, rows: int):
    model = make_ours(seed=2, num_codebooks=4, num_key_value_heads=2, **CODES)
    tame_eos(model, 0.9)
    assert SkinnyDecoder.serves(model, rows)
    counts = check_against_reference(
        model, make_batch(model.config, PROMPTS[:rows], open_audio=True), SETTINGS[setting]
    )
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


def test_a_few_rows_without_onednn(monkeypatch):
    """Where PyTorch has no packed products the plain ones serve."""
    monkeypatch.setattr(skinny, "pack", lambda weight, rows: None)
    model = make_ours(seed=2, num_codebooks=4, attention_bias=True, mlp_bias=True, **CODES)
    check_against_reference(model, make_batch(model.config, PROMPTS, open_audio=True), SETTINGS["sampling"])


def test_half_precision_runs_on_the_general_path():
    model = make_ours(num_codebooks=4, **CODES).to(torch.bfloat16)
    batch = make_batch(model.config, PROMPTS, open_audio=True)
    out = generate(model, **batch, how=GenerationConfig(max_new_tokens=10))
    assert (out.audio_sequences >= 0).all() and (out.audio_sequences <= model.config.audio_stream_eos_id).all()
    assert out.past_key_values.keys.dtype is torch.bfloat16


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
    """At any step, in the tail as well."""
    model = make_ours(seed=4, num_codebooks=4, **CODES)
    tame_eos(model, 0.9)
    batch = make_batch(model.config, [[6]], open_audio=True)
    whole = model.generate(**batch, max_new_tokens=40, return_dict_in_generate=True)
    steps = whole.audio_sequences.shape[1]
    assert 8 < steps < 40, "the tail must be there"
    for cut in range(1, steps):
        rest = model.generate(
            input_ids=whole.sequences[:, : batch["input_ids"].shape[1] + cut],
            audio_input_ids=whole.audio_sequences[:, :cut],
            max_new_tokens=40 - cut,
        )
        assert torch.equal(rest, whole.audio_sequences)


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
