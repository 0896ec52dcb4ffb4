"""Schedules, decay groups, the moving average, and the state that a checkpoint keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from higgs.errors import UserError
from higgs.train.optim import (
    Ema,
    OptimConfig,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    set_updates,
    updates_of,
)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = module(torch.ones(3, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_cosine_warms_up_and_falls() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55, abs=1e-6)  # half way


def test_wsd_warms_up_stays_and_falls() -> None:
    config = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=10, decay_share=0.2, final_lr_share=0.0)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[4] == 1.0 and set(rates[9:81]) == {2.0}
    assert rates[90] == pytest.approx(1.0) and rates[100] == 0.0


@given(st.sampled_from(["cosine", "wsd"]), st.integers(0, 20), st.integers(1, 200), st.floats(0, 1))
def test_rates_stay_between_nothing_and_the_highest(schedule: str, warmup: int, steps: int, final: float) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, final_lr_share=final)
    assert all(0 <= learning_rate(step, steps, config) <= 1 + 1e-9 for step in range(steps))


def test_decay_acts_on_matrices_that_are_not_spared() -> None:
    module = small()
    named = dict(module.named_parameters())
    optimizer = make_optimizer(named, OptimConfig(weight_decay=0.5), undecayed=[named["2.weight"]])
    decayed = [id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert decayed == [id(named["0.weight"])]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_the_state_goes_through_its_tensors() -> None:
    """Weights, moments and the number of updates, copied into another optimiser, go on as the first one does."""
    modules = [small(), small()]
    named = [dict(module.named_parameters()) for module in modules]
    optimizers = [make_optimizer(names, OptimConfig(lr=0.1)) for names in named]
    for _ in range(3):
        step(modules[0], optimizers[0])
    states = [optimizer_tensors("optim", names, one) for names, one in zip(named, optimizers, strict=True)]
    assert len(states[0]) == 2 * len(named[0]) and states[0].keys() == states[1].keys()
    with torch.no_grad():
        for source, target in ((named[0], named[1]), (states[0], states[1])):
            for name, tensor in source.items():
                target[name].copy_(tensor)
    set_updates(optimizers[1], updates_of(optimizers[0]))
    losses = [[step(module, one) for _ in range(3)] for module, one in zip(modules, optimizers, strict=True)]
    assert losses[0] == losses[1]


def test_fresh_state_is_what_torch_begins_with() -> None:
    ours, theirs = small(), small()
    first = make_optimizer(dict(ours.named_parameters()), OptimConfig(lr=0.1, eps=1e-8))
    second = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    assert [step(ours, first) for _ in range(4)] == [step(theirs, second) for _ in range(4)]


def test_the_average_follows_and_is_lent() -> None:
    module = small()
    named = dict(module.named_parameters())
    named["1.bias"].requires_grad_(False)
    ema = Ema(named, 0.75)
    before = named["0.weight"].detach().clone()
    with torch.no_grad():
        named["0.weight"].add_(1.0)
    ema.update()
    live = named["0.weight"].detach().clone()
    with ema.applied():
        torch.testing.assert_close(named["0.weight"].detach(), before + 0.25)
    assert torch.equal(named["0.weight"], live)
    assert "ema.1.bias" not in ema.tensors() and "ema.0.weight" in ema.tensors()


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="schedule"):
        OptimConfig(schedule="linear")
    with pytest.raises(UserError, match="ema_decay"):
        Ema({}, 1.5)
    module = small().requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        make_optimizer(dict(module.named_parameters()), OptimConfig())
