"""How far a spectrum is from another: the distances of the published tables, and the scale-invariant ratio.

The distances are those that the Descript Audio Codec evaluates itself with (arXiv 2306.06546, section 4.3; the defaults of
descript-audiotools): for each window, the mean absolute difference of log10 of squared magnitudes, clamped at 1e-5 before
squaring, plus the mean absolute difference of magnitudes, summed over the windows 2048 and 512 with a hop of a quarter.
The released tokenizer's table ("STFT distance" 1.62 on speech at 2 kbit/s) is read with this definition; its authors have
not published the script behind it.

Shapes: L samples, M bands, T frames. Both waveforms are at the codec's rate and of one length.
"""

from functools import lru_cache

import librosa
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from higgs.errors import UserError

WINDOWS = (2048, 512)
BANDS = (150, 80)  # of the mel distance, for the two windows
FLOOR = 1e-5


def stft_distance(output: Tensor, target: Tensor) -> Tensor:
    """STFT distance [] of waveforms [L]."""
    check_lengths(output, target)
    return sum(difference(magnitudes(output, window), magnitudes(target, window)) for window in WINDOWS)


def mel_distance(output: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    """Mel distance [] of waveforms [L]: as the STFT distance, of 150 and 80 mel bands (Slaney's, up to half the rate)."""
    check_lengths(output, target)
    total = output.new_zeros(())
    for window, bands in zip(WINDOWS, BANDS, strict=True):
        filters = mel_bands(sample_rate, window, bands).to(output)
        total = total + difference(filters @ magnitudes(output, window), filters @ magnitudes(target, window))
    return total


def si_sdr(output: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio [] in dB of waveforms [L], with their means removed (arXiv 1811.02508)."""
    check_lengths(output, target)
    if not target.any():
        raise UserError("The original is silent, so there is no ratio to it.")
    return scale_invariant_signal_distortion_ratio(output.double(), target.double(), zero_mean=True)


def difference(output: Tensor, target: Tensor) -> Tensor:
    logs = (x.clamp_min(FLOOR).square().log10() for x in (output, target))
    ours, theirs = logs
    return (ours - theirs).abs().mean() + (output - target).abs().mean()


def magnitudes(waveform: Tensor, window: int) -> Tensor:
    """Magnitudes [window // 2 + 1, T] of a waveform [L], frames centred."""
    return torch.stft(
        waveform, window, window // 4, window=torch.hann_window(window).to(waveform),
        # Reflection needs more than half a window of samples; shorter clips are framed over silence.
        pad_mode="reflect" if len(waveform) > window // 2 else "constant", return_complex=True,
    ).abs()  # fmt: skip


@lru_cache(maxsize=8)
def mel_bands(sample_rate: int, window: int, bands: int) -> Tensor:
    """Filters [M, window // 2 + 1]. Do not change them."""
    return torch.from_numpy(librosa.filters.mel(sr=sample_rate, n_fft=window, n_mels=bands))


def check_lengths(output: Tensor, target: Tensor) -> None:
    """Both must be mono waveforms [L] of one length, for frames are compared one by one."""
    if output.ndim != 1 or output.shape != target.shape or not len(output):
        raise UserError(
            f"The two sounds must be mono clips [L] of one length; they are {tuple(output.shape)} and "
            f"{tuple(target.shape)}. Cut the longer one."
        )
