"""A codec from nothing in a minute or two: enough for codes that mean something and sound that can be made out.

First the codec without its quantizer learns to reproduce the clips, then k-means fills the codebooks with what comes
out, then the decoder learns to speak from the codes. Only a spectral loss and no discriminator: the sound stays rough.

Shapes: B batch, L samples, C channels, T frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from higgs.codec import Codec
from higgs.codec.losses import mel_distance
from higgs.codec.ragged import Ragged
from higgs.errors import UserError


@dataclass
class WarmupConfig:
    """Steps before and after the codebooks are filled, on `batch_size` random crops of `seconds`."""

    autoencoder_steps: int = 300
    decoder_steps: int = 300
    batch_size: int = 8
    seconds: float = 1.0
    lr: float = 2e-3
    kmeans_iterations: int = 30
    min_use: float = 0.25  # least share of the codes of every codebook that the clips can fill and must use


@dataclass
class WarmupResult:
    """Codes in use of each codebook [K], how many the clips could fill, and the mean log-mel distance at the end."""

    codes_used: list[int]
    codes_possible: int
    mel_distance: float


def warm_up(
    codec: Codec,
    clips: Sequence[Tensor],
    config: WarmupConfig,
    generator: torch.Generator,
    report: Callable[[str, int, float], None],
) -> WarmupResult:
    """Trains a fresh codec on clips [L] in place; `report` gets (phase, step, loss).

    Raises UserError if a codebook uses less than `min_use` of the codes that the clips could fill.
    """
    codec.init_weights(generator)
    codec.requires_grad_(True)
    codec.semantic_model.requires_grad_(False)
    lengths = torch.tensor([clip.numel() for clip in clips])
    padded = pad_sequence(list(clips), batch_first=True)[:, None]
    hop = codec.config.hop_length
    size = min(int(config.seconds * codec.sample_rate) // hop * hop, int(lengths.min()) // hop * hop)

    def crops() -> Tensor:
        rows = torch.randint(len(clips), (config.batch_size,), generator=generator)
        starts = [int(torch.randint(int(lengths[row]) - size + 1, (), generator=generator)) for row in rows]
        return torch.stack([padded[row, :, start : start + size] for row, start in zip(rows, starts, strict=True)])

    def autoencoder_loss() -> Tensor:
        wave = crops()
        features = codec.embed(wave).values.transpose(1, 2)
        return mel_distance(render(codec, features, wave), wave, codec.sample_rate)

    _descend(codec, autoencoder_loss, config.autoencoder_steps, config.lr, lambda s, v: report("autoencoder", s, v))

    codec.eval().requires_grad_(False)
    used = codec.fit_codebooks(padded, lengths, config.kmeans_iterations, generator).tolist()
    frames = sum(codec.code_length(int(length)) for length in lengths)
    possible = min(codec.config.codebook_size, frames)
    if min(used) < config.min_use * possible:
        raise UserError(
            f"The codec uses {used} codes of the {possible} that the clips can fill, so codes would mean little. Train "
            "it longer (codec_warmup.autoencoder_steps) or on more varied clips."
        )
    # Codes are settled now: only what turns them into sound still learns.
    for part in (codec.fc2, codec.acoustic_decoder):
        part.requires_grad_(True)

    def decoder_loss() -> Tensor:
        wave = crops()
        with torch.no_grad():
            features = codec.quantizer.decode(codec.encode(wave).audio_codes)
        return mel_distance(render(codec, features, wave), wave, codec.sample_rate)

    _descend(codec, decoder_loss, config.decoder_steps, config.lr, lambda s, v: report("decoder", s, v))
    codec.eval().requires_grad_(False)
    with torch.inference_mode():
        heard = codec(padded, lengths=lengths).audio_values
        distances = [
            float(mel_distance(ours[0, : int(n)], theirs[0, : int(n)], codec.sample_rate))
            for ours, theirs, n in zip(heard, padded, lengths.clamp(max=heard.shape[-1]), strict=True)
        ]
    return WarmupResult(used, possible, sum(distances) / len(distances))


def render(codec: Codec, features: Tensor, wave: Tensor) -> Tensor:
    """Features [B, T, C] to a waveform as long as `wave` [B, 1, L]."""
    sound = codec.acoustic_decoder(Ragged(codec.fc2(features).transpose(1, 2))).values
    return nn.functional.pad(sound, (0, max(0, wave.shape[-1] - sound.shape[-1])))[..., : wave.shape[-1]]


def _descend(codec: Codec, loss_of: Callable[[], Tensor], steps: int, lr: float, report: Callable) -> None:
    """AdamW with a cosine to zero on whatever of the codec requires a gradient."""
    weights = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
