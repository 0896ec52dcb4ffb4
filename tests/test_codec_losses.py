"""Losses of the codec against cases worked by hand and a second, plainer implementation in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from higgs.audio import mel_filters
from higgs.codec.losses import (
    LossConfig,
    MelLoss,
    MelScale,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    mel_distance,
    semantic_loss,
)
from higgs.errors import UserError

RATE = 24000


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(0.1 * torch.randn(2, 1, 9600, generator=generator) for _ in range(2))


def triangles(bands: int, window: int) -> np.ndarray:
    """Mel filters [bins, M] on the HTK scale, each of area one (2 / its width in Hz)."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), bands + 2) / 2595) - 1)
    hertz = np.linspace(0, RATE / 2, window // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    shape = np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)).clip(0)
    return shape * 2 / (high - low)


def plain_log_mel(samples: np.ndarray, window: int, bands: int) -> np.ndarray:
    """Frame by frame; filters without a bin left out."""
    padded = np.pad(samples.astype(np.float64), window // 2, mode="reflect")
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(padded) - window + 1, window // 4)
    magnitudes = np.stack([np.abs(np.fft.rfft(taper * padded[s : s + window])) for s in starts])
    filters = triangles(bands, window)
    return np.log10(np.maximum(magnitudes @ filters[:, filters.sum(0) > 0], 1e-5)).T


@pytest.mark.parametrize(("window", "bands"), zip(LossConfig().mel_windows, LossConfig().mel_bands, strict=True))
def test_log_mel_is_that_of_numpy(pair: tuple[Tensor, Tensor], window: int, bands: int):
    found = MelScale(window, bands, RATE)(pair[0])
    for row, samples in zip(found, pair[0][:, 0].numpy(), strict=True):
        np.testing.assert_allclose(row.numpy(), plain_log_mel(samples, window, bands), atol=2e-4)


def test_filters_without_a_bin_are_dropped():
    dropped = {}
    for window, bands in ((32, 5), (64, 10), (256, 80), (2048, 320)):
        filters = mel_filters(bands, window, RATE)
        dropped[window] = int((filters.sum(0) == 0).sum())
        kept = MelScale(window, bands, RATE).filters
        assert kept.shape == (bands - dropped[window], window // 2 + 1) and bool((kept.sum(1) > 0).all())
    assert dropped[256] > 0 and dropped[2048] == 0


def test_the_mel_loss_sums_the_means_of_its_scales(pair: tuple[Tensor, Tensor]):
    ours, theirs = pair
    windows, bands = [64, 512], [10, 40]
    expected = 0.0
    for window, count in zip(windows, bands, strict=True):
        rows = [[plain_log_mel(x, window, count) for x in wave[:, 0].numpy()] for wave in pair]
        expected += np.mean([np.abs(a - b).mean() for a, b in zip(*rows, strict=True)])
    assert float(MelLoss(windows, bands, RATE)(ours, theirs)) == pytest.approx(expected, rel=1e-4)
    assert float(MelLoss(windows, bands, RATE)(ours, ours)) == 0


def test_ten_times_louder_is_a_distance_of_one_at_every_scale(pair: tuple[Tensor, Tensor]):
    loss = MelLoss([256, 1024], [20, 80], RATE)
    assert float(loss(10 * pair[0], pair[0])) == pytest.approx(2.0, rel=1e-4)
    assert float(mel_distance(10 * pair[0], pair[0], RATE)) == pytest.approx(1.0, abs=0.05)  # empty filters count as 0


def test_mean_over_halves_is_the_loss_of_the_whole(pair: tuple[Tensor, Tensor]):
    loss = MelLoss([64, 512], [10, 40], RATE)
    halves = [loss(pair[0][b : b + 1], pair[1][b : b + 1]) for b in range(2)]
    torch.testing.assert_close(sum(halves) / 2, loss(*pair))


def test_gradients_are_finite_on_silence():
    sound = torch.zeros(1, 1, 4800, requires_grad=True)
    MelLoss([32, 2048], [5, 320], RATE)(sound, 0.1 * torch.randn(1, 1, 4800)).backward()
    assert bool(sound.grad.isfinite().all())


def test_a_clip_shorter_than_half_a_window_is_measured():
    assert MelScale(2048, 80, RATE)(torch.randn(1, 1, 500)).isfinite().all()


def test_lsgan_and_hinge_by_hand():
    real, fake = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])], [torch.tensor([0.0, 1.0]), torch.tensor([-2.0])]
    # (0 + 1)/2 + (0 + 1)/2, then (1 - 2)² + (-2)²
    assert float(discriminator_loss(real, fake, "lsgan")) == pytest.approx(1 + 5)
    # (0 + 1)/2 + (1 + 2)/2, then 0 + 0
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(2)
    assert float(adversarial_loss(fake, "lsgan")) == pytest.approx((1 + 0) / 2 + 9)
    assert float(adversarial_loss(fake, "hinge")) == pytest.approx(-0.5 + 2)


def test_feature_matching_moves_only_the_generated_sound():
    real = [[torch.zeros(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)]]
    fake = [[torch.ones(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]]
    loss = feature_loss(real, fake)
    assert float(loss.detach()) == 2
    loss.backward()
    assert real[0][0].grad is None and fake[0][0].grad is not None


def test_semantic_loss_does_not_move_the_teacher():
    estimate, teacher = torch.zeros(1, 2, 3, requires_grad=True), torch.full((1, 2, 3), 2.0, requires_grad=True)
    loss = semantic_loss(estimate, teacher)
    loss.backward()
    assert float(loss.detach()) == 4 and teacher.grad is None
    torch.testing.assert_close(estimate.grad, torch.full((1, 2, 3), -4 / 6))


def test_unusable_settings_are_refused():
    with pytest.raises(UserError, match="equally many"):
        LossConfig(mel_windows=[32], mel_bands=[])
    with pytest.raises(UserError, match="wgan"):
        LossConfig(adversarial="wgan")


def test_the_weights_are_those_of_the_recipe():
    config = LossConfig()
    assert (config.mel_weight, config.feature_weight, config.adversarial_weight, config.commitment_weight) == (
        15,
        2,
        1,
        0.25,
    )
    assert config.mel_windows == [2**n for n in range(5, 12)] and config.mel_bands == [5 * 2**n for n in range(7)]
