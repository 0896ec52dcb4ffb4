"""What a clip of speech looks like from outside: silence at its edges, clipping, and whether it ever ends.

Shapes: L samples.
"""

from dataclasses import dataclass

import librosa
from torch import Tensor

from higgs.audio import FULL_SCALE
from higgs.eval.words import spoken_text

SILENCE_DB = 40.0  # below the loudest frame
HOP_S, FRAME_S = 0.01, 0.04
CHARACTERS_PER_SECOND = 15.0  # read English; the 32 clips of LJ Speech have 15.1
RUNAWAY_RATIO, RUNAWAY_GRACE = 3.0, 1.0  # times the expected length, plus seconds


@dataclass(frozen=True)
class EdgeSilence:
    """Silence before the first and after the last sound, in seconds."""

    leading: float
    trailing: float


def edge_silence(waveform: Tensor, sample_rate: int) -> EdgeSilence:
    """Silence at the edges of a waveform [L]: frames of 40 ms whose power is 40 dB below the loudest one's. A clip without
    any sound is all leading silence."""
    seconds = len(waveform) / sample_rate
    if not waveform.any():
        return EdgeSilence(seconds, 0.0)
    _, (start, end) = librosa.effects.trim(
        waveform.numpy(), top_db=SILENCE_DB, frame_length=round(FRAME_S * sample_rate), hop_length=round(HOP_S * sample_rate)
    )  # fmt: skip
    return EdgeSilence(float(start) / sample_rate, seconds - float(end) / sample_rate)


def clipped_share(waveform: Tensor) -> float:
    """Share of the samples of a waveform [L] that are at full scale."""
    return float((waveform.abs() >= FULL_SCALE).float().mean())


def expected_seconds(text: str) -> float:
    """How long a text takes to read aloud, by its number of characters, roughly."""
    return len(spoken_text(text)) / CHARACTERS_PER_SECOND


def is_runaway(seconds: float, expected: float, stopped: bool | None) -> bool:
    """Whether speech ran on: the model did not stop by itself, or took more than three times as long as expected and a
    second more."""
    return stopped is False or seconds > RUNAWAY_RATIO * expected + RUNAWAY_GRACE
