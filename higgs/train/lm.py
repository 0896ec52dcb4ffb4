"""The language model as a task: one optimiser step, validation, samples and export.

    loss = Σ_k weight_k · (Σ cross-entropy of codebook k) / (its labels)  +  text weight · (Σ of text) / (its labels)

with sums and counts over all micro-batches of all ranks, so that the loss does not depend on how a step is split.

Shapes: B batch, T tokens, F frames, K codebooks.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from higgs.api import HiggsAudioV2ForConditionalGeneration
from higgs.audio import save_audio
from higgs.batch import BatchFeature
from higgs.checkpoint.io import reset_buffers
from higgs.checkpoint.meta import on_meta
from higgs.data.manifest import Sample
from higgs.data.stream import StepBatch
from higgs.errors import UserError
from higgs.inference import GenerationOptions, speak
from higgs.model.loss import decoder_loss, label_counts
from higgs.plots import save_speech_plot
from higgs.processor import HiggsAudioV2Processor
from higgs.train.distributed import World
from higgs.train.flops import TokenCounts, training_flops
from higgs.train.freeze import FreezeConfig, Frozen, apply_freeze
from higgs.train.optim import (
    Ema,
    OptimConfig,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    set_updates,
    updates_of,
)
from higgs.train.parallel import ParallelConfig, autocast, clip_gradients, forget_gathered, parallelize, sync_gradients
from higgs.train.task import StepResult


@dataclass
class LossConfig:
    """Weights of the losses' means.

    `codebooks` null sums over codebooks, as transformers does; 1/K each averages, as the original release does.
    """

    text: float = 1.0
    codebooks: list[float] | None = None


@dataclass
class Hearing:
    """What samples are made from during training: prompts, and how codes are chosen."""

    prompts: Sequence[Sample]
    generation: GenerationOptions


class LossSums(nn.Module):
    """The decoder with its loss in one call, which is what DDP and FSDP wrap."""

    def __init__(self, decoder: HiggsAudioV2ForConditionalGeneration) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A labelled batch -> summed cross-entropies of the codebooks [K] and of the text, and how many codes were
        predicted right [K]."""
        transformer = self.decoder.model
        hidden = transformer(
            input_ids=batch["input_ids"],
            audio_input_ids=batch["audio_input_ids"],
            audio_input_ids_mask=batch["audio_input_ids_mask"],
            attention_mask=batch.get("attention_mask"),
            position_ids=batch.get("position_ids"),
        ).last_hidden_state
        sums = decoder_loss(
            self.decoder,
            hidden,
            transformer.audio_placeholders(batch["input_ids"]),
            batch["labels"],
            batch["audio_labels"],
            batch["audio_input_ids_mask"],
        )
        text = hidden.new_zeros(()) if sums.text_sum is None else sums.text_sum
        return sums.codebook_sum, text, sums.codebook_right


class LanguageModelTask:
    """Trains a DualFFN decoder (a `higgs.train.task.Task`)."""

    def __init__(
        self,
        decoder: HiggsAudioV2ForConditionalGeneration,
        processor: HiggsAudioV2Processor,
        world: World,
        *,
        max_steps: int,
        optim: OptimConfig,
        loss: LossConfig | None = None,
        parallel: ParallelConfig | None = None,
        freeze: FreezeConfig | None = None,
        precision: str = "fp32",
        hearing: Hearing | None = None,
    ) -> None:
        """`decoder` has its first (or a checkpoint's) weights on rank 0; the other ranks' are overwritten.

        Raises UserError where weights of codebooks do not fit, or where tied tables would have to be sharded.
        """
        self.world, self.processor, self.hearing = world, processor, hearing
        self.max_steps, self.optim_config, self.precision = max_steps, optim, precision
        self.loss_config = loss or LossConfig()
        self.parallel = parallel or ParallelConfig()
        self.config = decoder.config
        self.frozen: Frozen = apply_freeze(decoder, freeze or FreezeConfig())
        self.decoder = decoder
        self.module = self._distribute(LossSums(decoder))
        self.parameters = dict(decoder.named_parameters())
        self.optimizer = make_optimizer(self.parameters, optim, undecayed=self.frozen.partly)
        self.ema = None if optim.ema_decay is None else Ema(self.parameters, optim.ema_decay)
        count = self.config.num_codebooks
        weights = [1.0] * count if self.loss_config.codebooks is None else self.loss_config.codebooks
        if len(weights) != count:
            raise UserError(
                f"loss.codebooks has {len(weights)} weights for {count} codebooks; give one for each, or null."
            )
        self.codebook_weights = torch.tensor(weights, device=world.device)

    def _distribute(self, module: LossSums) -> nn.Module:
        """On the device, and wrapped. Sharded weights come from rank 0, so that no other rank ever holds them whole."""
        layers, decoder = self.decoder.model.layers, self.decoder
        if self.parallel.strategy != "fsdp":
            return parallelize(module, layers, self.parallel, self.precision, self.world)
        if self.config.tie_word_embeddings and decoder.text_lm_head is not None:
            raise UserError(
                "FSDP would cut the tie of embedding and text head; set tie_word_embeddings=false, or use ddp."
            )
        whole = {name: p.detach() for name, p in decoder.named_parameters()} if self.world.main else {}
        decoder.to_empty(device="meta")
        wrapped = parallelize(module, layers, self.parallel, self.precision, self.world)
        wrapped.to_empty(device=self.world.device)
        reset_buffers(decoder, self.world.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.world.size > 1, strict=True)
        set_model_state_dict(decoder, whole, options=options)
        return wrapped

    # ------------------------------------------------------------------ the step

    def train_step(self, batch: StepBatch, step: int) -> StepResult:
        """One optimiser step over all micro-batches of all ranks."""
        rate = learning_rate(step, self.max_steps, self.optim_config)
        set_rate(self.optimizer, rate)
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        counts = self._counts(batch.micro)
        totals = torch.zeros(2 * self.config.num_codebooks + 1, device=self.world.device)
        for index, micro in enumerate(batch.micro):
            sync_gradients(self.module, index == len(batch.micro) - 1)
            codebooks, text, right = self._sums(micro)
            (self._combine(codebooks, text, counts) * self.world.size).backward()  # the wrappers average over ranks
            totals += torch.cat([codebooks.detach(), right.to(totals), text.detach()[None]])
        metrics = self._metrics(self.world.sum_(totals), counts)
        self.frozen.mask_gradients()
        norm = float(clip_gradients(self.parameters.values(), self.optim_config.clip_grad_norm))
        finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        done = self._done(batch.micro)
        flops = training_flops(self.config, done, self.decoder.text_lm_head is not None)
        return StepResult({**metrics, "lr": rate, "grad_norm": norm}, finite, done.tokens, done.audio, flops)

    def _counts(self, micro: Sequence[BatchFeature]) -> Tensor:
        """Labels of each codebook and of the text, over all ranks: [K + 1]."""
        own = torch.stack([label_counts(m["labels"], m["audio_labels"], m["audio_input_ids_mask"]) for m in micro])
        return self.world.sum_(own.sum(dim=0).to(self.world.device))

    def _done(self, micro: Sequence[BatchFeature]) -> TokenCounts:
        """What a step held over all ranks."""
        own = sum((TokenCounts.of(one, self.config) for one in micro), TokenCounts())
        every = torch.tensor(astuple(own), device=self.world.device)
        return TokenCounts(*(int(number) for number in self.world.sum_(every).tolist()))

    def _sums(self, micro: BatchFeature) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {name: value.to(self.world.device, non_blocking=True) for name, value in micro.items()}
        # FSDP casts the weights themselves.
        precision = "fp32" if self.parallel.strategy == "fsdp" else self.precision
        with autocast(precision, self.world.device):
            return self.module(inputs)

    def _combine(self, codebooks: Tensor, text: Tensor, counts: Tensor) -> Tensor:
        means = codebooks / counts[:-1].clamp(min=1)
        return (means * self.codebook_weights).sum() + self.loss_config.text * text / counts[-1].clamp(min=1)

    def _metrics(self, totals: Tensor, counts: Tensor) -> dict[str, Any]:
        count = self.config.num_codebooks
        codebooks, right, text = totals[:count], totals[count:-1], totals[-1]
        means = codebooks / counts[:-1].clamp(min=1)
        has_text = self.decoder.text_lm_head is not None
        return {
            "loss": float(self._combine(codebooks, text, counts)),
            "text_loss": float(text / counts[-1].clamp(min=1)) if has_text else None,
            "audio_loss": float(means.mean()),
            "codebook_loss": means.tolist(),
            "code_accuracy": float(right.sum() / counts[:-1].sum().clamp(min=1)),
        }

    # ------------------------------------------------------------------ beside the step

    @torch.no_grad()
    def validate(self, batches: Iterable[StepBatch]) -> dict[str, Any]:
        """The losses over all batches, with the averaged weights where there are any."""
        count = self.config.num_codebooks
        totals = torch.zeros(2 * count + 1, device=self.world.device)
        counts = torch.zeros(count + 1, dtype=torch.int64, device=self.world.device)
        self.module.eval()
        with self._averaged():
            for batch in batches:
                counts += self._counts(batch.micro)
                for micro in batch.micro:
                    codebooks, text, right = self._sums(micro)
                    totals += torch.cat([codebooks, right.to(totals), text[None]])
        return self._metrics(self.world.sum_(totals), counts)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        tensors |= optimizer_tensors("optim", self.parameters, self.optimizer)
        return tensors if self.ema is None else tensors | self.ema.tensors()

    def scalars(self) -> dict[str, Any]:
        return {"updates": updates_of(self.optimizer)}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        set_updates(self.optimizer, scalars["updates"])

    def write_samples(self, folder: Path, step: int) -> list[Path]:
        """What the model says to the prompts now: a sound and a picture each."""
        if self.hearing is None or not self.hearing.prompts:
            return []
        with self._whole() as model:
            if model is None:
                return []
            files = []
            with torch.random.fork_rng(devices=[]):
                spoken = speak(
                    model, self.processor, self.hearing.prompts, progress=False, **self.hearing.generation.given()
                )
                for speech in spoken:
                    if speech.waveform.numel():
                        path = folder / f"step-{step:08d}-{speech.name}.wav"
                        save_audio(path, speech.waveform, speech.sample_rate)
                        picture = path.with_suffix(".png")
                        save_speech_plot(picture, speech.waveform, speech.sample_rate, speech.codes)
                        files += [path, picture]
            return files

    def export(self, folder: Path) -> None:
        """A checkpoint for infer.py and for transformers, with tokenizer, chat template and codec."""
        with self._whole() as model:
            if model is not None:
                model.save_pretrained(folder)
                self.processor.save_pretrained(folder)
                if not self.config.is_released_architecture:
                    print("the export is of an ablation: infer.py computes it, transformers has no class that does")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        try:
            with nullcontext() if self.ema is None else self.ema.applied():
                yield
        finally:
            forget_gathered(self.module)

    @contextmanager
    def _whole(self) -> Iterator[HiggsAudioV2ForConditionalGeneration | None]:
        """The model in one piece on rank 0, in evaluation mode, with the averaged weights; None on other ranks."""
        with self._averaged():
            if self.parallel.strategy != "fsdp":
                self.decoder.eval()
                yield self.decoder if self.world.main else None
                return
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            # On one CPU rank these are the live tensors, which take their own values back when the averages go.
            state = {
                name: tensor.clone() for name, tensor in get_model_state_dict(self.decoder, options=options).items()
            }
        if not self.world.main:
            yield None
            return
        with on_meta():
            model = HiggsAudioV2ForConditionalGeneration(deepcopy(self.config), self.decoder.text_lm_head is not None)
        model.load_state_dict(state, strict=True, assign=True)
        reset_buffers(model, torch.device("cpu"))
        model.generation_config = self.decoder.generation_config
        yield model.eval()
