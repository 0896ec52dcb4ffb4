"""The optimiser, its schedules and the moving average of the weights, with their state as plain named tensors."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from higgs.errors import UserError

Named = Mapping[str, nn.Parameter]


@dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter, 2019) with a schedule.

    `cosine`: linear warm-up, then a cosine down to `final_lr_share` of `lr` at the last step. `wsd`: warm-up, constant
    rate, and a linear fall over the last `decay_share` of the steps (Hu et al., 2024, arXiv 2404.06395).
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 50
    final_lr_share: float = 0.1
    decay_share: float = 0.2
    clip_grad_norm: float = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd"):
            raise UserError(f"optim.schedule is '{self.schedule}'; use cosine or wsd.")


def make_optimizer(parameters: Named, config: OptimConfig, undecayed: Iterable[nn.Parameter] = ()) -> torch.optim.AdamW:
    """Weight decay acts on matrices; norms, biases and the `undecayed` are left alone. The state exists at once, so that
    a checkpoint can be read straight into it."""
    spared = {id(parameter) for parameter in undecayed}
    learnt = [p for p in parameters.values() if p.requires_grad]
    groups = [
        {"params": [p for p in learnt if p.dim() >= 2 and id(p) not in spared], "weight_decay": config.weight_decay},
        {"params": [p for p in learnt if p.dim() < 2 or id(p) in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("Every parameter is frozen, so there is nothing to train. Freeze less.")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)
    for parameter in learnt:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(prefix: str, parameters: Named, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The moments of every trained parameter, live, as `prefix.exp_avg.NAME` and `prefix.exp_avg_sq.NAME`."""
    return {
        f"{prefix}.{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in ("exp_avg", "exp_avg_sq")
    }


def updates_of(optimizer: torch.optim.AdamW) -> int:
    """How many updates an optimiser has made."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_updates(optimizer: torch.optim.AdamW, updates: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """The rate of step 0, 1, …"""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        through = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, through)))
    else:
        falling = max(1.0, config.decay_share * max_steps)
        share = min(1.0, max(0.0, (max_steps - step) / falling))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)


class Ema:
    """An exponential moving average of the trained parameters: average = decay · average + (1 − decay) · weights."""

    def __init__(self, parameters: Named, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"optim.ema_decay is {decay}; it must lie between 0 and 1, or be null for no average.")
        self.decay = decay
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].detach(), 1 - self.decay)

    def tensors(self, prefix: str = "ema") -> dict[str, Tensor]:
        return {f"{prefix}.{name}": average for name, average in self.averages.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            weights = self.parameters[name].detach()
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
