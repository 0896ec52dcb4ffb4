"""A tiny decoder trained by one or several gloo processes, under every way of spreading it.

Run as a module it is one of the processes: rank, size, a folder to meet in, and what to do.
Shapes: B batch, T tokens, F frames, K codebooks.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from decoder_cases import make_batch, make_ours
from torch import Tensor, nn

from higgs.model import DualFFNDecoder, decoder_loss
from higgs.train.distributed import World
from higgs.train.freeze import FreezeConfig, apply_freeze
from higgs.train.parallel import ParallelConfig, autocast, clip_gradients, full_tensor, parallelize, sync_gradients

# The third row has no audio at all, so with four processes one of them has no audio row.
ROWS = [[5, 3, 4], [9, 1, 2, 6, 3], [12], [3, 2, 1]]


@dataclass(frozen=True)
class Case:
    """How to train: the ways of higgs.train.parallel, micro-batches, what is frozen, the model's own changes."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: str = "fp32"
    accumulate: int = 1
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    model: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "ddp": Case(ParallelConfig("ddp")),
    "ddp, accumulated": Case(ParallelConfig("ddp"), accumulate=2),
    "ddp, full": Case(ParallelConfig("ddp", activation_checkpointing="full")),
    "fsdp": Case(ParallelConfig("fsdp")),
    "fsdp, accumulated": Case(ParallelConfig("fsdp"), accumulate=2),
    "fsdp, selective": Case(ParallelConfig("fsdp", activation_checkpointing="selective")),
    "fsdp, full": Case(ParallelConfig("fsdp", activation_checkpointing="full")),
    "fsdp, bf16": Case(ParallelConfig("fsdp"), precision="bf16"),
    "hsdp": Case(ParallelConfig("fsdp", replicate=2)),
    "hsdp, full": Case(ParallelConfig("fsdp", replicate=2, activation_checkpointing="full")),
    "fsdp, rows": Case(ParallelConfig("fsdp"), freeze=FreezeConfig(embedding_rows=61)),
    "hsdp, rows": Case(ParallelConfig("fsdp", replicate=2), freeze=FreezeConfig(embedding_rows=61)),
    "fsdp, backbone": Case(ParallelConfig("fsdp"), freeze=FreezeConfig(backbone=True)),
    "fsdp, compiled": Case(ParallelConfig("fsdp", activation_checkpointing="full", compile=True)),
    "fsdp, ablated": Case(
        ParallelConfig("fsdp", activation_checkpointing="full"),
        model={"audio_ffn_layers": [1], "audio_fast_forward": True, "audio_attention": True},
    ),
}


class Sums(nn.Module):
    """A stand-in for what the language model's task wraps: the decoder and its summed losses in one call."""

    def __init__(self, decoder: DualFFNDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in batch.items() if "labels" not in name}
        hidden = self.decoder.model(**inputs).last_hidden_state
        sums = decoder_loss(
            self.decoder,
            hidden,
            self.decoder.model.audio_placeholders(batch["input_ids"]),
            batch["labels"],
            batch["audio_labels"],
            batch["audio_input_ids_mask"],
        )
        return sums.codebook_sum, sums.text_sum


def labelled_batch(decoder: DualFFNDecoder) -> dict[str, Tensor]:
    batch = make_batch(decoder.config, ROWS, side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["audio_labels"] = batch["audio_input_ids"].masked_fill(~batch["audio_input_ids_mask"][..., None], -100)
    return batch


def mean_loss(sums: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Divided by the counts of the whole batch: what all processes share."""
    codebooks, text = sums
    return codebooks.sum() / (batch["audio_labels"][..., 0] != -100).sum() + text / (batch["labels"] != -100).sum()


def train(case: Case, world: World, steps: int = 2) -> dict[str, Any]:
    """Steps of AdamW with clipping on this process's rows; losses, norms, first gradients and last weights, whole."""
    decoder = make_ours(use_text_head=True, **case.model).train()
    batch, count = labelled_batch(decoder), len(ROWS) // (world.size * case.accumulate)
    frozen = apply_freeze(decoder, case.freeze)
    module = Sums(decoder)
    spread = parallelize(module, decoder.model.layers, case.parallel, case.precision, world)
    names = dict(module.named_parameters())
    learnt = [p for p in names.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-2, weight_decay=0.0 if case.freeze.embedding_rows else 0.1)
    out: dict[str, Any] = {"losses": [], "norms": [], "gradients": {}}
    for step in range(steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        for micro in range(case.accumulate):
            sync_gradients(spread, micro == case.accumulate - 1)
            first = (world.rank * case.accumulate + micro) * count
            own = {name: value[first : first + count] for name, value in batch.items()}
            with autocast(case.precision, world.device) if case.parallel.strategy != "fsdp" else nullcontext():
                loss = mean_loss(spread(own), batch)
            (loss * world.size).backward()
            total += loss.detach()
        frozen.mask_gradients()
        if step == 0:
            out["gradients"] = {n: full_tensor(p.grad).clone() for n, p in names.items() if p.grad is not None}
        out["norms"].append(clip_gradients(learnt, 1.0).item())
        out["losses"].append(world.sum_(total).item())
        optimizer.step()
    out["weights"] = {name: full_tensor(parameter.detach()).clone() for name, parameter in names.items()}
    return out


def spawn(size: int, cases: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Runs cases one after another in `size` processes, each case as a process group of all; rank 0's results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    commands = [[sys.executable, __file__, str(rank), str(size), str(folder), *cases] for rank in range(size)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return torch.load(folder / "results.pt", weights_only=True)


def main() -> None:
    rank, size, folder, cases = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    compile_as_it_is = torch.compile
    torch.compile = lambda function: compile_as_it_is(function, backend="aot_eager")  # the real one takes a minute here
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size)
    results = {name: train(CASES[name], World(rank, size)) for name in cases}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
