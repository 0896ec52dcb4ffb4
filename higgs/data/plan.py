"""Which samples share a row, and which rows share an optimiser step.

A plan counts rows over all ranks and knows sample numbers and lengths only, so every rank makes the same plans for
next to nothing and then loads its own rows.

    bucket   one sample a row; the samples of several steps are sorted by length together, so that a batch pads little
    pack     rows of `row_length` tokens, filled with as many whole samples as fit
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from higgs.data.draws import Draw, Mixer, random_generator
from higgs.errors import UserError

LOOK_AHEAD = 64  # samples that wait to be packed: 98 % of a row is filled with speech-like lengths, no more with 512


@dataclass(frozen=True)
class Plan:
    """The rows of one optimiser step over all ranks, and the draws that were too long for any row. Of the run so far:
    how many were drawn and skipped, and the planner's position."""

    rows: list[list[Draw]]
    skipped: list[Draw] = field(default_factory=list)
    total_drawn: int = 0
    total_skipped: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(len(row) for row in self.rows)


class Planner(Protocol):
    settings: dict[str, Any]  # what a position depends on: it means something else under other values

    def __next__(self) -> Plan: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BucketPlanner:
    """Rows of one sample. The samples of `window` steps are sorted by length, cut into steps, and the steps shuffled."""

    def __init__(self, mixer: Mixer, length: Callable[[int], int], batch_size: int, window: int, limit: int) -> None:
        self.mixer, self.length, self.batch_size, self.limit = mixer, length, batch_size, limit
        # A window longer than an epoch would bring copies of a sample together.
        self.window = max(1, min(window, sum(mixer.sizes) // batch_size))
        self.settings: dict[str, Any] = {"layout": "bucket", "row_length": limit}
        if self.window > 1:
            self.settings |= {"batch_size": batch_size, "bucket_batches": self.window}
        self._number = self._place = self._skipped = 0
        self._start = list(mixer.counts)  # the mixer's counts where the window begins
        self._steps: list[Plan] | None = None

    def __next__(self) -> Plan:
        if self._steps is None:
            self._steps = self._fill()
        step = self._steps[self._place]
        self._place += 1
        if self._place == len(self._steps):
            self._number, self._place, self._steps = self._number + 1, 0, None
            self._start = list(self.mixer.counts)
        return Plan(step.rows, step.skipped, self.mixer.drawn, self._skipped, self.state_dict())

    def _fill(self) -> list[Plan]:
        draws, skipped = [], []
        while len(draws) < self.window * self.batch_size:
            draw = self.mixer.next()
            (draws if self.length(draw.sample) <= self.limit else skipped).append(draw)
        self._skipped += len(skipped)
        if self.window > 1:
            draws.sort(key=lambda draw: (self.length(draw.sample), draw.number))
        order = torch.randperm(self.window, generator=random_generator("window", self.mixer.seed, self._number))
        steps = [draws[i * self.batch_size : (i + 1) * self.batch_size] for i in order.tolist()]
        return [Plan([[draw] for draw in step], [] if place else skipped) for place, step in enumerate(steps)]

    def state_dict(self) -> dict[str, Any]:
        # Inside a window its skipped samples have been handed out; on loading they are counted once more.
        again = sum(len(step.skipped) for step in self._steps or ())
        return {
            "counts": list(self._start),
            "window": self._number,
            "step": self._place,
            "skipped": self._skipped - again,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = list(state["counts"])
        self.mixer.counts = list(state["counts"])
        self._number, self._place, self._skipped = state["window"], state["step"], state["skipped"]
        self._steps = self._fill() if self._place else None


class PackPlanner:
    """Rows of several samples: the one that waits longest, then whichever of those waiting fills the rest best."""

    def __init__(self, mixer: Mixer, length: Callable[[int], int], batch_size: int, row_length: int) -> None:
        self.mixer, self.length, self.batch_size, self.row_length = mixer, length, batch_size, row_length
        # An epoch at most: copies of a sample would else wait together.
        self._waiting = Waiting(min(LOOK_AHEAD, sum(mixer.sizes)))
        self.settings: dict[str, Any] = {"layout": "pack", "row_length": row_length}
        self._skipped = 0

    def __next__(self) -> Plan:
        skipped: list[Draw] = []
        rows = [self._row(skipped) for _ in range(self.batch_size)]
        self._skipped += len(skipped)
        return Plan(rows, skipped, self.mixer.drawn, self._skipped, self.state_dict())

    def _row(self, skipped: list[Draw]) -> list[Draw]:
        row: list[Draw] = []
        room = self.row_length
        while True:
            while not self._waiting.full:
                draw = self.mixer.next()
                length = self.length(draw.sample)
                if length > self.row_length:
                    skipped.append(draw)
                else:
                    self._waiting.add(draw, length)
            draw = self._waiting.take(room, eldest=not row)
            if draw is None:
                return row
            row.append(draw)
            room -= self.length(draw.sample)

    def state_dict(self) -> dict[str, Any]:
        waiting = [[draw.number, draw.sample] for draw in self._waiting]
        return {"counts": list(self.mixer.counts), "waiting": waiting, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixer.counts = list(state["counts"])
        self._waiting = Waiting(self._waiting.size)
        for number, sample in state["waiting"]:
            self._waiting.add(Draw(number, sample), self.length(sample))
        self._skipped = state["skipped"]


class Waiting:
    """At most `size` samples that wait to be packed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._draws: dict[int, Draw] = {}  # by number, which is also their order
        self._by_length: list[tuple[int, int]] = []  # (length, -number), sorted: of equals the eldest is last

    @property
    def full(self) -> bool:
        return len(self._draws) >= self.size

    def __iter__(self) -> Iterator[Draw]:
        return iter(self._draws.values())

    def add(self, draw: Draw, length: int) -> None:
        assert not self._draws or draw.number > next(reversed(self._draws))
        self._draws[draw.number] = draw
        insort(self._by_length, (length, -draw.number))

    def take(self, room: int, eldest: bool) -> Draw | None:
        """The eldest of all, or the longest that fits into `room` tokens (None where none does)."""
        if eldest:
            number = next(iter(self._draws))
            place = next(i for i, (_, negative) in enumerate(self._by_length) if negative == -number)
        else:
            place = bisect_right(self._by_length, (room, 1)) - 1
            if place < 0:
                return None
        _, negative = self._by_length.pop(place)
        return self._draws.pop(-negative)


def every_sample(
    size: int, length: Callable[[int], int], batch_size: int, row_length: int | None, limit: int
) -> Iterator[Plan]:
    """Plans that hold every sample once: padded rows from long to short, or (with `row_length`) packed ones."""
    draws = [Draw(sample, sample) for sample in range(size)]
    skipped = [draw for draw in draws if length(draw.sample) > limit]
    waiting = [draw for draw in draws if length(draw.sample) <= limit]
    waiting.sort(key=lambda draw: -length(draw.sample))
    if not waiting:
        raise UserError(f"No sample is as short as {limit} tokens; raise data.row_length.")
    rows: list[list[Draw]] = []
    room: list[int] = []
    for draw in waiting:  # first fit, longest first
        size_of = length(draw.sample)
        place = None
        if row_length is not None:
            place = next((i for i in range(max(0, len(rows) - LOOK_AHEAD), len(rows)) if room[i] >= size_of), None)
        if place is None:
            rows.append([draw])
            room.append((row_length or size_of) - size_of)
        else:
            rows[place].append(draw)
            room[place] -= size_of
    for start in range(0, len(rows), batch_size):
        yield Plan(rows[start : start + batch_size], [] if start else skipped)
