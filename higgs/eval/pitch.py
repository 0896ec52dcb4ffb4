"""Fundamental frequency: tracked by WORLD's DIO with StoneMask (Morise et al. 2009; package pyworld), and compared.

Shapes: L samples, T frames of 5 ms.
"""

from dataclasses import dataclass

import pyworld
import torch
from torch import Tensor

from higgs.audio import resample
from higgs.eval.spectral import check_lengths

RATE = 16000  # at which F0 is tracked, in Hz
FRAME_MS = 5.0
LEAST_VOICED = 20  # frames (0.1 s) voiced in both from which F0 can be compared


@dataclass(frozen=True)
class F0Comparison:
    """Root mean square error in cents and correlation of log F0 over the frames that are voiced in both (None where
    there are too few, or F0 does not move), and the share of frames that are voiced in one alone."""

    error_cents: float | None
    correlation: float | None
    voicing_error: float


def f0(waveform: Tensor, sample_rate: int) -> Tensor:
    """F0 [T] in Hz (71 to 800) of a waveform [L], every 5 ms; 0 where nothing is voiced."""
    samples = resample(waveform.double(), sample_rate, RATE).numpy()
    rough, times = pyworld.dio(samples, RATE, frame_period=FRAME_MS)
    return torch.from_numpy(pyworld.stonemask(samples, rough, times, RATE))


def compare_f0(output: Tensor, target: Tensor, sample_rate: int) -> F0Comparison:
    """F0 of a waveform [L] against that of the original [L]."""
    check_lengths(output, target)
    return compare_tracks(f0(output, sample_rate), f0(target, sample_rate))


def compare_tracks(ours: Tensor, theirs: Tensor) -> F0Comparison:
    """As `compare_f0`, of tracks [T] in Hz."""
    both = (ours > 0) & (theirs > 0)
    voicing_error = float(((ours > 0) != (theirs > 0)).double().mean())
    if int(both.sum()) < LEAST_VOICED:
        return F0Comparison(None, None, voicing_error)
    ours, theirs = 1200 * ours[both].log2(), 1200 * theirs[both].log2()
    moves = min(float(ours.std()), float(theirs.std())) > 1e-6
    correlation = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) if moves else None
    return F0Comparison(float((ours - theirs).square().mean().sqrt()), correlation, voicing_error)
