"""The subcommand `higgs tokenize`: arguments, processes and the progress bar around `higgs.data.tokenize`."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from higgs.checkpoint.io import load_codec
from higgs.data.manifest import read_manifest
from higgs.data.tokenize import TokenizeConfig, TokenizeResult, tokenize
from higgs.errors import UserError

MOST_PROCESSES = 8  # started unasked; each holds a codec
POLL = 0.2  # seconds


def add_command(commands: Any) -> None:
    defaults = {entry.name: entry.default for entry in fields(TokenizeConfig)}
    parser = commands.add_parser(
        "tokenize",
        help="code the audio of a conversation manifest into shards to train from",
        description="Codes the audio of a conversation manifest into a folder of shards with checksums. Killed at any "
        "moment and started again, it goes on. Processes, or the ranks of torchrun, share the work; the bytes are the "
        "same for any number of them on one kind of device.",
    )
    parser.add_argument("manifest", type=Path, help="JSONL, one conversation a line")
    parser.add_argument("out", type=Path, help="folder for the codes; one manifest and one codec a folder")
    parser.add_argument("--codec", required=True, help="folder or hub id of the codec's checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto (default: %(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        help=f"processes (default: one per GPU, or per CPU core up to {MOST_PROCESSES}; under torchrun its ranks)",
    )
    parser.add_argument(
        "--shard-samples",
        type=int,
        default=defaults["shard_samples"],
        help="conversations a shard, the piece of work that a killed run loses at most (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-seconds",
        type=float,
        default=defaults["batch_seconds"],
        help="sound coded at a time, padding counted (default: %(default)s)",
    )
    parser.add_argument(
        "--max-unreadable",
        type=float,
        default=defaults["max_unreadable"],
        help="stop when more than this share of the samples cannot be read (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    config = TokenizeConfig(options.shard_samples, options.batch_seconds, options.max_unreadable)
    samples = len(read_manifest(options.manifest))
    shards = -(-samples // config.shard_samples)
    if "WORLD_SIZE" in os.environ:  # torchrun
        if options.processes is not None:
            raise UserError("Under torchrun its ranks share the work; leave --processes out.")
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if options.device == "cuda" else options.device
        mine = sum(min(config.shard_samples, samples - n * config.shard_samples) for n in range(rank, shards, size))
        with progress(mine, f"rank {rank}", shown=rank == 0) as bar:
            summary(work(options, config, device, rank, size, bar.update))
        return
    processes = min(options.processes or default_processes(options.device), shards)
    if processes < 1:
        raise UserError(f"--processes is {options.processes}; it must be at least 1.")
    with progress(samples, "tokenize") as bar:
        if processes > 1:
            run_processes(options, config, processes, bar.update)
            # Everything is coded: this finds it whole and writes the index.
            result = work(options, config, device_of(options.device, 0), 0, 1, lambda samples: None)
        else:
            result = work(options, config, options.device, 0, 1, bar.update)
    summary(result)


def progress(total: int, name: str, shown: bool = True) -> tqdm:
    return tqdm(total=total, desc=name, unit="sample", file=sys.stderr, disable=not shown)


def default_processes(device: str) -> int:
    if device in ("cuda", "auto") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(os.cpu_count() or 1, MOST_PROCESSES) if device in ("cpu", "auto") else 1


def device_of(device: str, rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}" if device in ("cuda", "auto") and torch.cuda.is_available() else device


def work(
    options: argparse.Namespace,
    config: TokenizeConfig,
    device: str,
    rank: int,
    size: int,
    report: Callable[[int], None],
) -> TokenizeResult:
    # One thread a process: sums over another number of threads may round differently, and codes then differ.
    torch.set_num_threads(1)
    codec = load_codec(options.codec, device)
    return tokenize(
        options.manifest, options.out, codec, config, rank=rank, size=size, report=report,
        log=lambda line: tqdm.write(line, file=sys.stderr),
    )  # fmt: skip


def run_processes(
    options: argparse.Namespace, config: TokenizeConfig, size: int, report: Callable[[int], None]
) -> None:
    """Starts `size` processes and waits for them. The first that fails ends the others."""
    context = get_context("spawn")  # a forked process could not use a GPU
    done, messages = context.Value("q", 0), context.SimpleQueue()
    options = argparse.Namespace(**{key: value for key, value in vars(options).items() if key != "run"})
    workers = [
        context.Process(target=run_rank, args=(options, config, rank, size, done, messages, os.getpid()))
        for rank in range(size)
    ]
    try:
        for worker in workers:
            worker.start()
        shown = 0
        while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
            time.sleep(POLL)
            shown, before = done.value, shown
            report(shown - before)
        report(done.value - shown)
    finally:
        for worker in workers:
            if worker.is_alive() and any(worker.exitcode for worker in workers) or sys.exc_info()[0]:
                worker.terminate()
            worker.join()
    if not messages.empty():
        raise UserError(messages.get())
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise RuntimeError(f"a process ended with status {failed[0]}; its own message stands above")


def run_rank(
    options: argparse.Namespace, config: TokenizeConfig, rank: int, size: int, done: Any, messages: Any, parent: int
) -> None:
    """The body of a process."""

    def report(samples: int) -> None:
        with done.get_lock():
            done.value += samples
        if os.getppid() != parent:  # it was killed, and a new run may be at work
            sys.exit(1)

    try:
        work(options, config, device_of(options.device, rank), rank, size, report)
    except UserError as error:
        messages.put(str(error))
        sys.exit(2)


def summary(result: TokenizeResult) -> None:
    state = "complete" if result.complete else "not complete yet: other ranks are at work"
    print(f"{result.coded} samples coded, {result.kept} kept, {len(result.unreadable)} unreadable; {state}")
