"""The subcommand `higgs tokenize`: arguments, processes and the progress bar around `higgs.data.tokenize`."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from higgs.checkpoint.io import load_codec
from higgs.codec import Codec
from higgs.data.manifest import Sample, read_manifest
from higgs.data.shards import CodeSource, finished_shard
from higgs.data.tokenize import TokenizeConfig, TokenizeResult, claim_folder, code_shards, code_source
from higgs.errors import UserError
from higgs.processes import POLL, available_cores, end_with

MOST_PROCESSES = 8  # started unasked; each holds a codec


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
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}; it must be at least 1.")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if size > 1 and options.processes is not None:
        raise UserError("Under torchrun its ranks share the work; leave --processes out.")
    # Everything that can be wrong is found before the processes start.
    job = Job.prepare(options, config, device_of(options.device, int(os.environ.get("LOCAL_RANK", 0))))
    shards = range(rank, job.source.num_shards, size)
    samples = sum(min(config.shard_samples, len(job.samples) - n * config.shard_samples) for n in shards)
    processes = 1 if size > 1 else min(options.processes or default_processes(options.device), len(shards))
    name = f"rank {rank}" if size > 1 else "tokenize"
    with tqdm(total=samples, desc=name, unit="sample", file=sys.stderr, disable=rank > 0) as bar:
        if processes > 1 and any(finished_shard(job.out, number) is None for number in shards):
            run_processes(options, config, processes, bar.update)
            result = job.work(0, 1, lambda samples: None)  # finds everything whole and writes the index
            result.coded, result.kept = result.kept, 0
        else:
            result = job.work(rank, size, bar.update)
    state = "complete" if result.complete else "not complete yet: other ranks are at work"
    print(f"{result.coded + result.kept} samples coded, {len(result.unreadable)} unreadable; {options.out} is {state}")


@dataclass
class Job:
    """Everything a process needs."""

    out: Path
    samples: list[Sample]
    source: CodeSource
    codec: Codec
    config: TokenizeConfig

    @classmethod
    def prepare(cls, options: argparse.Namespace, config: TokenizeConfig, device: str) -> "Job":
        # One thread a process: sums over another number of threads may round differently, and codes then differ.
        torch.set_num_threads(1)
        samples = read_manifest(options.manifest)
        codec = load_codec(options.codec, device)
        source = code_source(options.manifest, samples, codec, config)
        claim_folder(options.out, source)
        return cls(options.out, samples, source, codec, config)

    def work(self, rank: int, size: int, report: Callable[[int], None]) -> TokenizeResult:
        return code_shards(
            self.out, self.samples, self.source, self.codec, self.config, rank, size, report,
            log=lambda line: tqdm.write(line, file=sys.stderr),
        )  # fmt: skip


def default_processes(device: str) -> int:
    if device in ("cuda", "auto") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(available_cores(), MOST_PROCESSES) if device in ("cpu", "auto") else 1


def device_of(device: str, rank: int) -> str:
    """The device of a process: its share of the GPUs."""
    if device in ("cuda", "auto") and torch.cuda.is_available():
        return f"cuda:{rank % torch.cuda.device_count()}"
    return device


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
            count = done.value
            if count > shown:
                report(count - shown)
                shown = count
        report(done.value - shown)
    finally:
        for worker in workers:
            if worker.is_alive():  # after a failure of another, or an interruption
                worker.terminate()
            if worker.pid is not None:
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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    try:
        Job.prepare(options, config, device_of(options.device, rank)).work(rank, size, report)
    except UserError as error:
        messages.put(str(error))
        sys.exit(2)
