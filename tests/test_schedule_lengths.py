"""A schedule that takes the run's length takes another one when the run is resumed for longer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
from torch.optim import lr_scheduler

from bp_torch.recipes.schedules import Formula, Settings, WarmUp, build, move_to, takes_length

ONE_BACKEND = "schedules compute rates, no tensors"

MAKERS: dict[str, Any] = {
    "cosine": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=0, eta_min=1e-5),
    "one-cycle": functools.partial(lr_scheduler.OneCycleLR, total_steps=0, max_lr=0),
    "polynomial": functools.partial(lr_scheduler.PolynomialLR, total_iters=0, power=2.0),
    "linear": functools.partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=0),
    "warm-up": functools.partial(
        WarmUp, steps=3, after=functools.partial(lr_scheduler.CosineAnnealingLR, T_max=0), total=0
    ),
    "formula": functools.partial(Formula, formula="(1 - epoch / total) ** 2", total=0),
}


def optimizer(kind: str) -> torch.optim.Optimizer:
    groups = [{"params": [torch.ones(2, requires_grad=True)], "weight_decay": decay} for decay in (0.1, 0.0)]
    if kind == "adam":
        return torch.optim.AdamW(groups, lr=0.1)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def settings(of: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in of.param_groups]


def advance(one: torch.optim.Optimizer, schedule: Any, count: int) -> list[Any]:
    seen = []
    for _ in range(count):
        seen.append(settings(one))
        one.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_goes_on_as_if_planned_so(name: str, kind: str) -> None:
    make = MAKERS[name]
    assert takes_length(make)
    planned = optimizer(kind)
    expected = advance(planned, build(make, planned, 16), 16)
    short = optimizer(kind)
    schedule = build(make, short, 8)
    advance(short, schedule, 8)

    resumed = optimizer(kind)
    again = build(make, resumed, 16)
    resumed.load_state_dict(short.state_dict())  # as Lightning does, in this order
    again.load_state_dict(schedule.state_dict())
    values = [p.clone() for group in resumed.param_groups for p in group["params"]]
    move_to(again, build(make, Settings(optimizer(kind)), 16), 8)
    assert advance(resumed, again, 8) == expected[8:]
    assert all(map(torch.equal, values, [p for group in resumed.param_groups for p in group["params"]]))


def test_a_length_of_its_own_is_kept() -> None:
    assert not takes_length(functools.partial(lr_scheduler.CosineAnnealingLR, T_max=7))
    assert not takes_length(functools.partial(lr_scheduler.ExponentialLR, gamma=0.5))
    assert not takes_length(lr_scheduler.ReduceLROnPlateau)


def test_settings_take_a_rate() -> None:
    assert [group["lr"] for group in Settings(optimizer("sgd"), 0.5).param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in Settings(optimizer("sgd")).param_groups] == [0.1, 0.0]
