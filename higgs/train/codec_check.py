"""How good a codec is: numbers over held-out clips, and clips to look at and listen to.

Shapes: B batch, L samples, K codebooks, T frames.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from higgs.audio import save_audio
from higgs.codec import Codec, decode_prefix
from higgs.codec.losses import mel_distance
from higgs.codec.quantizer import usage
from higgs.codec.ragged import Ragged
from higgs.errors import UserError
from higgs.plots import save_speech_plot
from higgs.train.distributed import World


@dataclass
class Measured:
    """Mean mel distance over clips at each bandwidth (named in kbit/s), and of each codebook the share of its codes in
    use and the perplexity over all frames [K]."""

    mel_distance: dict[str, float]
    codebook_use: list[float]
    codebook_perplexity: list[float]


@torch.no_grad()
def measure(codec: Codec, waves: Iterable[Tensor], world: World) -> tuple[Measured, Tensor | None]:
    """Codes clips [B, 1, L], decodes every prefix of codebooks, and compares; summed over ranks, each with clips of its
    own. The silence that fills up a short clip does not count. Also returns this rank's first batch.

    Raises:
        UserError: where no rank has a clip.
    """
    bandwidths = codec.config.target_bandwidths
    counts = torch.zeros(codec.num_codebooks, codec.config.codebook_size, device=world.device)
    totals = torch.zeros(len(bandwidths) + 1, dtype=torch.float64, device=world.device)
    first = None
    for clips in waves:
        first = clips if first is None else first
        lengths = lengths_of(clips, codec.minimum_samples)
        coded = codec.encode(clips, lengths=lengths)
        valid = torch.arange(coded.audio_codes.shape[-1], device=world.device) < coded.lengths[:, None]
        for stage, row in enumerate(coded.audio_codes.unbind(1)):
            counts[stage] += torch.bincount(row[valid], minlength=counts.shape[1])
        for place, bandwidth in enumerate(bandwidths):
            heard = decode_prefix(codec, coded.audio_codes, bandwidth, clips.shape[-1], coded.lengths)
            for ours, theirs, length in zip(heard, clips, lengths.tolist(), strict=True):
                totals[place] += mel_distance(ours[..., :length], theirs[..., :length], codec.sample_rate)
        totals[-1] += len(clips)
    world.sum_(counts)
    *distances, number = world.sum_(totals).tolist()
    if not number:
        raise UserError("The validation data gave no clip to measure; see the unreadable files above.")
    use, perplexity = usage(counts)
    found = Measured(
        {f"{b:g}": round(distance / number, 5) for b, distance in zip(bandwidths, distances, strict=True)},
        rounded(use),
        rounded(perplexity),
    )
    return found, first


def lengths_of(clips: Tensor, minimum: int) -> Tensor:
    """Samples [B] up to the last one that is not zero, of clips [B, 1, L]; at least `minimum`."""
    places = torch.arange(1, clips.shape[-1] + 1, device=clips.device)
    return torch.where(clips[:, 0] != 0, places, 0).amax(1).clamp_min(minimum)


@torch.no_grad()
def write_reconstructions(codec: Codec, clips: Tensor, folder: Path, name: str) -> list[Path]:
    """Each of the clips [B, 1, L] beside its reconstruction at every bandwidth, as sound and picture; returns the files."""
    paths: list[Path] = []
    codes = codec.encode(clips).audio_codes
    sounds = {"original": (clips, codes)}
    for bandwidth in codec.config.target_bandwidths:
        kept = codes[:, : codec.config.num_codebooks_at(bandwidth)]
        sounds[f"{bandwidth:g}kbps"] = decode_prefix(codec, codes, bandwidth, clips.shape[-1]), kept
    for place in range(len(clips)):
        for what, (sound, kept) in sounds.items():
            path = folder / f"{name}-{place}-{what}.wav"
            picture = path.with_suffix(".png")
            save_audio(path, sound[place], codec.sample_rate)
            save_speech_plot(picture, sound[place].flatten().cpu(), codec.sample_rate, kept[place])
            paths += [path, picture]
    return paths


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


@torch.no_grad()
def training_flops(codec: Codec, critics: nn.Module, clip: Tensor) -> tuple[float, float]:
    """Floating-point operations of training on one clip [1, 1, L]: of the codec, and of its discriminators.

    Counted in a forward pass and multiplied: a backward pass takes twice as many for what is trained, one as many where
    only the sound gets a gradient. The teacher runs forward alone; discriminators see the clip and its reconstruction.
    """

    def count(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    teacher = count(lambda: codec.semantic_features(Ragged(clip)))
    whole = count(lambda: codec.reconstruct(clip))
    return 3.0 * (whole - teacher) + teacher, 7.0 * count(lambda: critics(clip))
