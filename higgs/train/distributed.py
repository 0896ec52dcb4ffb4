"""The processes of a run: who they are, and the few things that they do together.

With one process and no process group everything here is a no-op, so the loop reads the same for one CPU and many nodes.
"""

import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from higgs.checkpoint.io import pick_device
from higgs.errors import UserError

TIMEOUT = timedelta(minutes=30)  # a rank that prepares data lets the others wait


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest value over all ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """[N, ...] of every rank, N may differ -> all rows [sum of N, ...] in the order of ranks, on every rank."""
        if self.size == 1:
            return tensor
        rows = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        rows[self.rank] = len(tensor)
        counts = self.sum_(rows).tolist()
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def gather_json(self, value: Any) -> list[Any]:
        """The JSON-able values of all ranks in their order, on every rank."""
        text = json.dumps(value).encode()
        letters = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
        lengths = self.gather(torch.tensor([len(text)], device=self.device)).tolist()
        return [json.loads(bytes(part.tolist())) for part in self.gather(letters).split(lengths)]

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values for everybody, in place; returns the tensor."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(device: str = "auto", strategy: str = "none") -> World:
    """Joins the processes that torchrun started; alone, a process group is made where DDP or FSDP want one.

    Raises UserError where there are several processes but nothing that keeps their weights alike.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size > 1 and strategy == "none":
        raise UserError(
            f"torchrun started {size} processes, but parallel.strategy is none. Set parallel.strategy=ddp or =fsdp."
        )
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if under_torchrun() and strategy != "none":
        dist.init_process_group(backend, timeout=TIMEOUT)
    elif strategy != "none":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, chosen)


def stop() -> None:
    """Leaves the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
