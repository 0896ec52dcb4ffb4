"""The loop: read, step, log, validate, sample, save. It trains whatever is a `Task`, on one process or on many."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from higgs.data.stream import StepBatch, Stream
from higgs.errors import UserError
from higgs.folders import read_records, write_lines
from higgs.train.distributed import World
from higgs.train.flops import peak_flops
from higgs.train.state import Checkpoints
from higgs.train.task import StepResult, Task
from higgs.train.tracking import Tracker

UNREADABLE = "unreadable.jsonl"
PERFECT_STEPS = 10  # how many steps in a row must reach `stop_at_accuracy`: a single perfect one may be luck


@dataclass
class LoopConfig:
    """When the loop does what, in steps; None means never (a checkpoint is written at the end in any case).

    `max_nonfinite` steps in a row whose loss or gradient is not finite end the run. `stop_at_accuracy` ends it once
    that share of codes is predicted right ten steps in a row.
    """

    max_steps: int = 1000
    save_every: int | None = None
    valid_every: int | None = None
    sample_every: int | None = None
    max_nonfinite: int = 5
    stop_at_accuracy: float | None = None


@dataclass
class Progress:
    """What the loop itself must know to go on."""

    step: int = 0
    samples_seen: int = 0
    skipped: int = 0  # steps without an update, in all
    nonfinite: int = 0  # … and at a stretch
    perfect: int = 0
    unreadable: int = 0


class Preemption:
    """What SIGTERM does: while the loop trains it is noted, and the run saves and leaves; before and after, when files are
    made that a second start finds or makes anew, the process leaves at once. Either way it ends with status 0."""

    def __init__(self) -> None:
        self.asked = False
        self._training = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def training(self) -> Iterator[None]:
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def _note(self, *_: Any) -> None:
        self.asked = True
        if not self._training:
            raise SystemExit(0)


@dataclass
class Loop:
    """A run's parts, put together by higgs.train.run. `valid` gives one pass over the held-out data."""

    task: Task
    stream: Stream
    config: LoopConfig
    world: World
    run: Path
    checkpoints: Checkpoints
    tracker: Tracker | None  # rank 0 alone has one
    preemption: Preemption = field(default_factory=Preemption)
    precision: str = "fp32"
    valid: Callable[[], Iterable[StepBatch]] | None = None

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.fill = 1.0  # share of the last step's tokens that is no padding
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.peak = peak_flops(self.world.device, dtype)

    def restore(self, only: Path | None = None) -> bool:
        """Takes up the newest whole checkpoint (or `only`); False where there is none."""
        found = self.checkpoints.restore(self.task.tensors(), only)
        if found is None:
            return False
        _, scalars = found
        self.task.load_scalars(scalars["task"])
        self.stream.load_state_dict(scalars["stream"])
        self.progress = Progress(**scalars["progress"])
        if self.world.main:  # what is read again is reported again
            path = self.run / UNREADABLE
            write_lines(path, [row for row in read_records(path) if row["step"] <= self.progress.step])
        return True

    def fit(self) -> bool:
        """Trains to the end; False where SIGTERM cut it short (everything is saved then)."""
        first, config = self.progress.step, self.config
        bar = tqdm(total=config.max_steps, initial=first, desc="train", file=sys.stderr, disable=not self.world.main)
        with self.preemption.training(), bar:
            while self.progress.step < config.max_steps and self.progress.perfect < PERFECT_STEPS:
                self._step(bar)
                step = self.progress.step
                last = step == config.max_steps or self.progress.perfect >= PERFECT_STEPS
                if self._asked_to_leave() and not last:
                    self._save()
                    if self.world.main:
                        bar.write(
                            f"SIGTERM: the state after step {step} is saved; the same command goes on from there."
                        )
                    return False
                if self.valid is not None and (due(step, config.valid_every) or last):
                    self._validate(bar)
                if config.sample_every and (due(step, config.sample_every) or last):
                    self._sample()
                if last or due(step, config.save_every) or due(step, self.checkpoints.milestone_every):
                    self._save()
        return True

    def _asked_to_leave(self) -> bool:
        """Whether any rank was sent SIGTERM."""
        return bool(self.world.max_(torch.tensor(float(self.preemption.asked), device=self.world.device)))

    def _step(self, bar: tqdm) -> None:
        started = time.perf_counter()
        batch = next(self.stream)
        waited = time.perf_counter() - started
        result = self.task.train_step(batch, self.progress.step)
        self.progress.step += 1
        self.progress.samples_seen += batch.samples
        self._count(batch, result)
        if self.tracker is not None:
            seconds = time.perf_counter() - started
            row = self._row(result, seconds, waited)
            self.tracker.log(row)
            told = {"loss": row["loss"], "codes right": row.get("code_accuracy"), "tokens/s": row["tokens_per_s"]}
            told = ", ".join(f"{name} {value:.4g}" for name, value in told.items() if value is not None)
            bar.set_postfix_str(told, refresh=False)
            bar.update(1)
        self._check_finite(batch)

    def _count(self, batch: StepBatch, result: StepResult) -> None:
        """Keeps the tallies, and reports what could not be read and what could not be learnt from."""
        progress, goal = self.progress, self.config.stop_at_accuracy
        accurate = result.finite and goal is not None and result.metrics.get("code_accuracy", 0.0) >= goal
        progress.perfect = progress.perfect + 1 if accurate else 0
        sums = torch.tensor([len(batch.unreadable), batch.fill], dtype=torch.float32, device=self.world.device)
        lost, self.fill = self.world.sum_(sums).tolist()
        self.fill /= self.world.size
        if lost:
            progress.unreadable += int(lost)
            entries = self.world.gather_json([asdict(entry) for entry in batch.unreadable])
            self._report_unreadable([entry for part in entries for entry in part])
        progress.nonfinite = 0 if result.finite else progress.nonfinite + 1
        progress.skipped += not result.finite

    def _check_finite(self, batch: StepBatch) -> None:
        """Names the samples of a step that was skipped, and ends the run after several."""
        progress = self.progress
        if not progress.nonfinite:
            return
        ids = [name for part in self.world.gather_json(batch.ids) for name in part]
        named = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        if self.world.main:
            tqdm.write(f"step {progress.step}: loss or gradient is not finite; no update. Samples: {named}", sys.stderr)
        if progress.nonfinite >= self.config.max_nonfinite:
            raise UserError(
                f"{progress.nonfinite} steps in a row gave a loss or gradient that is not finite; the last, step "
                f"{progress.step}, read the samples {named}. Look at them, or lower optim.lr; the last checkpoint is from before."
            )

    def _report_unreadable(self, entries: list[dict[str, str]]) -> None:
        if not self.world.main:
            return
        with (self.run / UNREADABLE).open("a", encoding="utf-8") as log:
            for entry in entries:
                tqdm.write(f"unreadable: {entry['id']}: {entry['reason']}", sys.stderr)
                log.write(json.dumps({"step": self.progress.step, **entry}) + "\n")

    def _row(self, result: StepResult, seconds: float, waited: float) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        progress = self.progress
        rate = result.flops / seconds
        row = {
            "step": progress.step,
            "split": "train",
            **result.metrics,
            "tokens_per_s": result.tokens / seconds,
            "frames_per_s": result.frames / seconds,
            "mfu": None if not self.peak or not result.flops else rate / (self.peak * self.world.size),
            "data_wait_s": waited,
            "fill": self.fill,
            "step_s": seconds,
            "memory_gb": peak_memory_gb(self.world.device),
            "samples_seen": progress.samples_seen,
            "skipped": progress.skipped,
            "unreadable": progress.unreadable,
        }
        return finite_json(row)

    def _validate(self, bar: tqdm) -> None:
        assert self.valid is not None
        metrics = self.task.validate(self.valid())
        if self.tracker is not None:
            row = {"step": self.progress.step, "split": "valid", **metrics, "samples_seen": self.progress.samples_seen}
            self.tracker.log(finite_json(row))
            bar.write(f"step {self.progress.step}: {shown(metrics)}", file=sys.stderr)

    def _sample(self) -> None:
        files = self.task.write_samples(self.run / "samples", self.progress.step)
        if self.tracker is not None:
            self.tracker.samples(files, self.progress.step)

    def _save(self) -> None:
        scalars = {
            "task": self.task.scalars(),
            "stream": self.stream.state_dict(),
            "progress": asdict(self.progress),
        }
        self.checkpoints.save(self.progress.step, self.task.tensors(), scalars)


def shown(metrics: Mapping[str, Any]) -> str:
    """What validation found, for the console."""
    parts = [f"validation loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    parts += [
        f"mel distance at {rate} kbit/s {distance:.3f}" for rate, distance in metrics.get("mel_distance", {}).items()
    ]
    return ", ".join(parts)


def due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far: on the GPU, or resident in RAM (Linux counts in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def finite_json(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, list):
        return [finite_json(item) for item in value]
    if isinstance(value, dict):
        return {name: finite_json(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
