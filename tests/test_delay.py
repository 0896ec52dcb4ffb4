"""Delay pattern: inverse, equal to transformers, golden file, and reading back what a decoder wrote."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from higgs.delay import build_delay_pattern, delayed_length, generated_codes, revert_delay_pattern, wrap_and_delay

BOS, EOS = 1024, 1025
GOLDEN = json.loads((Path(__file__).parent / "golden" / "delay.json").read_text())
shapes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 20), st.integers(0, 10**6))


def random_codes(batch: int, num_codebooks: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1024, (batch, num_codebooks, length), generator=generator)


@given(shapes)
def test_reverting_undoes_building(shape):
    codes = random_codes(*shape)
    delayed = build_delay_pattern(codes, BOS, EOS)
    assert delayed.shape == (*codes.shape[:2], codes.shape[2] + codes.shape[1] - 1)
    assert torch.equal(revert_delay_pattern(delayed.transpose(1, 2)), codes.transpose(1, 2))
    for row, original in zip(delayed, codes, strict=True):
        assert torch.equal(revert_delay_pattern(row.T), original.T)


@given(shapes)
def test_codebook_k_runs_k_frames_behind(shape):
    codes = random_codes(*shape)
    delayed = build_delay_pattern(codes, BOS, EOS)
    length = codes.shape[2]
    for k in range(codes.shape[1]):
        assert (delayed[:, k, :k] == BOS).all()
        assert torch.equal(delayed[:, k, k : k + length], codes[:, k])
        assert (delayed[:, k, k + length :] == EOS).all()


@given(shapes)
def test_wrapped_clip_reads_back(shape):
    codes = random_codes(1, *shape[1:])[0]
    frames = wrap_and_delay(codes, BOS, EOS)
    assert len(frames) == delayed_length(codes.shape[1], codes.shape[0])
    assert (frames[0] == BOS).all() and (frames[-1] == EOS).all()
    assert torch.equal(generated_codes(frames, BOS, EOS), codes)
    padded = torch.cat([frames, torch.full((5, codes.shape[0]), EOS)])
    assert torch.equal(generated_codes(padded, BOS, EOS), codes)


@given(shapes)
def test_equal_to_transformers(shape):
    transformers = pytest.importorskip("transformers")
    kind = transformers.HiggsAudioV2Processor
    theirs = SimpleNamespace(audio_stream_bos_id=BOS, audio_stream_eos_id=EOS)
    codes = random_codes(*shape)
    delayed = kind.build_delay_pattern(theirs, codes)
    assert torch.equal(build_delay_pattern(codes, BOS, EOS), delayed)
    assert torch.equal(revert_delay_pattern(delayed[0].T), kind.revert_delay_pattern(theirs, delayed[0].T))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"K{len(case['codes'][0])}")
def test_golden(case):
    codes = torch.tensor(case["codes"])
    assert build_delay_pattern(codes, GOLDEN["bos"], GOLDEN["eos"]).tolist() == case["delayed"]


def test_only_the_last_clip_is_read():
    first, second = random_codes(2, 4, 6, seed=0)
    frames = torch.cat([wrap_and_delay(first, BOS, EOS), wrap_and_delay(second, BOS, EOS)])
    assert torch.equal(generated_codes(frames, BOS, EOS), second)


@pytest.mark.parametrize("kept", range(9))
def test_a_clip_cut_short_keeps_its_complete_frames(kept):
    codes = random_codes(1, 3, 5, seed=1)[0]
    frames = wrap_and_delay(codes, BOS, EOS)[: 1 + kept]
    complete = min(max(kept - 2, 0), 5)  # a frame is complete once the last of three codebooks has spoken
    assert torch.equal(generated_codes(frames, BOS, EOS), codes[:, :complete])


def test_frames_in_which_a_codebook_has_ended_are_dropped():
    codes = random_codes(1, 3, 6, seed=2)[0]
    codes[1, 4] = EOS  # codebook 1 ends one frame before the others
    assert torch.equal(generated_codes(wrap_and_delay(codes, BOS, EOS), BOS, EOS), codes[:, :4])


def test_nothing_but_padding_holds_no_codes():
    assert generated_codes(torch.full((7, 4), EOS), BOS, EOS).shape == (4, 0)
    assert generated_codes(torch.full((1, 4), BOS), BOS, EOS).shape == (4, 0)
    assert generated_codes(torch.zeros(0, 4, dtype=torch.long), BOS, EOS).shape == (4, 0)
