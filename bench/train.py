"""Speed and memory of a full training step: forward, loss, backward, clipping and AdamW, in one run, side by side.

    python bench/train.py                       # CPU: beside transformers (4 M, 18 M), and DualFFN beside a dense decoder
    python bench/train.py --only full --rows 4 --checkpointing selective   # a GPU: MFU of the released shape, FSDP2

The batch is what the processor makes of spoken sentences: a system prompt and the text, then the reply's delayed frames,
rows of different length padded on the right, labels on the reply alone. Both sides have the same weights, batch, clipping
and AdamW; they alternate, and the best of `--repeats` steps counts, because these machines are noisy. Peak memory is that
of a process of its own above what it held after its imports (on a GPU, torch.cuda.max_memory_allocated).
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode import shape
from torch import Tensor, nn

from higgs.checkpoint.io import reset_buffers
from higgs.checkpoint.meta import on_meta
from higgs.delay import wrap_and_delay
from higgs.labels import audio_labels
from higgs.model import DualFFNDecoder, HiggsAudioV2Config
from higgs.train.distributed import start, stop
from higgs.train.flops import TokenCounts, peak_flops, training_flops
from higgs.train.lm import LossSums
from higgs.train.parallel import ParallelConfig, autocast, clip_gradients, parallelize

SYSTEM, TEXT, SECONDS = 30, (20, 70), (3.0, 9.0)  # tokens of a prompt, of a sentence, and how long it is spoken
FRAMES_PER_SECOND = 25


def make_batch(config: HiggsAudioV2Config, rows: int, even: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Sentences of random tokens and codes with the processor's layout, padding and labels; `even`: all equally long."""
    generator = torch.Generator().manual_seed(seed)
    words = config.vocab_size - 8
    texts, clips = [], []
    for row in range(rows):
        through = 0.5 if even else row / max(1, rows - 1)
        text = round(TEXT[0] + through * (TEXT[1] - TEXT[0]))
        frames = round((SECONDS[0] + through * (SECONDS[1] - SECONDS[0])) * FRAMES_PER_SECOND)
        texts.append(torch.randint(0, words, (SYSTEM + text,), generator=generator))
        codes = torch.randint(0, config.codebook_size - 2, (config.num_codebooks, frames), generator=generator)
        clips.append(wrap_and_delay(codes, config.audio_stream_bos_id, config.audio_stream_eos_id))
    ids, labels = [], []
    for text, clip in zip(texts, clips, strict=True):
        tail = config.num_codebooks - 1
        places = [config.audio_token_id] * (len(clip) - tail) + [config.audio_delay_token_id] * tail
        end = torch.tensor([config.eos_token_id])
        ids.append(torch.cat([text, torch.tensor([config.audio_bos_token_id, *places]), end]))
        label = torch.full_like(ids[-1], -100)
        label[len(text)], label[-1] = config.audio_bos_token_id, config.eos_token_id
        labels.append(label)
    pad = nn.utils.rnn.pad_sequence
    learnt = [audio_labels(clip, config.audio_stream_bos_id, config.audio_stream_eos_id) for clip in clips]
    return {
        "input_ids": pad(ids, True, config.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], True, 0),
        "labels": pad(labels, True, -100),
        "audio_input_ids": pad(clips, True, config.audio_stream_eos_id),
        "audio_input_ids_mask": pad([torch.ones(len(clip), dtype=torch.bool) for clip in clips], True, False),
        "audio_labels": pad(learnt, True, -100),
    }


def full_rows(config: HiggsAudioV2Config, rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of `length` tokens without padding or mask, a fifth text and one long clip: what packing comes to."""
    generator = torch.Generator().manual_seed(seed)
    text = length // 5
    ids = torch.randint(0, config.vocab_size - 8, (rows, length), generator=generator)
    ids[:, text - 1], ids[:, text:] = config.audio_bos_token_id, config.audio_token_id
    frames = torch.randint(
        0, config.codebook_size - 2, (rows, length - text, config.num_codebooks), generator=generator
    )
    return {
        "input_ids": ids,
        "labels": torch.full_like(ids, -100).index_fill(1, torch.tensor(text - 1), config.audio_bos_token_id),
        "audio_input_ids": frames,
        "audio_input_ids_mask": torch.ones(rows, length - text, dtype=torch.bool),
        "audio_labels": frames,
    }


@dataclass
class Side:
    """One of the two that are compared: what makes a loss of a batch, and the optimiser of its weights."""

    loss: Callable[[dict[str, Tensor]], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, module: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor]) -> Side:
        parameters = [p for p in module.parameters() if p.requires_grad]
        return cls(loss, parameters, torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True))

    def step(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        clip_gradients(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()


def make_side(kind: str, size: str) -> tuple[Side, HiggsAudioV2Config]:
    """`transformers`, `higgs` or `dense` of a size, all with weights from one seed (the first two: the same)."""
    torch.manual_seed(0)
    config = HiggsAudioV2Config(**shape(size), audio_ffn_layers="none" if kind == "dense" else None)
    if kind == "transformers":
        oracle = make_oracle(size)

        def theirs(batch: dict[str, Tensor]) -> Tensor:
            return oracle(**batch).loss

        return Side.of(oracle, theirs), config
    with on_meta():
        model = DualFFNDecoder(config, use_text_head=True)
    model.to_empty(device="cpu")
    reset_buffers(model, torch.device("cpu"))
    model.init_weights()
    model.train()
    sums = LossSums(model)

    def ours(batch: dict[str, Tensor]) -> Tensor:
        return mean_loss(sums(batch), batch)

    return Side.of(model, ours), config


def make_oracle(size: str) -> Any:
    """transformers' model, with the weights that ours has."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    oracle = transformers.HiggsAudioV2ForConditionalGeneration(
        transformers.HiggsAudioV2Config(**shape(size)), use_text_head=True
    )
    model = DualFFNDecoder(HiggsAudioV2Config(**shape(size)), use_text_head=True)
    torch.manual_seed(0)
    model.init_weights()
    oracle.load_state_dict(model.state_dict(), strict=True)
    return oracle.train()


def mean_loss(sums: tuple[Tensor, Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The sum over codebooks of their means, plus the text's mean, as transformers has it."""
    codebooks, text, _ = sums
    counts = (batch["audio_labels"] != -100).sum(dim=(0, 1))
    return (codebooks / counts).sum() + text / (batch["labels"][:, 1:] != -100).sum()


def peak_of(kind: str, size: str, rows: int, steps: int = 3) -> float:
    """Peak resident megabytes of a process that trains `steps` steps, above what it held after its imports."""
    command = [sys.executable, __file__, "--measure", kind, size, "--rows", str(rows), "--repeats", str(steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout.split()[-1])


def resident(field: str) -> float:
    """Megabytes of resident memory: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {field}")


def measure(kind: str, size: str, rows: int, steps: int) -> None:
    if kind == "transformers":
        import transformers.models.higgs_audio_v2.modeling_higgs_audio_v2  # noqa: F401
    before = resident("VmRSS")
    side, config = make_side(kind, size)
    batch = make_batch(config, rows)
    for _ in range(steps):
        side.step(batch)
    print(resident("VmHWM") - before)


def compare(first: str, second: str, size: str, rows: int, repeats: int, even: bool = False) -> None:
    """One line of the table: tokens/s of both, their ratio, their peak memory.

    The dense decoder, which does not tell padding from text, gets rows of one length.
    """
    sides = {kind: make_side(kind, size)[0] for kind in (first, second)}
    config = HiggsAudioV2Config(**shape(size))
    batch = make_batch(config, rows, even=even or "dense" in sides)
    tokens = int(batch["attention_mask"].sum())
    losses = {kind: side.step(batch) for kind, side in sides.items()}  # warms up as well
    best = dict.fromkeys(sides, float("inf"))
    # On one thread the process's own time is not disturbed by other jobs.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(repeats):
        for kind, side in sides.items():
            begun = clock()
            losses[kind] = side.step(batch)
            best[kind] = min(best[kind], clock() - begun)
    speed = {kind: tokens / seconds for kind, seconds in best.items()}
    memory = {kind: peak_of(kind, size, rows) for kind in sides}
    counts = TokenCounts.of(batch, config)
    used = training_flops(config, counts) / best[second] / peak_flops(torch.device("cpu"), torch.float32)
    same = "" if "dense" in sides or abs(losses[first] - losses[second]) < 1e-4 * losses[first] else " (losses differ)"
    print(
        f"| {size} | {first} | {second} | {speed[first]:.0f} | {speed[second]:.0f} | "
        f"{speed[second] / speed[first]:.2f}{same} | {memory[first]:.0f} | {memory[second]:.0f} | {used:.0%} |",
        flush=True,
    )


def utilisation(args: argparse.Namespace, device: str) -> None:
    """Full rows in bf16, weights float32: tokens/s, model FLOPs utilisation, peak memory. Under torchrun: of all GPUs."""
    world = start(device, args.strategy)
    torch.manual_seed(0)
    config = HiggsAudioV2Config(**shape(args.size))
    with torch.device(world.device):
        model = DualFFNDecoder(config, use_text_head=True)
    model.init_weights()
    parallel = ParallelConfig(args.strategy, activation_checkpointing=args.checkpointing, compile=args.compile)
    sums = LossSums(model.train())
    wrapped = parallelize(sums, model.model.layers, parallel, "bf16", world)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with autocast("bf16", world.device):
            return mean_loss(wrapped(batch), batch)

    side = Side.of(sums, loss)
    host = full_rows(config, args.rows, args.length)
    batch = {name: value.to(world.device) for name, value in host.items()}
    flops = training_flops(config, TokenCounts.of(host, config))
    gpu, best = world.device.type == "cuda", float("inf")
    for index in range(args.repeats + 3):  # the first ones compile, and measure what kernels to use
        begun = time.perf_counter()
        side.step(batch)
        if gpu:
            torch.cuda.synchronize()
        if index >= 3:
            best = min(best, time.perf_counter() - begun)
    peak = peak_flops(world.device, torch.bfloat16)
    used = "unknown" if peak is None else f"{flops / best / peak:.1%}"
    memory = torch.cuda.max_memory_allocated() / 1e9 if gpu else resident("VmHWM") / 1e3
    if world.main:
        print(
            f"| {args.size} | {args.strategy}, {world.size} | {args.rows} x {args.length} | {args.checkpointing} | "
            f"{args.compile} | {world.size * args.rows * args.length / best:.0f} | {used} | {memory:.1f} |",
            flush=True,
        )
    stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["4m", "18m"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--even", action="store_true", help="rows of one length, so that no side gains by padding")
    parser.add_argument("--length", type=int, default=2048, help="full: tokens of a row")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["transformers", "dense", "full"], default=None)
    parser.add_argument("--size", default="3b", help="full: which shape")
    parser.add_argument("--strategy", default="fsdp", help="full: none, ddp or fsdp")
    parser.add_argument("--checkpointing", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        measure(*args.measure, args.rows, args.repeats)
        return
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {args.threads} threads"
    print(f"torch {torch.__version__}, {machine}\n")
    if args.only == "full" or (gpu and args.only is None):
        print("| size | strategy, processes | rows | recomputation | compiled | tokens/s | MFU | peak memory, GB |")
        print("|---" * 8 + "|")
        utilisation(args, "cuda" if gpu else "cpu")
        return
    print("| size | A | B | A, tokens/s | B, tokens/s | B / A | A, peak MB | B, peak MB | B, of the CPU's peak |")
    print("|---" * 9 + "|")
    pairs = {"transformers": ("transformers", "higgs"), "dense": ("dense", "higgs")}
    for name, (first, second) in pairs.items():
        if args.only in (None, name):
            for size in args.sizes:
                compare(first, second, size, args.rows, args.repeats, args.even)


if __name__ == "__main__":
    main()
