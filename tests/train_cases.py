"""A training run small enough for tests: conversations that carry random codes, a random codec, `train.py` as a process."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from higgs import cli
from higgs.checkpoint.io import save_codec
from higgs.train.prepare import Parts
from higgs.train.run import TrainConfig, train

PROJECT = Path(__file__).resolve().parents[1]
WORDS = ["the", "sun", "rises", "in", "east", "and", "sets", "west", "while", "birds", "sing", "over", "quiet", "water"]
TINY = [
    "model=debug", "model.config.hidden_size=32", "model.config.intermediate_size=48", "model.config.head_dim=8",
    "model.config.num_hidden_layers=2", "tokenizer=debug", "device=cpu", "optim.warmup_steps=2", "data.batch_size=4",
    "data.row_length=512", "reproduce=false",
]  # fmt: skip


def write_manifest(path: Path, count: int = 12, codebooks: int = 8, codes: int = 128) -> Path:
    """Conversations of random words and random codes, of 3 to 20 frames."""
    chance = random.Random(0)
    lines = []
    for number in range(count):
        text = " ".join(chance.choices(WORDS, k=chance.randint(3, 9)))
        frames = chance.randint(3, 20)
        clip = [[chance.randrange(codes) for _ in range(frames)] for _ in range(codebooks)]
        messages = [
            {"role": "system", "content": "Generate audio following instruction."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": [{"type": "audio", "codes": clip}]},
        ]
        lines.append(json.dumps({"id": f"sample-{number:02d}", "messages": messages}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_codec(folder: Path, seed: int = 0) -> Path:
    """An untrained codec of configs/codec/debug.yaml with random codebooks."""
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        codec = cli.build(compose("train").codec)
    generator = torch.Generator().manual_seed(seed)
    codec.init_weights(generator)
    for stage in codec.quantizer.quantizers:
        codebook = stage.codebook
        codebook.assign_(torch.randn(codebook.embed.shape, generator=generator), torch.ones(len(codebook.embed)))
    save_codec(codec, folder)
    return folder


def arguments(run: Path, manifest: Path, codec: Path, *more: str) -> list[str]:
    """The overrides of a tiny language-model run; later ones win."""
    return [*TINY, f"run_dir={run}", f"data.train={manifest}", f"codec_path={codec}", *more]


def run_here(overrides: list[str]) -> Any:
    """A run in this process."""
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        config = compose("train", overrides)
    parts = Parts(
        codec=lambda: cli.build(config.codec),
        tokenizer=cli.build(config.tokenizer),
        model=lambda ids: cli.build(config.model, config=ids),
        chat=cli.build(config.chat),
    )
    return train(cli.to_dataclass(TrainConfig, config), parts, overrides).matches


def start(overrides: list[str], processes: int = 1, port: int = 0) -> list[subprocess.Popen]:
    """`train.py` as a process, or as the processes of one run as torchrun would start them."""
    started = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [sys.executable, "train.py", *overrides], cwd=PROJECT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return started


def finish(processes: list[subprocess.Popen], code: int = 0) -> str:
    """Waits for all; returns what rank 0 wrote. Every process must end with `code`."""
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return "".join(outputs[0])


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log(run: Path) -> dict[int, dict[str, Any]]:
    """The training lines of metrics.jsonl by step; each step stands there once."""
    rows = [row for row in records(run) if row["split"] == "train"]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row for row in rows}


def losses(run: Path) -> dict[int, list[float]]:
    """What must not depend on how often a run was interrupted."""
    return {
        step: [row["loss"], row["text_loss"], *row["codebook_loss"], row["grad_norm"], row["lr"]]
        for step, row in log(run).items()
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_step(run: Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Returns once these processes have logged `step`; fails where the run ends before."""
    before = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").is_file() else 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = run / "metrics.jsonl"
        if log.is_file() and log.stat().st_mtime_ns > before and log.read_text().count("\n") >= step:
            return
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.002)
    raise AssertionError("the run did not get to that step in time")


def kill_at(step: int, run: Path, overrides: list[str], processes: int = 1, port: int = 0) -> None:
    started = start(overrides, processes, port)
    wait_for_step(run, step, started)
    for process in started:
        process.send_signal(signal.SIGKILL)
    for process in started:
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def newest(run: Path) -> Path:
    """The last checkpoint."""
    return sorted((run / "checkpoints").iterdir())[-1]
