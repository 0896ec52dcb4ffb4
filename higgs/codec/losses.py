"""What the codec is trained on: spectra at several scales, and the verdicts of the discriminators.

The recipe is that of the Descript Audio Codec (arXiv 2306.06546, section 3.4), plus the reconstruction of the
teacher's features (X-Codec, arXiv 2408.17175). Every loss is a mean over equal rows, so the mean over ranks and
micro-batches is the loss of the whole batch.

Shapes: B batch, L samples, C channels, T frames, M mel bands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from higgs.audio import log_mel, mel_filters
from higgs.errors import UserError

MEL_FLOOR = 1e-5  # magnitudes below it count as silence
DISTANCE_SCALES = ((128, 10), (256, 20), (512, 40), (1024, 80), (2048, 160))  # window, mel bands


@dataclass
class LossConfig:
    """Scales of the mel loss and the weights of all losses.

    The commitment loss enters each stage with weight 1.0 (no further factor inside the quantizer, mean over the
    stages) and the sum with `commitment_weight`, as DAC weighs it.
    """

    mel_windows: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048])
    mel_bands: list[int] = field(default_factory=lambda: [5, 10, 20, 40, 80, 160, 320])
    mel_weight: float = 15.0
    feature_weight: float = 2.0
    adversarial_weight: float = 1.0
    commitment_weight: float = 0.25
    semantic_weight: float = 1.0
    adversarial: str = "lsgan"  # or hinge

    def __post_init__(self) -> None:
        if len(self.mel_windows) != len(self.mel_bands) or not self.mel_windows:
            raise UserError(
                f"mel_windows {list(self.mel_windows)} and mel_bands {list(self.mel_bands)} must be equally many, at least one."
            )
        if self.adversarial not in ("lsgan", "hinge"):
            raise UserError(f"The adversarial loss '{self.adversarial}' is not known; use lsgan or hinge.")


class MelScale(nn.Module):
    """Log10 mel magnitudes [B, M, T] of waveforms [B, 1, L] with one window; filters that hold no bin are left out."""

    def __init__(self, window: int, num_mels: int, sample_rate: int) -> None:
        super().__init__()
        filters = mel_filters(num_mels, window, sample_rate).T
        self.register_buffer("filters", filters[filters.sum(1) > 0].contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        size = len(self.window)
        spectrum = torch.stft(
            waveform[:, 0],
            n_fft=size,
            hop_length=size // 4,
            window=self.window,
            pad_mode="reflect" if waveform.shape[-1] > size // 2 else "constant",
            return_complex=True,
        )
        return (self.filters @ spectrum.abs()).clamp_min(MEL_FLOOR).log10()


class MelLoss(nn.Module):
    """Mean absolute difference of log10 mel magnitudes, summed over scales as DAC does."""

    def __init__(self, windows: Sequence[int], bands: Sequence[int], sample_rate: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(MelScale(*scale, sample_rate) for scale in zip(windows, bands, strict=True))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss [] of waveforms [B, 1, L] of the filters' dtype; autocast is off inside."""
        with torch.autocast(output.device.type, enabled=False):
            total = output.new_zeros(())
            for scale in self.scales:
                with torch.no_grad():
                    theirs = scale(target)
                total = total + (scale(output) - theirs).abs().mean()
        return total


def mel_distance(output: Tensor, target: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of log10 mel magnitudes of waveforms [..., L], averaged over five windows: the measure of
    validation, the same whatever the training weighs."""
    total = output.new_zeros(())
    for window, mels in DISTANCE_SCALES:
        ours, theirs = (
            log_mel(x, sample_rate, num_mels=mels, window=window, hop=window // 4) for x in (output, target)
        )
        total = total + (ours - theirs).abs().mean()
    return total / len(DISTANCE_SCALES)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor], kind: str) -> Tensor:
    """What the discriminators minimise: verdicts on real sound toward 1, on generated sound toward 0 (lsgan, arXiv
    1611.04076) or beyond 1 and -1 (hinge, arXiv 1705.02894). Means within, sum over discriminators."""
    if kind == "hinge":
        return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True))
    return sum((1 - r).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True))


def adversarial_loss(fake: Sequence[Tensor], kind: str) -> Tensor:
    """What the codec minimises of the discriminators' verdicts on its sound."""
    if kind == "hinge":
        return sum(-f.mean() for f in fake)
    return sum((1 - f).square().mean() for f in fake)


def feature_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean absolute difference of the discriminators' hidden layers, summed over layers and discriminators; only the
    generated sound gets a gradient."""
    pairs = ((r, f) for ours, theirs in zip(real, fake, strict=True) for r, f in zip(ours, theirs, strict=True))
    return sum((f - r.detach()).abs().mean() for r, f in pairs)


def semantic_loss(estimate: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error to the teacher's features, both [B, C, T]."""
    return F.mse_loss(estimate, teacher.detach())
