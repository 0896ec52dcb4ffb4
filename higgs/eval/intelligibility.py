"""Measures of speech against the original: PESQ and (E)STOI, by the packages pesq and pystoi, at the rates they ask for.

Shapes: L samples. Both waveforms are at `sample_rate` Hz and of one length.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pesq as itu
import pystoi
from torch import Tensor

from higgs.audio import resample
from higgs.errors import UserError
from higgs.eval.spectral import check_lengths

PESQ_RATE, STOI_RATE = 16000, 10000


def pesq(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), 1.04 to 4.64, of waveforms [L]. UserError where it finds no speech."""
    ours, theirs = at_rate(output, target, sample_rate, PESQ_RATE)
    try:
        return float(itu.pesq(PESQ_RATE, theirs, ours, "wb"))
    except (itu.PesqError, ValueError) as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise UserError(f"PESQ cannot judge this clip ({reason or type(error).__name__}).") from error


def stoi(output: Tensor, target: Tensor, sample_rate: int, extended: bool = False) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), up to 1, of waveforms [L]; or, `extended`, ESTOI (Jensen &
    Taal 2016). UserError where less than 0.4 s of the original is speech."""
    ours, theirs = at_rate(output, target, sample_rate, STOI_RATE)
    with warnings.catch_warnings(), same_chance():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            return float(pystoi.stoi(theirs, ours, STOI_RATE, extended=extended))
        except RuntimeWarning as error:
            raise UserError("STOI needs at least 0.4 s of speech above silence.") from error


@contextmanager
def same_chance() -> Iterator[None]:
    """pystoi adds a little noise from NumPy's global generator: here it is always the same noise, and the generator is
    left as it was."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)


def estoi(output: Tensor, target: Tensor, sample_rate: int) -> float:
    """`stoi` with `extended`, as used for processing that is not linear."""
    return stoi(output, target, sample_rate, extended=True)


def at_rate(output: Tensor, target: Tensor, sample_rate: int, rate: int) -> tuple:
    """Both as float64 arrays at `rate`; neither may be silent."""
    check_lengths(output, target)
    if not output.any() or not target.any():
        raise UserError("One of the two sounds is silent, so nothing can be understood.")
    return tuple(resample(sound.double(), sample_rate, rate).numpy() for sound in (output, target))
