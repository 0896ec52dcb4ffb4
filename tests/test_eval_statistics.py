"""Intervals hold what they promise, and p-values are small for what is there alone."""

import numpy as np
import pytest

from higgs.eval.statistics import paired, ratio_of_sums, summary_of


def test_means_of_known_values():
    found = summary_of([1.0, 2.0, 3.0, 10.0])
    assert (found.count, found.mean, found.median) == (4, 4.0, 2.5)
    assert found.std == pytest.approx(np.std([1, 2, 3, 10])) and 1 <= found.low < 4 < found.high <= 10


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert summary_of(values, 3) == summary_of(values, 3) != summary_of(values, 4)
    assert paired(values, values[::-1], 3) == paired(values, values[::-1], 3)


@pytest.mark.parametrize("values", [[0.0] * 5, [1.0] * 5, [0.0, 1.0], [0.25, 0.25]])
def test_shares_and_constants_have_sane_intervals(values: list[float]):
    found = summary_of(values)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_one_sample_has_no_interval():
    found = summary_of([0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    draws = [generator.exponential(size=40) for _ in range(200)]
    covered = sum(found.low <= 1 <= found.high for found in map(summary_of, draws))
    assert 0.87 <= covered / 200 <= 0.99  # 95 %, less what skewed data of this size cost, and chance


def test_a_corpus_counts_words_and_not_samples():
    found = ratio_of_sums([1, 0, 5], [10, 10, 5])
    assert found.value == 6 / 25 and found.low < found.value < found.high
    alike = ratio_of_sums([1, 2, 3], [10, 20, 30])
    assert alike.low == pytest.approx(0.1) == alike.high  # drawn together, the ratio never moves


def test_p_is_small_for_a_shift_and_even_without_one():
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(200, 30))
    without = [paired(np.zeros(30), row, seed=n).p for n, row in enumerate(noise[:120])]
    assert 0.01 <= np.mean(np.array(without) < 0.05) <= 0.12 and 0.4 < np.mean(without) < 0.6
    assert paired(np.zeros(30), noise[0] + 1.5).p < 0.001


def test_a_difference_has_a_sign_and_bounds():
    a = np.linspace(0, 1, 20)
    found = paired(a, a + 0.1 + 0.01 * np.sin(np.arange(20)))
    assert (
        found.difference == pytest.approx(found.mean_b - found.mean_a) and 0 < found.low < found.difference < found.high
    )
    same = paired(a, a)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
