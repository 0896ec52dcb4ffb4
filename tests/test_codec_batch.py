"""A clip's codes and waveform depend neither on its neighbours nor on its padding, and lengths follow the formulas."""

from functools import cache

import pytest
import torch
from codec_cases import SHAPES, make_codec
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from higgs.audio import load_audio, resample, resampled_length
from higgs.codec import Codec
from higgs.codec.ragged import Ragged, conv_length
from higgs.errors import UserError

codec_of = cache(make_codec)


def batch_of(clips: list[torch.Tensor], filling: float = 0.0, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [L_b] as one batch [B, 1, L + extra], padded with `filling`, and their lengths."""
    lengths = torch.tensor([len(clip) for clip in clips])
    batch = torch.full((len(clips), 1, int(lengths.max()) + extra), filling)
    for row, clip in zip(batch, clips, strict=True):
        row[0, : len(clip)] = clip
    return batch, lengths


def check_batch_equals_single(codec: Codec, clips: list[torch.Tensor], filling: float, extra: int) -> None:
    batch, lengths = batch_of(clips, filling, extra)
    encoded = codec.encode(batch, lengths=lengths)
    assert encoded.audio_codes.shape[-1] == int(encoded.lengths.max())
    junk = encoded.audio_codes.clone()
    for row, frames in enumerate(encoded.lengths.tolist()):
        assert not encoded.audio_codes[row, :, frames:].any()
        junk[row, :, frames:] = 10**6  # codes past a row's end may be anything
    decoded = codec.decode(junk, lengths=encoded.lengths)
    for row, clip in enumerate(clips):
        codes = codec.encode(clip[None, None]).audio_codes
        frames = int(encoded.lengths[row])
        assert frames == codes.shape[-1] == codec.code_length(len(clip))
        assert torch.equal(encoded.audio_codes[row, :, :frames], codes[0])
        alone = codec.decode(codes).audio_values[0, 0]
        samples = int(decoded.lengths[row])
        assert samples == len(alone) == frames * codec.config.hop_length
        torch.testing.assert_close(decoded.audio_values[row, 0, :samples], alone, atol=1e-5, rtol=0)
        assert not decoded.audio_values[row, 0, samples:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradient", [False, True])  # without, a CPU codes small groups; with, the batch as a whole
def test_real_speech_is_coded_alike_alone_and_in_a_batch(shape: str, gradient: bool, shared_data):
    codec = codec_of(shape)
    files = sorted((shared_data / "ljspeech").glob("*.flac"))[:3]
    clips = [
        load_audio(file, codec.sample_rate)[:length] for file, length in zip(files, (40001, 12345, 480), strict=True)
    ]
    with torch.set_grad_enabled(gradient):
        check_batch_equals_single(codec, clips, filling=0.7, extra=777)


def test_clips_that_need_and_do_not_need_acoustic_padding_share_a_batch():
    codec = codec_of("release-like")
    sides = {n: codec._acoustic_padding((n,))[0][0] for n in range(8000, 10000, 40)}
    assert set(sides.values()) == {0, 480}
    padded = next(n for n, side in sides.items() if side)
    plain = next(n for n, side in sides.items() if not side)
    generator = torch.Generator().manual_seed(0)
    clips = [0.3 * torch.randn(n, generator=generator) for n in (padded, plain, plain + 5000)]
    check_batch_equals_single(codec, clips, filling=float("nan"), extra=0)


@torch.no_grad()
def test_forward_cuts_to_the_input_and_silences_the_padding():
    codec = codec_of("release-like")
    batch, lengths = batch_of([torch.randn(5000), torch.randn(3000)])
    output = codec(batch, lengths=lengths)
    assert output.audio_values.shape == batch.shape
    assert not output.audio_values[1, 0, 3000:].any()
    again = codec(batch, audio_codes=output.audio_codes, lengths=lengths)
    assert torch.equal(again.audio_values, output.audio_values)
    codes, values = codec(batch, lengths=lengths, return_dict=False)
    assert torch.equal(codes, output.audio_codes) and torch.equal(values, output.audio_values)


@torch.no_grad()
def test_equal_lengths_take_the_plain_path():
    codec = codec_of("release-like")
    batch = torch.randn(2, 1, 6000)
    plain = codec.encode(batch[..., :5000])
    trimmed = codec.encode(batch, lengths=torch.tensor([5000, 5000]))
    assert torch.equal(plain.audio_codes, trimmed.audio_codes)
    assert Ragged.from_batch(batch, [5000, 5000]).lengths is None


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 80))
def test_groups_keep_rows_in_place_and_within_the_limit(lengths: list[int], limit: int):
    batch = Ragged.from_batch(torch.randn(len(lengths), 2, max(lengths) + 3), lengths)
    sizes = []

    def double(group: Ragged) -> Ragged:
        sizes.append(group.values.shape[0] * group.values.shape[-1] * (len(group.row_lengths) > 1))
        return group.map(lambda values: 2 * values).every(2)

    with torch.no_grad():
        grouped, plain = batch.in_groups(double, limit), double(batch)
    assert max(sizes[:-1]) <= limit
    assert grouped.row_lengths == plain.row_lengths == tuple(-(-n // 2) for n in lengths)
    assert torch.equal(grouped.masked(), plain.masked())


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 9000))
@torch.no_grad()
def test_code_length_is_what_encode_makes(shape: str, samples: int):
    codec = codec_of(shape)
    if codec.code_length(samples) == 0:
        with pytest.raises(UserError, match="at least"):
            codec.encode(torch.zeros(1, 1, samples))
    else:
        assert codec.encode(torch.zeros(1, 1, samples)).audio_codes.shape[-1] == codec.code_length(samples)


@given(st.integers(1, 10**6), st.sampled_from([(24000, 16000), (22050, 24000), (8000, 24000), (16000, 16000)]))
def test_resampled_length_is_what_resample_makes(samples: int, rates: tuple[int, int]):
    if samples <= 20000:
        assert resample(torch.zeros(samples), *rates).shape[-1] == resampled_length(samples, *rates)
    assert abs(resampled_length(samples, *rates) - samples * rates[1] / rates[0]) <= 1


@given(
    st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(1, 3),
    st.integers(1, 30),
)
def test_conv_length_is_what_the_convolution_makes(kind, kernel, stride, padding, dilation, length):
    layer = kind(1, 1, kernel, stride=stride, padding=padding, dilation=dilation)
    expected = conv_length(layer, length)
    if expected > 0:
        assert layer(torch.zeros(1, 1, length)).shape[-1] == expected


def test_a_clip_feels_no_gradient_from_its_neighbours():
    codec = codec_of("release-like")
    batch, lengths = batch_of([torch.randn(6000), torch.randn(4000)])
    batch.requires_grad_()
    features = codec.embed(batch, lengths)
    features.values[1, :, : features.lengths[1]].square().sum().backward()
    assert not batch.grad[0].any()
    assert batch.grad[1, 0, :4000].any() and not batch.grad[1, 0, 4000:].any()
