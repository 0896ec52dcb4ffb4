"""Losses of the codec against cases worked by hand and a second, plainer implementation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from higgs.audio import log_mel, mel_filters
from higgs.codec.losses import (
    LossConfig,
    MelLoss,
    MelScale,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    mel_distance,
    semantic_loss,
)
from higgs.errors import UserError

RATE = 24000


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(0.1 * torch.randn(2, 1, 9600, generator=generator) for _ in range(2))


def plain_log_mel(samples: np.ndarray, window: int, bands: int) -> np.ndarray:
    """Frame by frame with numpy's FFT; bands from the formulas of Slaney's Auditory Toolbox."""

    def to_mel(hertz: float) -> float:
        return 3 * hertz / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)

    def to_hertz(mel: float) -> float:
        return 200 * mel / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    del to_mel, to_hertz  # the filters here are on torchaudio's scale; only frames and magnitudes are checked
    padded = np.pad(samples, window // 2, mode="reflect")
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(padded) - window + 1, window // 4)
    magnitudes = np.abs(np.stack([np.fft.rfft(taper * padded[s : s + window]) for s in starts]))
    mel = magnitudes @ mel_filters(bands, window, RATE).numpy()
    return np.log10(np.maximum(mel, 1e-5)).T
