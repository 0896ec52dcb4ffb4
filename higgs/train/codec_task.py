"""Training of the codec: one generator step and one discriminator step on the same reconstruction.

    waveform -> Codec.reconstruct -> mel, commitment and semantic losses ─┐
                      └-> Discriminators -> adversarial, feature losses ──┴-> gradients, averaged over ranks
                                                                              -> AdamW, moving codebooks

Both gradients are taken at the same weights (the discriminators are not updated in between), so a step can be split
into micro-batches and ranks without changing what it computes. Codebooks move by what all ranks have seen, after the
step is known to be finite. All randomness of a step comes from (seed, step).

Shapes: B batch, L samples, T frames, K codebooks, N vectors, D width of the code space.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from higgs.checkpoint.io import save_codec
from higgs.codec import Codec
from higgs.codec.acoustic import add_weight_norm, remove_weight_norm
from higgs.codec.discriminators import DiscriminatorConfig, Discriminators, Verdict
from higgs.codec.losses import (
    LossConfig,
    MelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    semantic_loss,
)
from higgs.codec.model import Reconstruction
from higgs.codec.quantizer import CodeSums, code_sums, usage
from higgs.data.draws import random_generator
from higgs.data.stream import StepBatch
from higgs.errors import UserError
from higgs.plots import save_codec_trend
from higgs.train.codec_check import measure, rounded, training_flops, write_reconstructions
from higgs.train.codec_start import first_weights, has_codebooks
from higgs.train.distributed import World
from higgs.train.optim import (
    Ema,
    OptimConfig,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    set_rate,
)
from higgs.train.task import StepResult

LOSSES = (
    "loss",
    "mel_loss",
    "feature_loss",
    "adversarial_loss",
    "discriminator_loss",
    "commitment_loss",
    "semantic_loss",
)


@dataclass
class CodecTrainingConfig:
    """How the codec learns; its rate and schedule are those of `optim`."""

    teacher: str | None = None  # HuBERT: folder of the Hugging Face format, or file of torchaudio's; null: a random one
    quantizer_start: int = 0  # the step that fills the codebooks by k-means; until then nothing is quantized
    kmeans_iterations: int = 20
    codebook_decay: float = 0.99
    dead_below: float = 2.0  # a code with a smaller moving count (vectors a step) is replaced …
    replace_every: int = 1  # … looked for at every so-many-th step
    random_bandwidth: bool = True  # each step draws one of the codec's bandwidths; false: always all codebooks
    discriminator_start: int = 0  # the first step with discriminators
    discriminator_lr_share: float = 1.0  # of the codec's rate
    clip_discriminator_norm: float = 10.0
    valid_seconds: float = 5.0  # of each clip of the validation data
    num_samples: int = 2  # clips of the validation data that are written as sound and picture
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if not 0 < self.codebook_decay < 1:
            raise UserError(f"codec_training.codebook_decay is {self.codebook_decay}; it must lie between 0 and 1.")
        if self.replace_every < 1:
            raise UserError(f"codec_training.replace_every is {self.replace_every}; give 1 or more steps.")
        if self.discriminator_start < self.quantizer_start:
            raise UserError(
                f"codec_training.discriminator_start {self.discriminator_start} lies before quantizer_start "
                f"{self.quantizer_start}; discriminators judge quantized sound, so start them later."
            )


class CodecTask:
    """A codec, its discriminators and their optimisers (a `higgs.train.task.Task`).

    Args:
        codec: a trained one, or a fresh one, which gets its first weights (from the seed) and its teacher here. Weight
            norm is put on its acoustic convolutions. Afterwards it is `self.codec`.
        max_steps: the end of the learning rate's schedule.
        precision: `fp32`, or `bf16` for autocast.
    """

    def __init__(
        self,
        codec: Codec,
        config: CodecTrainingConfig,
        optim: OptimConfig,
        world: World,
        *,
        max_steps: int,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        self.config, self.optim, self.world = config, optim, world
        self.max_steps, self.seed = max_steps, seed
        self.bf16 = precision == "bf16"
        self.fitted = has_codebooks(codec)
        if not self.fitted:
            codec = first_weights(codec, config.teacher, seed, log=print if world.main else lambda line: None)
        self.codec = codec.to(world.device).train().requires_grad_(True)
        self.codec.semantic_model.requires_grad_(False)
        add_weight_norm(codec.acoustic_encoder, codec.acoustic_decoder)
        self.discriminators = Discriminators(config.discriminator)
        self.discriminators.init_weights(random_generator("discriminators", seed))
        self.discriminators.to(world.device, codec.dtype)
        self.mel_loss = MelLoss(config.loss.mel_windows, config.loss.mel_bands, codec.sample_rate).to(
            world.device, codec.dtype
        )
        self.weights = {name: p for name, p in codec.named_parameters() if p.requires_grad}
        self.critic_weights = dict(self.discriminators.named_parameters())
        self.optimizer = make_optimizer(self.weights, optim)
        self.critic_optimizer = make_optimizer(self.critic_weights, optim)
        self.ema = None if optim.ema_decay is None else Ema(self.weights, optim.ema_decay)
        self.step = 0  # steps taken
        self.flops: tuple[float, float] | None = None  # of a clip: codec, discriminators
        self.history: list[dict[str, Any]] = []  # what validation found, for the trend
        self.clips: Tensor | None = None  # [B, 1, L], to be written as samples: of the validation data if there is any

    # ------------------------------------------------------------------------------------------------ one step

    def train_step(self, batch: StepBatch, step: int) -> StepResult:
        self.codec.train()
        rate = learning_rate(step, self.max_steps, self.optim)
        set_rate(self.optimizer, rate)
        set_rate(self.critic_optimizer, rate * self.config.discriminator_lr_share)
        waves = [micro["waveform"].to(self.world.device) for micro in batch.micro]
        if self.clips is None:
            self.clips = waves[0][: self.config.num_samples]
        if self.flops is None:
            self.flops = training_flops(self.codec, self.discriminators, waves[0][:1])
        quantize = step >= self.config.quantizer_start or self.fitted
        if quantize and not self.fitted:
            self._fit_codebooks(waves, step)
        judged = step >= self.config.discriminator_start
        num_codebooks = self.num_codebooks_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.critic_optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(LOSSES), device=self.world.device)
        seen: CodeSums | None = None
        vectors, frames = [], 0
        for wave in waves:
            made, values = self._backward(wave, num_codebooks, quantize, judged, len(waves))
            losses += values
            frames += made.teacher.shape[0] * made.teacher.shape[-1]
            if made.quantized is not None:
                sums = code_sums(made.quantized, self.codec.config.codebook_size)
                seen = sums if seen is None else seen + sums
                vectors.append(made.quantized.vectors)
        losses = self.world.sum_(losses) / self.world.size
        norms = [self._average_gradients(self.weights), self._average_gradients(self.critic_weights)]
        finite = bool(torch.stack([*norms, losses.sum()]).isfinite().all())
        if finite:
            self._update(norms, judged)
            if seen is not None:
                self._move_codebooks(seen, vectors, step)
        self.step = step + 1
        metrics = dict(zip(LOSSES, losses.tolist(), strict=True))
        metrics |= {"lr": rate, "grad_norm": float(norms[0]), "discriminator_grad_norm": float(norms[1])}
        metrics["audio_seconds"] = batch.samples * waves[0].shape[-1] / self.codec.sample_rate
        metrics["codebooks"] = num_codebooks if quantize else 0
        if seen is not None:
            use, perplexity = usage(seen.counts)
            metrics |= {"codebook_use": rounded(use), "codebook_perplexity": rounded(perplexity)}
        frames = frames * self.world.size
        flops = batch.samples * (self.flops[0] + (self.flops[1] if judged else 0.0))
        return StepResult(metrics=metrics, finite=finite, tokens=frames, frames=frames, flops=flops)

    def num_codebooks_at(self, step: int) -> int:
        """How many codebooks a step uses, the same on all ranks."""
        bandwidths = self.codec.config.target_bandwidths
        if not self.config.random_bandwidth:
            return self.codec.num_codebooks
        choice = torch.randint(len(bandwidths), (), generator=random_generator("bandwidth", self.seed, step))
        return self.codec.config.num_codebooks_at(bandwidths[int(choice)])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16)

    def _backward(
        self, wave: Tensor, num_codebooks: int, quantize: bool, judged: bool, parts: int
    ) -> tuple[Reconstruction, Tensor]:
        """Adds the gradients of one of `parts` micro-batches [B, 1, L]; returns the losses in the order of LOSSES."""
        weight = self.config.loss
        with self._autocast():
            made = self.codec.reconstruct(wave, num_codebooks, quantize)
        sound = full(made.waveform)
        mel = self.mel_loss(sound, wave)
        semantic = semantic_loss(full(made.semantic), full(made.teacher))
        commitment = mel.new_zeros(()) if made.quantized is None else made.quantized.commitment.mean()
        loss = weight.mel_weight * mel + weight.semantic_weight * semantic + weight.commitment_weight * commitment
        feature = adversarial = critic = mel.new_zeros(())
        if not judged:
            (loss / parts).backward()
        else:
            heard = sound.detach().requires_grad_(True)
            with self._autocast():
                fake, real = self.discriminators(heard), self.discriminators(wave)
            critic = discriminator_loss(scores(real), scores(fake), weight.adversarial)
            (critic / parts).backward(inputs=list(self.critic_weights.values()), retain_graph=True)
            adversarial = adversarial_loss(scores(fake), weight.adversarial)
            feature = feature_loss([v.features for v in real], [v.features for v in fake])
            verdict = weight.adversarial_weight * adversarial + weight.feature_weight * feature
            (slope,) = torch.autograd.grad(verdict / parts, heard)
            torch.autograd.backward([loss / parts, sound], [None, slope])
            loss = loss + verdict
        values = (loss, mel, feature, adversarial, critic, commitment, semantic)
        return made, torch.stack([value.detach().float() for value in values]) / parts

    def _average_gradients(self, weights: Mapping[str, nn.Parameter]) -> Tensor:
        """Averages over ranks in one message; returns the norm. A weight that the step did not use has none on any
        rank, since all draw the same bandwidth."""
        gradients = [p.grad for p in weights.values() if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.world.device)
        if self.world.size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = self.world.sum_(flat) / self.world.size
            for gradient, values in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(values.view_as(gradient))
        return nn.utils.get_total_norm(gradients)

    def _update(self, norms: list[Tensor], judged: bool) -> None:
        nn.utils.clip_grads_with_norm_(self.weights.values(), self.optim.clip_grad_norm, norms[0])
        self.optimizer.step()
        if judged:
            nn.utils.clip_grads_with_norm_(self.critic_weights.values(), self.config.clip_discriminator_norm, norms[1])
            self.critic_optimizer.step()
        if self.ema is not None:
            self.ema.update()

    # -------------------------------------------------------------------------------------------- codebooks

    @torch.no_grad()
    def _fit_codebooks(self, waves: list[Tensor], step: int) -> None:
        """k-means on the features of the whole step, gathered over ranks."""
        with self._autocast():
            parts = [self.codec.embed(wave).values.transpose(1, 2).flatten(0, 1) for wave in waves]
        features = torch.cat([self.world.gather(full(part).contiguous()) for part in parts])
        if not features.isfinite().all():
            return  # the step will not be finite either, and is skipped; the next one fits
        share = len(features) / self.codec.config.codebook_size
        if self.config.dead_below >= share and self.world.main:
            warnings.warn(
                f"codec_training.dead_below is {self.config.dead_below:g}, but a step has only {share:.2g} vectors for each "
                "code, so most codes will be replaced again and again. Lower it well below that, or raise data.batch_size.",
                stacklevel=2,
            )
        generator = random_generator("kmeans", self.seed, step)
        self.codec.quantizer.fit(features, self.config.kmeans_iterations, generator)
        for buffer in self.codec.quantizer.buffers():
            self.world.broadcast_(buffer)
        self.fitted = True

    @torch.no_grad()
    def _move_codebooks(self, seen: CodeSums, vectors: list[Tensor], step: int) -> None:
        self.world.sum_(seen.counts)
        self.world.sum_(seen.sums)
        self.codec.quantizer.update_(seen, self.config.codebook_decay)
        if (step + 1) % self.config.replace_every == 0:
            # Gathered along the vectors, in the order of ranks within each micro-batch.
            gathered = torch.cat([self.world.gather(part.transpose(0, 1).contiguous()) for part in vectors])
            generator = random_generator("dead codes", self.seed, step)
            self.codec.quantizer.replace_(gathered.transpose(0, 1), self.config.dead_below, generator)

    # ------------------------------------------------------------------------------------------- validation

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The codec with its averaged weights (where there are any), in evaluation mode and without gradient."""
        self.codec.eval()
        with torch.no_grad(), self.ema.applied() if self.ema is not None else nullcontext():
            yield
        self.codec.train()

    def validate(self, batches: Iterable[StepBatch]) -> dict[str, Any]:
        """Mel distance at every bandwidth (kbit/s), and use and perplexity of every codebook, over all clips."""
        waves = (
            micro["waveform"].to(self.world.device) for batch in batches for micro in batch.micro if micro is not None
        )
        with self._averaged():
            found, clips = measure(self.codec, waves, self.world)
        self.clips = clips[: self.config.num_samples] if clips is not None else self.clips
        self.history.append({"step": self.step, **asdict(found)})
        return {"loss": list(found.mel_distance.values())[-1], **asdict(found)}  # with all codebooks

    def write_samples(self, folder: Path, step: int) -> list[Path]:
        """The original beside the reconstruction at every bandwidth, with pictures: of the validation data, or of the
        first batch where there is none."""
        if self.clips is None or not self.world.main:
            return []
        with self._averaged():
            return write_reconstructions(self.codec, self.clips, folder, f"step-{step:08d}")

    # ------------------------------------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"codec.{name}": tensor for name, tensor in self.codec.state_dict(keep_vars=True).items()}
        tensors |= {f"discriminators.{name}": tensor for name, tensor in self.critic_weights.items()}
        tensors |= optimizer_tensors("optim", self.weights, self.optimizer)
        tensors |= optimizer_tensors("discriminator_optim", self.critic_weights, self.critic_optimizer)
        return tensors | (self.ema.tensors() if self.ema is not None else {})

    def scalars(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "fitted": self.fitted,
            "history": copy.deepcopy(self.history),
            # Stages that a step leaves out are not updated, so counts differ between weights.
            "updates": update_counts(self.optimizer),
            "discriminator_updates": update_counts(self.critic_optimizer),
        }

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.step, self.fitted = scalars["step"], scalars["fitted"]
        self.history = copy.deepcopy(scalars["history"])
        for optimizer, name in ((self.optimizer, "updates"), (self.critic_optimizer, "discriminator_updates")):
            for state, count in zip(optimizer.state.values(), scalars[name], strict=True):
                state["step"].fill_(count)

    def export(self, folder: Path) -> None:
        """The codec without weight norm, as transformers' class reads it; beside the folder the trend of validation."""
        if not self.world.main:
            return
        # A copy by deepcopy would share the classes that hold weight norm, and lose it with its original.
        plain = Codec(self.codec.config)
        add_weight_norm(plain.acoustic_encoder, plain.acoustic_decoder)
        with self._averaged():
            plain.load_state_dict(self.codec.state_dict(), strict=True)
        remove_weight_norm(plain.acoustic_encoder, plain.acoustic_decoder)
        save_codec(plain, folder)
        self.save_trend(folder.parent / "trend.png")

    def save_trend(self, path: Path) -> None:
        """Draws validation's mel distance at every bandwidth and the use of the codebooks over the steps."""
        if self.history:
            save_codec_trend(path, self.history)


def scores(verdicts: list[Verdict]) -> list[Tensor]:
    return [full(verdict.scores) for verdict in verdicts]


def full(values: Tensor) -> Tensor:
    """What autocast made of half width, at full width."""
    return values.float() if values.element_size() < 4 else values


def update_counts(optimizer: torch.optim.AdamW) -> list[int]:
    """How often each weight has been updated."""
    return [int(state["step"]) for state in optimizer.state.values()]
