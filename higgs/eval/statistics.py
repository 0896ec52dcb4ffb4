"""Means with intervals, and differences with p-values, all by the bootstrap (Efron & Tibshirani 1993).

Samples are what is drawn again, 10,000 times, with replacement, and always alike for one seed. Intervals are 95 %
percentile intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000
LEVEL = 0.95
AT_ONCE = 500  # resamples held in memory


@dataclass(frozen=True)
class Statistics:
    """Of `count` values; `low` and `high` bound the mean, and are None below two values."""

    count: int
    mean: float
    median: float
    std: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ratio:
    """A sum over a sum, as of errors over words; `low` and `high` bound it, and are None below two samples."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """Of `count` pairs: both means, the mean of b - a with its bounds, and the p-value of there being no difference."""

    count: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float


def summary_of(values: Sequence[float], seed: int = 0) -> Statistics:
    """Statistics of at least one finite value."""
    x = np.asarray(values, dtype=np.float64)
    low, high = interval((x,), lambda x, axis=-1: x.mean(axis), seed)
    return Statistics(len(x), float(x.mean()), float(np.median(x)), float(x.std()), low, high)


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Ratio:
    """Sum of numerators over sum of denominators (the word error rate of a whole corpus); a sample is drawn with both."""
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    low, high = interval((top, bottom), lambda t, b, axis=-1: t.sum(axis) / b.sum(axis), seed)
    return Ratio(float(top.sum() / bottom.sum()), low, high)


def interval(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int
) -> tuple[float | None, float | None]:
    if len(samples[0]) < 2:
        return None, None
    found = bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=AT_ONCE, vectorized=True, paired=True, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def paired(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Paired:
    """Compares two systems on the same samples; at least two pairs.

    The p-value is two-sided: the share of resamples of the differences, moved to mean zero, whose mean is at least as far
    from zero as the one that was found, (hits + 1) / (resamples + 1) (Davison & Hinkley 1997, section 4.4).
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    differences = y - x
    found = differences.mean()
    generator = np.random.default_rng(seed)
    means = np.concatenate([
        generator.choice(differences, (AT_ONCE, len(differences))).mean(1) for _ in range(RESAMPLES // AT_ONCE)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Rounding must not decide whether a resample is as far out as what was found.
    hits = int((np.abs(means - found) >= abs(found) * (1 - 1e-12) - 1e-15).sum())
    p = (hits + 1) / (RESAMPLES + 1)
    return Paired(len(x), float(x.mean()), float(y.mean()), float(found), float(low), float(high), float(p))
