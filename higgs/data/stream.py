"""Batches for training and validation: shuffled, mixed, split over ranks and loader processes, and resumable.

A step is planned over all ranks (`higgs.data.plan`); a rank then loads its own rows. What a step holds depends on the
seed alone, so a run can go on with another number of ranks, micro-batches or workers.

Shapes: B rows of a micro-batch, T tokens, F delayed frames, K codebooks, L samples.
"""

import atexit
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from higgs.batch import BatchFeature
from higgs.data.draws import Draw, Mixer
from higgs.data.plan import BucketPlanner, PackPlanner, Plan, Planner, every_sample
from higgs.errors import UserError
from higgs.labels import IGNORE

MIN_DRAWS = 20  # before the share of unreadable samples is judged
SIGTERM_GRACE = 60  # seconds that a loader process works on after SIGTERM
LAYOUTS = ("bucket", "pack")
# What a position depends on, and the config keys behind it.
ORIGIN = {
    "sizes": "data.train",
    "data": "data.train",
    "seed": "seed",
    "layout": "data.layout",
    "row_length": "data.row_length",
    "batch_size": "data.batch_size",
    "bucket_batches": "data.bucket_batches",
}


@dataclass
class DataConfig:
    """The keys of `data:`."""

    train: Any  # a path, or a list of {path, weight}: manifests, or folders made by `higgs tokenize`
    valid: Any = None  # the same; null: no validation
    batch_size: int = 16  # rows of one optimiser step, over all ranks and micro-batches
    layout: str = "bucket"  # language model: "bucket" pads samples of like length, "pack" fills rows with several
    row_length: int = 2048  # language model: tokens of a packed row; a longer sample is left out in either layout
    bucket_batches: int = 16  # language model, bucket: how many steps are sorted by length together
    crop_seconds: float = 1.0  # codec: length of a crop
    gain_db: float = 6.0  # codec: loudness is changed by up to this much either way, never into clipping
    workers: int = 0  # loader processes of each rank
    max_unreadable: float = 0.05  # the run stops when more than this share of the samples cannot be used

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"data.layout is {self.layout!r}; use one of {', '.join(LAYOUTS)}.")
        for name in ("batch_size", "row_length", "bucket_batches"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.workers < 0 or self.gain_db < 0 or not 0 <= self.max_unreadable <= 1 or self.crop_seconds <= 0:
            raise UserError(
                "data.workers and data.gain_db must not be negative, data.crop_seconds must be above 0 and "
                "data.max_unreadable between 0 and 1."
            )


@dataclass(frozen=True)
class Unreadable:
    """A sample that could not be used, and why."""

    id: str
    reason: str


@dataclass
class Rows:
    """Some rows as one batch (None where no sample of them could be used), the ids of their samples, and the samples
    that could not be used."""

    batch: BatchFeature | None
    ids: list[str]
    unreadable: list[Unreadable] = field(default_factory=list)


@dataclass
class StepBatch:
    """What one rank trains on in one optimiser step.

    micro: micro-batches on the CPU, one per accumulation step. Language model: `input_ids`, `labels` [B, T],
        `audio_input_ids`, `audio_labels` [B, F, K], `audio_input_ids_mask` [B, F] (F may be 0), and `attention_mask`
        [B, T] where padded or `position_ids` [B, T] where packed. Codec: `waveform` [B, 1, L].
    ids: of this rank's samples.
    samples: how many the step holds over all ranks.
    fill: share of this rank's tokens that are no padding (codec: 1).
    unreadable: what this rank could not use; each such sample is reported by one rank.
    """

    micro: list[BatchFeature]
    ids: list[str]
    samples: int
    fill: float = 1.0
    unreadable: list[Unreadable] = field(default_factory=list)


class Dataset(Protocol):
    """Samples of one or several sources, numbered one source after the other."""

    sizes: Sequence[int]  # of each source
    weights: Sequence[float | None]  # of each source; see `read_sources`
    digest: str  # changes with the samples
    in_tokens: bool  # whether samples have lengths to bucket or pack by; else `length` is 1

    def length(self, sample: int) -> int: ...
    def id(self, sample: int) -> str: ...

    def collate(self, rows: Sequence[Sequence[Draw]], seed: int | None, row_length: int | None) -> Rows:
        """Rows as one batch. `seed` decides what is random (None: validation, nothing is), together with the draws'
        numbers; `row_length` is the length of packed rows (None: one sample a row, padded)."""
        ...


class Stream:
    """An endless iterator of `StepBatch`.

    Args:
        seed: decides the order, the mix, and random crops.
        rank, size: this process among those that train together.
        accumulate: micro-batches of a step.

    Raises:
        UserError: the batch size does not divide; later, that more than `config.max_unreadable` of at least 20 samples
            could not be used. Samples that are too long are counted by all ranks alike; broken sound files by the rank
            that met them, so that one rank may raise alone (`torchrun` then ends the others).
    """

    def __init__(
        self, dataset: Dataset, config: DataConfig, *, seed: int, rank: int = 0, size: int = 1, accumulate: int = 1
    ) -> None:
        if config.batch_size % (size * accumulate):
            raise UserError(
                f"data.batch_size is {config.batch_size}, which does not divide into {size} ranks times {accumulate} "
                f"micro-batches; make it a multiple of {size * accumulate}."
            )
        check_lengths(dataset, config)
        mixer = Mixer(dataset.sizes, dataset.weights, seed)
        self._planner = make_planner(dataset, config, mixer)
        rows = config.batch_size // (size * accumulate)
        self._loader = Loader(dataset, config, seed, rank, size, accumulate, rows)
        self._config = config
        self._origin = {"seed": seed, "sizes": list(dataset.sizes), "data": dataset.digest, **self._planner.settings}
        assert self._origin.keys() <= ORIGIN.keys()
        self._state = self._planner.state_dict()
        self._loaded: Iterator[Loaded] | None = None
        self._read = self._failed = 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StepBatch:
        if self._loaded is None:
            self._loaded = self._loader.load(iter_plans(self._planner))
        loaded = next(self._loaded)
        self._check_unreadable(loaded)
        self._state = loaded.plan.state
        return loaded.batch

    def _check_unreadable(self, loaded: "Loaded") -> None:
        plan = loaded.plan
        self._read += len(loaded.batch.ids)
        self._failed += loaded.failed
        counts = ((plan.total_skipped, plan.total_drawn), (self._failed, self._read + self._failed))
        for failed, total in counts:
            if total >= MIN_DRAWS and failed > self._config.max_unreadable * total:
                last = loaded.batch.unreadable[-1:]
                reason = f" The last: {last[0].id}, {last[0].reason}" if last else ""
                raise UserError(
                    f"{failed} of {total} samples could not be used, more than data.max_unreadable="
                    f"{self._config.max_unreadable} allows.{reason}"
                )

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch handed out, as plain JSON; the same on every rank and for any number of
        ranks, micro-batches and workers."""
        return {"origin": self._origin, "planner": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; ranks, micro-batches, workers and weights may be others.

        Raises:
            UserError: the state is of other data, another seed or another layout, so that going on would repeat or leave
                out samples.
        """
        before, now = state["origin"], self._origin
        for name in ORIGIN:
            if before.get(name) == now.get(name):
                continue
            change = f"{ORIGIN[name]} was {before.get(name)} and is {now.get(name)}"
            if name in ("data", "sizes"):
                change = "data.train holds other samples"
            raise UserError(
                f"The saved position in the data does not fit: {change}. Resume with what the run began with, or start "
                "in another run_dir."
            )
        self._loaded = None
        self._planner.load_state_dict(state["planner"])
        self._state = state["planner"]


def once(
    dataset: Dataset, config: DataConfig, *, rank: int = 0, size: int = 1, accumulate: int = 1
) -> Iterator[StepBatch]:
    """Every sample once, in a fixed order (crops at fixed places, as loud as they are), one micro-batch at a time.

    Every rank gets the same number of micro-batches, of the size that training has: a rank for which no rows are left
    gets a copy in which every label is -100 (codec: no micro-batch at all).
    """
    check_lengths(dataset, config)
    rows = max(1, config.batch_size // (size * accumulate))
    loader = Loader(dataset, config, None, rank, size, 1, rows)
    plans = every_sample(sum(dataset.sizes), dataset.length, rows * size, loader.row_length, config.row_length)
    for loaded in loader.load(plans):
        yield loaded.batch


def check_lengths(dataset: Dataset, config: DataConfig) -> None:
    first = 0
    for number, size in enumerate(dataset.sizes):
        if all(dataset.length(sample) > config.row_length for sample in range(first, first + size)):
            raise UserError(
                f"Source {number} holds no sample of at most data.row_length={config.row_length} tokens; raise it."
            )
        first += size


def make_planner(dataset: Dataset, config: DataConfig, mixer: Mixer) -> Planner:
    if not dataset.in_tokens:
        return BucketPlanner(mixer, dataset.length, config.batch_size, 1, config.row_length)
    if config.layout == "pack":
        return PackPlanner(mixer, dataset.length, config.batch_size, config.row_length)
    return BucketPlanner(mixer, dataset.length, config.batch_size, config.bucket_batches, config.row_length)


def iter_plans(planner: Planner) -> Iterator[Plan]:
    while True:
        yield next(planner)


@dataclass
class Loaded:
    """A rank's batch of a plan, and how many sound files of it could not be read."""

    plan: Plan
    batch: StepBatch
    failed: int


class Loader:
    """Turns plans into the batches of one rank, here or in worker processes; both give the same.

    `rows` is the number of rows of a micro-batch. Micro-batch m of rank r takes the rows `m * size + r` as counted in
    micro-batches, so that ranks which wait for each other have rows of like length.
    """

    def __init__(
        self, dataset: Dataset, config: DataConfig, seed: int | None, rank: int, size: int, accumulate: int, rows: int
    ) -> None:
        self.dataset, self.seed, self.rank, self.size = dataset, seed, rank, size
        self.accumulate, self.rows, self.workers = accumulate, rows, config.workers
        self.row_length = config.row_length if dataset.in_tokens and config.layout == "pack" else None
        self.limit = config.row_length

    def load(self, plans: Iterable[Plan]) -> Iterator[Loaded]:
        found = self._in_processes(plans) if self.workers else map(self.__getitem__, plans)
        for loaded in found:
            if isinstance(loaded, UserError):
                raise loaded
            yield loaded

    def _in_processes(self, plans: Iterable[Plan]) -> Iterator[Loaded | UserError]:
        # Its own generator: DataLoader would else draw from the global one, which has to be the same after resuming.
        found = iter(
            DataLoader(
                self,
                None,
                sampler=plans,
                num_workers=self.workers,
                generator=torch.Generator(),
                worker_init_fn=outlive_signals,
            )
        )
        atexit.register(found._shutdown_workers)  # else, when an error ends the run, it waits for them to be terminated
        try:
            yield from found
        finally:
            found._shutdown_workers()
            atexit.unregister(found._shutdown_workers)

    def __getitem__(self, plan: Plan) -> Loaded | UserError:
        """A UserError is returned: raised in a worker, it would arrive as a page of traceback."""
        try:
            return self.materialise(plan)
        except UserError as error:
            return error

    def materialise(self, plan: Plan) -> Loaded:
        pieces = [plan.rows[start : start + self.rows] for start in range(0, len(plan.rows), self.rows)]
        mine = [pieces[number] for number in self._numbers() if number < len(pieces)]
        micro = [self.dataset.collate(rows, self.seed, self.row_length) for rows in mine]
        failed = [one for rows in micro for one in rows.unreadable]
        batches = [rows.batch for rows in micro if rows.batch is not None]
        if self.dataset.in_tokens and len(mine) < self.accumulate:  # validation has run out of rows
            batches.append(without_labels(self.dataset.collate(pieces[0], self.seed, self.row_length).batch))
        too_long = [
            Unreadable(
                self.dataset.id(draw.sample),
                f"{self.dataset.length(draw.sample)} tokens, over data.row_length={self.limit}",
            )
            for place, draw in enumerate(plan.skipped)
            if place % self.size == self.rank
        ]
        ids = [name for rows in micro for name in rows.ids]
        step = StepBatch(batches, ids, plan.samples, self._fill(mine, batches), too_long + failed)
        return Loaded(plan, step, len(failed))

    def _fill(self, rows: Sequence[Sequence[Sequence[Draw]]], batches: Sequence[BatchFeature]) -> float:
        if not self.dataset.in_tokens:
            return 1.0
        tokens = sum(self.dataset.length(draw.sample) for micro in rows for row in micro for draw in row)
        return tokens / sum(batch["input_ids"].numel() for batch in batches)

    def _numbers(self) -> range:
        """Which micro-batches of a step belong to this rank."""
        return range(self.rank, self.accumulate * self.size, self.size)


def outlive_signals(worker: int) -> None:
    """Makes a loader process leave the signals that a scheduler or a terminal sends to all processes to the main one,
    which needs its loaders for the step that it finishes before it saves. The main one ends them otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SIGTERM_GRACE))


def without_labels(batch: BatchFeature) -> BatchFeature:
    """The same batch with nothing to learn."""
    labels = {key: torch.full_like(batch[key], IGNORE) for key in ("labels", "audio_labels")}
    return BatchFeature({**batch, **labels})
