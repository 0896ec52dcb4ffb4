"""Discriminators: shapes by hand, who gets a gradient, that they can tell noise from a tone."""

import pytest
import torch
from torch import nn

from higgs.codec.discriminators import DiscriminatorConfig, Discriminators, PeriodDiscriminator, SpectrumDiscriminator
from higgs.codec.losses import discriminator_loss
from higgs.errors import UserError

TINY = {
    "periods": [2, 3],
    "period_widths": [4, 4, 4],
    "windows": [256],
    "bands": [[0.0, 0.5], [0.5, 1.0]],
    "band_width": 4,
}


def make(**change: object) -> Discriminators:
    critics = Discriminators(DiscriminatorConfig(**{**TINY, **change}))
    critics.init_weights(torch.Generator().manual_seed(0))
    return critics


def test_the_default_is_dacs():
    config = DiscriminatorConfig()
    with torch.device("meta"):
        critics = Discriminators(config).critics
    assert [critic.period for critic in critics[:5]] == [2, 3, 5, 7, 11]
    assert [len(critic.window) for critic in critics[5:]] == [2048, 1024, 512]
    kernels = [tuple(conv.weight.shape) for conv in [*critics[0].convs, critics[0].last]]
    assert kernels == [
        (32, 1, 5, 1), (128, 32, 5, 1), (512, 128, 5, 1), (1024, 512, 5, 1), (1024, 1024, 5, 1), (1, 1024, 3, 1)
    ]  # fmt: skip
    assert [conv.stride for conv in critics[0].convs] == [(3, 1)] * 4 + [(1, 1)]
    kernels = [tuple(conv.weight.shape) for conv in critics[5].bands[0]]
    assert kernels == [(32, 2, 3, 9), *[(32, 32, 3, 9)] * 3, (32, 32, 3, 3)]
    assert all(hasattr(module, "parametrizations") for module in critics.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("period", [2, 5, 11])
def test_a_period_lines_up(period: int):
    """Samples `period` apart never mix: a change of one sample changes the scores of its column alone."""
    critic = PeriodDiscriminator(period, [4, 4])
    wave = torch.randn(1, 1, 300)
    changed = wave.clone()
    changed[..., 140] += 1
    with torch.no_grad():
        before, after = critic(wave).scores, critic(changed).scores
    columns = (before != after).any(dim=2).flatten().nonzero().flatten().tolist()
    assert columns == [140 % period]
    rows = (300 + period - 1) // period
    assert before.shape == (1, 1, (rows + 2) // 3, period)


def test_every_band_has_its_bins():
    critic = SpectrumDiscriminator(512, DiscriminatorConfig().bands, 4)
    assert critic.bounds == [(0, 25), (25, 64), (64, 128), (128, 192), (192, 257)]
    spectrum = critic.spectrum(torch.sin(2 * torch.pi * 6000 * torch.arange(4800) / 24000)[None, None])
    assert spectrum.shape == (1, 2, 4800 // 128 + 1, 257)
    power = spectrum.square().sum(1)[0, 5:-5].mean(0)
    assert int(power.argmax()) == 128  # 6 kHz of 12
    verdict = critic(torch.randn(2, 1, 4800))
    assert len(verdict.features) == 25 and verdict.scores.shape[:2] == (2, 1)


def test_loudness_and_offset_do_not_count():
    critics, wave = make(), torch.randn(2, 1, 2400)
    for a, b in zip(critics(wave), critics(0.1 * wave + 0.3), strict=True):
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-3)
    assert all(verdict.scores.isfinite().all() for verdict in critics(torch.zeros(1, 1, 2400)))


def test_rows_are_judged_alone():
    critics, wave = make(), torch.randn(3, 1, 2400)
    whole = critics(wave)
    for row in range(3):
        for all_rows, one in zip(whole, critics(wave[row : row + 1]), strict=True):
            torch.testing.assert_close(all_rows.scores[row : row + 1], one.scores)


def test_gradients_reach_every_weight_and_the_sound():
    critics, wave = make(), torch.randn(1, 1, 2400, requires_grad=True)
    sum(verdict.scores.square().mean() for verdict in critics(wave)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critics.parameters())
    assert wave.grad.abs().sum() > 0


def test_they_learn_to_tell_a_tone_from_noise():
    critics = make()
    optimizer = torch.optim.AdamW(critics.parameters(), lr=3e-3, betas=(0.8, 0.99))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(25):
        pitch = 200 + 400 * torch.rand(4, 1, 1, generator=generator)
        tone = torch.sin(2 * torch.pi * pitch * torch.arange(2400) / 24000)
        noise = torch.randn(4, 1, 2400, generator=generator)
        real, fake = ([verdict.scores for verdict in critics(wave)] for wave in (tone, noise))
        loss = discriminator_loss(real, fake, "lsgan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_the_seed_decides_the_weights():
    for a, b in zip(make().parameters(), make().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"periods": [], "windows": []}, "neither"),
        ({"bands": [[0.5, 0.2]]}, "must rise"),
        ({"windows": [16]}, "only 4 bins"),
    ],
)
def test_unusable_settings_are_refused(change: dict, said: str):
    with pytest.raises(UserError, match=said):
        make(**change)
