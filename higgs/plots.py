"""Pictures for people who would rather look: spectrograms with codes or side by side, loss curves, histograms.

Shapes: L samples, M mel bands, K codebooks, F frames.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from higgs.audio import log_mel

matplotlib.use("Agg")  # files only: no display is needed or opened


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a PNG aside, then renames it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format="png", dpi=110, bbox_inches="tight")
    os.replace(aside, path)


def png(figure: Figure) -> bytes:
    """A figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, bbox_inches="tight")
    return buffer.getvalue()


def histogram_png(values: Sequence[float], label: str) -> bytes:
    """How values are spread, with their mean."""
    figure = Figure(figsize=(3.6, 2.2))
    axes = figure.subplots()
    # Alike values have no spread that bins could be cut from.
    spread = max(values) - min(values) > 1e-9 * max(1.0, abs(max(values)))
    axes.hist(values, bins=min(30, max(5, len(values) // 3)) if spread else 1, color="#4878a8")
    axes.axvline(sum(values) / len(values), color="#c44e52", linewidth=1.5)
    axes.set(xlabel=label, ylabel="samples")
    axes.tick_params(labelsize="small")
    return png(figure)


def spectrograms_png(sounds: Sequence[tuple[str, Tensor, int]]) -> bytes:
    """Log-mel spectrograms one above the other, of named samples [L] at their rates, on one axis of time and colour."""
    figure = Figure(figsize=(8, 1.7 * len(sounds)))
    rows = figure.subplots(len(sounds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, waveform, rate) in zip(rows, sounds, strict=True):
        mel = log_mel(waveform, rate).numpy()
        seconds = waveform.numel() / rate
        axes.imshow(
            mel, origin="lower", aspect="auto", cmap="magma", vmin=-5, vmax=1, extent=(0, seconds, 0, mel.shape[0])
        )
        axes.set(ylabel=name, yticks=[])
    rows[-1].set(xlabel="time in s", xlim=(0, max(waveform.numel() / rate for _, waveform, rate in sounds)))
    return png(figure)


def save_speech_plot(path: str | Path, waveform: Tensor, sample_rate: int, codes: Tensor) -> None:
    """Log-mel spectrogram of samples [L] above the map of their codes [K, F]."""
    figure = Figure(figsize=(10, 5))
    sound, tokens = figure.subplots(2, 1, gridspec_kw={"height_ratios": [3, 1]})
    seconds = waveform.numel() / sample_rate
    mel = log_mel(waveform, sample_rate).cpu().numpy()
    sound.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, mel.shape[0]), cmap="magma")
    sound.set(ylabel="mel band", title=f"{seconds:.2f} s")
    tokens.imshow(
        codes.cpu().numpy(), origin="lower", aspect="auto", interpolation="nearest", cmap="viridis",
        extent=(0, seconds, -0.5, codes.shape[0] - 0.5),
    )  # fmt: skip
    tokens.set(xlabel="time in s", ylabel="codebook")
    save_figure(figure, path)


def save_curves(path: str | Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str) -> None:
    """Named curves (x, y) on a logarithmic axis."""
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name)
    axes.set(xlabel=xlabel, ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def save_codec_trend(path: str | Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Validation of a codec over its training: mel distance per bandwidth (kbit/s) above the use of each codebook.

    Each entry of `history` has `step`, `mel_distance` {bandwidth: value} and `codebook_use` (a list).
    """
    figure = Figure(figsize=(8, 6))
    sound, codes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    steps = [entry["step"] for entry in history]
    for bandwidth in history[-1]["mel_distance"]:
        values = [entry["mel_distance"][bandwidth] for entry in history]
        sound.plot(steps, values, marker=".", label=f"{bandwidth} kbit/s")
    for place in range(len(history[-1]["codebook_use"])):
        codes.plot(steps, [entry["codebook_use"][place] for entry in history], marker=".", label=str(place))
    sound.set(ylabel="mel distance, validation")
    codes.set(xlabel="step", ylabel="share of codes in use", ylim=(0, 1.05))
    sound.legend()
    codes.legend(title="codebook", ncols=4, fontsize="small")
    for axes in (sound, codes):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
