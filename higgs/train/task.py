"""What the loop asks of a task: the language model (higgs.train.lm) and the codec (higgs.train.codec_task) are two."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from higgs.data.stream import StepBatch


@dataclass
class StepResult:
    """What one optimiser step did, summed over ranks and micro-batches.

    `metrics` are JSON-able. `finite` is False where the loss or the gradient was not, and so nothing was updated; all
    ranks say the same. `tokens` are sequence positions (codec: frames), `frames` audio frames, `flops` floating-point
    operations.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    finite: bool = True
    tokens: int = 0
    frames: int = 0
    flops: float = 0.0


class Task(Protocol):
    """Networks, their optimisers and one step. Every method is called on all ranks at once."""

    def train_step(self, batch: StepBatch, step: int) -> StepResult:
        """Forward, backward and update; `step` counts from 0."""
        ...

    def validate(self, batches: Iterable[StepBatch]) -> dict[str, Any]:
        """JSON-able metrics over all batches, the same on every rank."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint must hold, live, under names that do not depend on the number of ranks."""
        ...

    def scalars(self) -> dict[str, Any]:
        """The rest of the state, JSON-able."""
        ...

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Takes `scalars` back, after the tensors have been filled."""
        ...

    def write_samples(self, folder: Path, step: int) -> list[Path]:
        """Sounds and pictures of what the networks make now; rank 0 writes and returns the files."""
        ...

    def export(self, folder: Path) -> None:
        """A checkpoint folder in the public format."""
        ...
