"""The random numbers behind sampling, and what is drawn with them."""

import pytest
import torch
from torch import Tensor

from higgs.generation import sampling
from higgs.generation.generator import row_seeds
from higgs.generation.sampling import draw, uniform


def test_uniform_numbers_are_uniform_and_independent():
    """Mean, spread, the largest gap to the straight line, and correlations along every way that draws differ."""
    seeds = row_seeds(0, 64, torch.device("cpu"))
    count = 64 * 8 * 1026
    streams = {
        (step, stream): uniform((64, 8, 1026), seeds, step, stream) for step, stream in ((0, 0), (1, 0), (0, 1), (2, 2))
    }
    for numbers in streams.values():
        assert numbers.min() > 0 and numbers.max() < 1
        assert abs(numbers.double().mean() - 0.5) < 4 / (12 * count) ** 0.5
        assert abs(numbers.double().var() - 1 / 12) < 4 / (180 * count) ** 0.5
        ordered = numbers.double().flatten().sort().values
        gap = (ordered - (torch.arange(count, dtype=torch.float64) + 0.5) / count).abs().max()
        assert gap < 1.95 / count**0.5  # Kolmogorov-Smirnov at 0.1 %
    base = streams[0, 0].double() - 0.5

    def related(other: Tensor, against: Tensor = base) -> float:
        return float((against * (other.double() - 0.5)).mean() * 12) * against.numel() ** 0.5

    for key in ((1, 0), (0, 1), (2, 2)):
        assert abs(related(streams[key])) < 4
    neighbours = streams[0, 0]
    assert abs(related(neighbours[1:], base[:-1])) < 4  # rows, whose seeds differ by one
    assert abs(related(neighbours[:, 1:], base[:, :-1])) < 4  # codebooks
    assert abs(related(neighbours[..., 1:], base[..., :-1])) < 4  # codes
    assert abs(related(streams[1, 0][:-1], base[1:])) < 4  # row i at step 1 beside row i+1 at step 0
    # Row i of one run and row 0 of a run whose seed is i greater are the same; far seeds are not.
    assert torch.equal(
        uniform((1, 4), torch.tensor([17]), 3, 0), uniform((3, 4), torch.tensor([16, 17, 18]), 3, 0)[1:2]
    )
    assert not torch.equal(uniform((1, 4), torch.tensor([1]), 0, 0), uniform((1, 4), torch.tensor([1 + 2**32]), 0, 0))
    # A step may be a number or a tensor.
    assert torch.equal(uniform((3, 5), seeds[:3], 9, 1), uniform((3, 5), seeds[:3], torch.tensor(9), 1))


def test_no_two_draws_share_their_numbers():
    """Over neighbouring seeds, steps and streams (codes, codes drawn again, text)."""
    drawn = {
        tuple(uniform((1, 4), torch.tensor([seed]), step, stream)[0].tolist())
        for seed in range(4)
        for step in range(6)
        for stream in range(3)
    }
    assert len(drawn) == 4 * 6 * 3


def test_draws_follow_the_softmax():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -float("inf"), 3.0, 1.5])
    rows, steps = 400, 50
    seeds = row_seeds(123, rows, torch.device("cpu"))
    counts = torch.zeros(8)
    for step in range(steps):
        counts += torch.bincount(draw(scores.expand(rows, 2, 8), seeds, step, 0).flatten(), minlength=8)
    expected = scores.softmax(-1) * rows * 2 * steps
    assert counts[5] == 0
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 22.5, f"{chi_square:.1f} with 6 degrees of freedom is beyond 0.1 %"


def test_the_largest_number_is_below_one(monkeypatch):
    """At 1 the Gumbel number would be infinite and win over every score, a forbidden one included."""
    monkeypatch.setattr(sampling, "_mix", lambda x: torch.full_like(x, 0xFFFFFFFF))
    assert (uniform((2, 3), torch.tensor([0, 1]), 0, 0) < 1).all()
    scores = torch.tensor([[-float("inf"), 0.0, -float("inf")]])
    assert draw(scores, torch.tensor([0]), 0, 0).tolist() == [1]
    monkeypatch.setattr(sampling, "_mix", torch.zeros_like)
    assert (uniform((2, 3), torch.tensor([0, 1]), 0, 0) > 0).all()


def test_the_largest_bits_stay_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of exactly 1 would make an infinite Gumbel number, which beats any score and turns -inf into NaN."""
    for bits in (0, 0xFFFFFFFF):
        monkeypatch.setattr(sampling, "_mix", lambda x, bits=bits: torch.full_like(x, bits))
        numbers = uniform((2, 3), torch.tensor([0, 1]), 0, 0)
        assert bool(((numbers > 0) & (numbers < 1)).all())


def test_a_forbidden_code_is_never_drawn() -> None:
    scores = torch.full((64, 8, 1026), float("-inf"))
    scores[..., 3] = 0.0
    seeds = torch.arange(64)
    for step in range(40):
        assert bool((draw(scores, seeds, step, 0) == 3).all())
