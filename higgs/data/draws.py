"""Which sample comes next: sources mixed by weight, each in a new random order every epoch.

Everything here is a function of the seed and of how much was drawn, never of ranks or workers.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from higgs.errors import UserError


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.valid`: a manifest or a folder of codes. `weight` None: by its size."""

    path: str
    weight: float | None = None


@dataclass(frozen=True)
class Draw:
    """The sample that was drawn (numbered over all sources) and how many draws came before it."""

    number: int
    sample: int


def read_sources(value: Any, key: str = "data.train") -> list[Source]:
    """One path, one `{path, weight}` or a list of either -> sources.

    Weights are shares of the samples drawn, in any unit. Given for no source, every source weighs its size, so that
    all of them end their epochs together.

    Raises:
        UserError: the value has another form, a weight is not above 0, or only some sources have one.
    """
    entries = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    sources = []
    for entry in entries:
        if isinstance(entry, str) and entry:
            sources.append(Source(entry))
            continue
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str) or set(entry) - {"path", "weight"}:
            raise UserError(f"{key} holds {entry!r}; give a path, or a list of {{path: …, weight: …}}.")
        weight = entry.get("weight")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (number and 0 < weight < math.inf):
            raise UserError(f"{key}: the weight of {entry['path']} is {weight!r}; it must be a number above 0.")
        sources.append(Source(entry["path"], weight))
    if not sources:
        raise UserError(f"{key} is empty; give at least one manifest.")
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(f"{key}: some sources have a weight and some do not; give it to all or to none.")
    return sources


def random_generator(*key: int | str) -> torch.Generator:
    """A generator that depends on the key alone, the same on every machine and in every process."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=4).digest()  # torch's engine seeds with 32 bits
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Mixer:
    """Endless draws from several sources of `sizes` samples.

    The next source is the one furthest behind its share, so the mix is even at every point and needs no random numbers;
    a source's samples follow a permutation of each epoch that the seed, the source and the epoch decide.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> None:
        assert sizes and min(sizes) > 0 and len(sizes) == len(weights)
        self.sizes, self.seed = list(sizes), seed
        shares = [
            Fraction(size) if weight is None else Fraction(str(weight))
            for size, weight in zip(sizes, weights, strict=True)
        ]
        # Whole numbers, so that no rounding decides a tie.
        unit = math.lcm(*(share.denominator for share in shares))
        self.shares = [int(share * unit) for share in shares]
        self.first = [sum(self.sizes[:source]) for source in range(len(sizes))]
        self.counts = [0] * len(sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def drawn(self) -> int:
        return sum(self.counts)

    def next(self) -> Draw:
        number = self.drawn
        behind = [
            share * (number + 1) - count * sum(self.shares)
            for share, count in zip(self.shares, self.counts, strict=True)
        ]
        source = max(range(len(behind)), key=behind.__getitem__)
        epoch, place = divmod(self.counts[source], self.sizes[source])
        self.counts[source] += 1
        return Draw(number, self.first[source] + int(self._order(source, epoch)[place]))

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The permutation of a source in an epoch; the latest one is kept."""
        if source not in self._orders or self._orders[source][0] != epoch:
            generator = random_generator("order", self.seed, source, epoch)
            self._orders[source] = (epoch, torch.randperm(self.sizes[source], generator=generator).numpy())
        return self._orders[source][1]
