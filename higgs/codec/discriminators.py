"""Critics of the codec's sound in training: by period (HiFi-GAN, arXiv 2010.05646) and by frequency band of complex
spectra at several resolutions (DAC, arXiv 2306.06546, section 3.3). They are not part of a codec's checkpoint.

Shapes: B batch, L samples, P period, C channels, T frames, N bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from higgs.errors import UserError

SLOPE = 0.1  # of the leaky ReLU
LOUDNESS = 0.8  # the peak that every clip is scaled to before it is judged


@dataclass
class DiscriminatorConfig:
    """Widths are channels of successive layers; bands are shares of the spectrum. The defaults are DAC's."""

    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])
    period_widths: list[int] = field(default_factory=lambda: [32, 128, 512, 1024, 1024])
    windows: list[int] = field(default_factory=lambda: [2048, 1024, 512])
    bands: list[list[float]] = field(
        default_factory=lambda: [[0.0, 0.1], [0.1, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1.0]]
    )
    band_width: int = 32

    def __post_init__(self) -> None:
        if not self.periods and not self.windows:
            raise UserError("The discriminators have neither periods nor windows; give at least one of either.")
        for low, high in self.bands:
            if not 0 <= low < high <= 1:
                raise UserError(f"The band [{low}, {high}] of the discriminators must rise within 0 to 1.")


@dataclass(frozen=True)
class Verdict:
    """One discriminator's scores, of any shape, near 1 for what it takes for real; and its hidden layers."""

    scores: Tensor
    features: list[Tensor]


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample in a row of its own, so that what repeats at that period lines up."""

    def __init__(self, period: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        steps = [(1, widths[0]), *zip(widths, widths[1:], strict=False)]
        strides = [3] * (len(steps) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(inputs, outputs, (5, 1), (stride, 1), padding=(2, 0)))
            for (inputs, outputs), stride in zip(steps, strides, strict=True)
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform: Tensor) -> Verdict:
        length = waveform.shape[-1]
        x = F.pad(waveform, (0, -length % self.period), mode="reflect")
        x = rearrange(x, "b c (t p) -> b c t p", p=self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return Verdict(self.last(x), features)


class SpectrumDiscriminator(nn.Module):
    """Sees the complex spectrum with one window, each frequency band through convolutions of its own."""

    def __init__(self, window: int, bands: Sequence[Sequence[float]], width: int) -> None:
        super().__init__()
        bins = window // 2 + 1
        self.bounds = [(int(low * bins), int(high * bins)) for low, high in bands]
        for (low, high), band in zip(self.bounds, bands, strict=True):
            if high - low < 8:
                raise UserError(f"The band {list(band)} of a window of {window} samples holds only {high - low} bins.")
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.bands = nn.ModuleList(nn.ModuleList(self._stack(width)) for _ in bands)
        self.last = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=1))

    @staticmethod
    def _stack(width: int) -> list[nn.Module]:
        shapes = [(2, (3, 9), 1), (width, (3, 9), 2), (width, (3, 9), 2), (width, (3, 9), 2), (width, (3, 3), 1)]
        return [
            weight_norm(
                nn.Conv2d(inputs, width, kernel, (1, stride), padding=tuple(size // 2 for size in kernel))
            )
            for inputs, kernel, stride in shapes
        ]  # fmt: skip

    def forward(self, waveform: Tensor) -> Verdict:
        x = self.spectrum(waveform)
        features, ends = [], []
        for (low, high), stack in zip(self.bounds, self.bands, strict=True):
            band = x[..., low:high]
            for conv in stack:
                band = F.leaky_relu(conv(band), SLOPE)
                features.append(band)
            ends.append(band)
        return Verdict(self.last(torch.cat(ends, dim=-1)), features)

    def spectrum(self, waveform: Tensor) -> Tensor:
        """Real and imaginary parts [B, 2, T, N] of waveforms [B, 1, L]."""
        size = len(self.window)
        with torch.autocast(waveform.device.type, enabled=False):
            spectrum = torch.stft(
                waveform[:, 0], size, size // 4, window=self.window, pad_mode="constant", return_complex=True
            )
        return rearrange(torch.view_as_real(spectrum), "b n t c -> b c t n")


class Discriminators(nn.Module):
    """All of them side by side, on waveforms [B, 1, L]."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            [
                *(PeriodDiscriminator(period, config.period_widths) for period in config.periods),
                *(SpectrumDiscriminator(window, config.bands, config.band_width) for window in config.windows),
            ]
        )

    def forward(self, waveform: Tensor) -> list[Verdict]:
        """One verdict per discriminator. Clips are judged without their mean and at one loudness."""
        centred = waveform - waveform.mean(-1, keepdim=True)
        level = LOUDNESS * centred / (centred.abs().amax(-1, keepdim=True) + 1e-9)
        return [critic(level) for critic in self.critics]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights from the generator alone, by He's rule for the leaky ReLU, with biases of zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                weight = torch.empty_like(module.weight)
                module.weight = nn.init.kaiming_normal_(weight, a=SLOPE, generator=generator)
                module.bias.zero_()
