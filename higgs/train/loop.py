"""The training step of the decoder and the loop around it (one process).

Shapes: B batch, T tokens, F frames, K codebooks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from higgs.batch import BatchFeature
from higgs.model import DualFFNDecoder, LossSums, decoder_loss


@dataclass
class OptimConfig:
    """AdamW with weight decay on matrices, linear warm-up and a cosine down to `final_lr_share` of `lr`."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 50
    final_lr_share: float = 0.1
    clip_grad_norm: float = 1.0
    text_weight: float = 1.0
    # Weight of each codebook's mean loss; null sums them, as transformers does; 1/K each averages, as the original does.
    codebook_weights: list[float] | None = None


@dataclass
class StepMetrics:
    """One step: losses before the update, the gradient's norm, and the share of codes that were predicted right."""

    step: int
    loss: float
    text_loss: float | None
    audio_loss: float
    codebook_loss: list[float]
    code_accuracy: float
    lr: float
    grad_norm: float


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay acts on matrices; norms and biases are left alone."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), fused=True)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The rate of step 0, 1, …: linear warm-up, then a cosine (Loshchilov and Hutter, 2017)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    through = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, through)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def batch_loss(model: DualFFNDecoder, batch: BatchFeature) -> LossSums:
    """Forward pass and loss sums of a labelled batch from the processor."""
    hidden = model.model(
        input_ids=batch["input_ids"],
        audio_input_ids=batch.get("audio_input_ids"),
        attention_mask=batch["attention_mask"],
        audio_input_ids_mask=batch.get("audio_input_ids_mask"),
    ).last_hidden_state
    placeholders = model.model.audio_placeholders(batch["input_ids"])
    return decoder_loss(
        model, hidden, placeholders, batch["labels"], batch.get("audio_labels"), batch.get("audio_input_ids_mask")
    )


def train_decoder(
    model: DualFFNDecoder,
    batches: Iterator[BatchFeature],
    max_steps: int,
    config: OptimConfig,
    report: Callable[[StepMetrics], bool],
) -> None:
    """Trains in place for `max_steps`, or until `report`, called after every step, returns True."""
    optimizer = make_optimizer(model, config)
    weights = None if config.codebook_weights is None else torch.tensor(config.codebook_weights, device=model.device)
    model.train()
    for step in range(max_steps):
        rate = learning_rate(step, max_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = batch_loss(model, next(batches).to(model.device))
        loss = sums.loss(weights, config.text_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        codebooks = sums.codebook_loss.detach()
        metrics = StepMetrics(
            step=step + 1,
            loss=float(loss.detach()),
            text_loss=None if sums.text_loss is None else float(sums.text_loss.detach()),
            audio_loss=float(codebooks.mean()),
            codebook_loss=[round(value, 6) for value in codebooks.tolist()],
            code_accuracy=float(sums.codebook_right.sum() / sums.codebook_count.sum()),
            lr=rate,
            grad_norm=float(norm),
        )
        if report(metrics):
            break
    model.eval()
