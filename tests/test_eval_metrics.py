"""Metrics of sound: perfect for the same sound, worse the more it is spoilt, equal to second implementations."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import auraloss
import librosa
import numpy as np
import pesq as itu
import pystoi
import pytest
import soundfile
import torch
import torch.nn.functional as F
from scipy.signal import butter, sosfiltfilt
from torch import Tensor

from higgs.audio import load_audio, resample
from higgs.codec.quantizer import usage
from higgs.errors import UserError
from higgs.eval.catalog import METRICS
from higgs.eval.intelligibility import estoi, pesq, stoi
from higgs.eval.pitch import compare_f0, f0
from higgs.eval.shape import clipped_share, edge_silence, expected_seconds, is_runaway
from higgs.eval.spectral import mel_distance, si_sdr, stft_distance

RATE = 24000
SI_SDR_OF_THE_SAME = 100  # dB: nothing but rounding is left

METRIC: dict[str, Callable[[Tensor, Tensor], float | None]] = {
    "stft_distance": lambda output, target: float(stft_distance(output, target)),
    "mel_distance": lambda output, target: float(mel_distance(output, target, RATE)),
    "si_sdr": lambda output, target: float(si_sdr(output, target)),
    "pesq": lambda output, target: pesq(output, target, RATE),
    "stoi": lambda output, target: stoi(output, target, RATE),
    "estoi": lambda output, target: estoi(output, target, RATE),
    "f0_error": lambda output, target: compare_f0(output, target, RATE).error_cents,
    "f0_correlation": lambda output, target: compare_f0(output, target, RATE).correlation,
    "voicing_error": lambda output, target: compare_f0(output, target, RATE).voicing_error,
}


@pytest.fixture(scope="module")
def speech(shared_data: Path) -> Tensor:
    """Five seconds of LJ Speech at 24 kHz."""
    return load_audio(shared_data / "ljspeech" / "LJ001-0001.flac", RATE)[: 5 * RATE]


def with_noise(clip: Tensor, snr_db: float) -> Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return clip + noise * clip.std() * 10 ** (-snr_db / 20)


def low_passed(clip: Tensor, cutoff: float) -> Tensor:
    """Forward and backward, so that nothing is delayed."""
    sections = butter(6, cutoff, "lowpass", fs=RATE, output="sos")
    return torch.from_numpy(sosfiltfilt(sections, clip.numpy()).astype(np.float32))


@pytest.mark.parametrize("name", METRIC)
@pytest.mark.parametrize("file", ["ljspeech/LJ001-0002.flac", "speech/jfk.flac"])
def test_the_same_sound_is_perfect(shared_data: Path, name: str, file: str):
    clip = load_audio(shared_data / file, RATE)[: 4 * RATE]
    value = METRIC[name](clip, clip.clone())
    if name == "si_sdr":
        assert value > SI_SDR_OF_THE_SAME
    else:
        assert value == pytest.approx(METRICS[name].perfect, abs=1e-4)


@pytest.mark.parametrize("name", METRIC)
def test_more_noise_is_worse(speech: Tensor, name: str):
    ladder = [METRIC[name](with_noise(speech, snr), speech) for snr in (40, 25, 15, 5)]
    if METRICS[name].better == "lower":
        ladder = [-value for value in ladder]
    # F0 is compared where both are voiced alone: in noise fewer and surer frames are left, so only ends are compared.
    if name.startswith("f0"):
        assert ladder[0] > max(ladder[2:])
    else:
        assert ladder == sorted(ladder, reverse=True) and ladder[0] > ladder[-1]


@pytest.mark.parametrize("name", ["stft_distance", "mel_distance", "si_sdr", "pesq", "stoi", "estoi"])
def test_less_bandwidth_is_worse(speech: Tensor, name: str):
    ladder = [METRIC[name](low_passed(speech, cutoff), speech) for cutoff in (8000, 3000, 1500, 700)]
    if METRICS[name].better == "lower":
        ladder = [-value for value in ladder]
    assert ladder == sorted(ladder, reverse=True) and ladder[0] > ladder[-1]


def through_vorbis(clip: Tensor, level: float) -> Tensor:
    """Coded and decoded by a real codec; a level of 0 is about 110 kbit/s here, 1 about 37."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip.numpy(), RATE, format="OGG", subtype="VORBIS", compression_level=level)
    buffer.seek(0)
    decoded = torch.from_numpy(soundfile.read(buffer, dtype="float32")[0])[: len(clip)]
    return F.pad(decoded, (0, len(clip) - len(decoded)))


@pytest.mark.parametrize("name", METRIC)
def test_fewer_bits_of_a_codec_are_worse(speech: Tensor, name: str):
    ladder = [METRIC[name](through_vorbis(speech, level), speech) for level in (0.0, 0.6, 1.0)]
    if METRICS[name].better == "lower":
        ladder = [-value for value in ladder]
    assert ladder == sorted(ladder, reverse=True) and ladder[0] > ladder[-1]


@pytest.mark.parametrize("snr", [30, 10])
def test_stft_distance_agrees_with_auraloss(speech: Tensor, snr: float):
    noisy = with_noise(speech, snr)
    theirs = 0.0
    for window in (2048, 512):
        # Natural logarithms of magnitudes there; log10 of their squares here.
        shape = {"fft_size": window, "hop_size": window // 4, "win_length": window, "eps": 1e-10, "mag_distance": "L1"}
        logs = auraloss.freq.STFTLoss(**shape, w_sc=0.0, w_log_mag=1.0, w_lin_mag=0.0)
        linear = auraloss.freq.STFTLoss(**shape, w_sc=0.0, w_log_mag=0.0, w_lin_mag=1.0)
        batch = noisy[None, None], speech[None, None]
        theirs += 2 / math.log(10) * float(logs(*batch)) + float(linear(*batch))
    assert float(stft_distance(noisy, speech)) == pytest.approx(theirs, rel=1e-4)


def test_mel_distance_agrees_with_librosa(speech: Tensor):
    noisy = with_noise(speech, 20)
    theirs = 0.0
    for window, bands in ((2048, 150), (512, 80)):
        a, b = (
            librosa.feature.melspectrogram(
                y=x.numpy(), sr=RATE, n_fft=window, hop_length=window // 4, n_mels=bands, power=1.0, pad_mode="reflect"
            )
            for x in (noisy, speech)
        )
        logs = [np.log10(np.maximum(x, 1e-5) ** 2) for x in (a, b)]
        theirs += np.abs(logs[0] - logs[1]).mean() + np.abs(a - b).mean()
    assert float(mel_distance(noisy, speech, RATE)) == pytest.approx(theirs, rel=1e-4)


def test_si_sdr_of_known_noise_is_its_ratio(speech: Tensor):
    target = speech - speech.mean()
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    noise -= noise.mean() + (noise @ target) / (target @ target) * target  # nothing of the speech in it
    noise *= target.norm() / noise.norm() * 10 ** (-12 / 20)
    assert float(si_sdr(target + noise, target)) == pytest.approx(12, abs=1e-3)
    assert float(si_sdr(0.1 * (target + noise), target)) == pytest.approx(12, abs=1e-3)


def test_pesq_and_stoi_are_those_of_the_packages(speech: Tensor):
    at16 = [resample(x.double(), RATE, 16000).numpy() for x in (with_noise(speech, 15), speech)]
    at10 = [resample(x.double(), RATE, 10000).numpy() for x in (with_noise(speech, 15), speech)]
    noisy = with_noise(speech, 15)
    assert pesq(noisy, speech, RATE) == itu.pesq(16000, at16[1], at16[0], "wb")
    assert stoi(noisy, speech, RATE) == pystoi.stoi(at10[1], at10[0], 10000)
    # It adds noise of its own, ours always the same.
    assert estoi(noisy, speech, RATE) == pytest.approx(pystoi.stoi(at10[1], at10[0], 10000, extended=True), abs=1e-9)
    assert len({estoi(noisy, speech, RATE) for _ in range(4)}) == 1


def harmonics(pitch: float, seconds: float = 1.0) -> Tensor:
    time = torch.arange(round(RATE * seconds)) / RATE
    return sum(torch.sin(2 * math.pi * pitch * n * time) / n for n in range(1, 12)) * 0.2


@pytest.mark.parametrize("pitch", [110.0, 220.0, 330.0])
def test_f0_of_a_tone_is_its_pitch(pitch: float):
    track = f0(harmonics(pitch), RATE)
    voiced = track[track > 0]
    assert len(voiced) > 0.8 * len(track)
    assert float(voiced.median()) == pytest.approx(pitch, rel=5e-3)


def test_a_semitone_is_an_error_of_a_hundred_cents():
    found = compare_f0(harmonics(200 * 2 ** (1 / 12)), harmonics(200), RATE)
    assert found.error_cents == pytest.approx(100, abs=5)
    silent = compare_f0(torch.randn(RATE, generator=torch.Generator().manual_seed(0)) * 1e-4, harmonics(200), RATE)
    assert silent.error_cents is None and silent.correlation is None and silent.voicing_error > 0.5


def test_silence_at_the_edges(speech: Tensor):
    loud = speech[RATE : 2 * RATE]
    clip = torch.cat([torch.zeros(RATE // 2), loud, 1e-4 * torch.ones(RATE)])
    found = edge_silence(clip, RATE)
    bare = edge_silence(loud, RATE)
    assert found.leading == pytest.approx(0.5 + bare.leading, abs=0.04)
    assert found.trailing == pytest.approx(1.0 + bare.trailing, abs=0.04)
    assert edge_silence(torch.zeros(RATE), RATE).leading == 1.0


def test_clipping_is_a_share(speech: Tensor):
    assert clipped_share(speech) == 0
    assert clipped_share(torch.tensor([0.0, 1.0, -1.0, 0.5])) == 0.5
    ladder = [clipped_share((speech * gain).clamp(-1, 1)) for gain in (1, 3, 10)]
    assert ladder == sorted(ladder) and ladder[-1] > 0


def test_runaways():
    text = "Printing, in the only sense with which we are at present concerned, differs from most if not from all the arts."
    assert 5 < expected_seconds(text) < 10
    assert expected_seconds("[SPEAKER0] Hi.") == expected_seconds("Hi.")
    assert is_runaway(1.0, 1.0, stopped=False) and is_runaway(4.1, 1.0, stopped=True) and is_runaway(4.1, 1.0, None)
    assert not is_runaway(3.9, 1.0, stopped=None)


@pytest.mark.parametrize("measure", [pesq, stoi, estoi])
def test_silence_cannot_be_understood(measure: Callable, speech: Tensor):
    with pytest.raises(UserError, match="silent"):
        measure(torch.zeros_like(speech), speech, RATE)


def test_too_little_speech_is_an_error_and_not_a_number():
    short = harmonics(150, 0.15)
    for measure in (pesq, stoi, estoi):
        with pytest.raises(UserError, match=r"PESQ cannot|at least 0\.4 s"):
            measure(short, short, RATE)


def test_lengths_must_agree(speech: Tensor):
    for name in ("stft_distance", "mel_distance", "si_sdr", "pesq", "stoi", "voicing_error"):
        with pytest.raises(UserError, match="one length"):
            METRIC[name](speech[:-1], speech)


def test_perplexity_of_codes():
    use, perplexity = usage(torch.tensor([[5.0, 5, 5, 5], [9, 0, 0, 0]]))
    assert use.tolist() == [1.0, 0.25] and perplexity.tolist() == pytest.approx([4.0, 1.0])
