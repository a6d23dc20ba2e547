"""Memory after a training step is what it was before, checkpointed or not, without Python's collector."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from case_runs import every_case, leaves, outputs
from cases import CASES, Case
from defects import KeepsOutput, ReLU
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import bp_torch
from bp_torch.verification.safety import growth

ONE_BACKEND = "Triton's interpreter leaves cycles of its own to Python's collector"


def steps(f: Callable[..., Any], inputs: tuple[torch.Tensor, ...], checkpointed: bool) -> Callable[[], None]:
    def step() -> None:
        ys = outputs(checkpoint(f, *inputs, use_reentrant=False) if checkpointed else f(*inputs))
        torch.autograd.backward([y.sum() for y in ys])
        for t in inputs:
            t.grad = None

    return step


@pytest.mark.contract("checkpoint")
@every_case
def test_memory_is_flat(case: Case) -> None:
    """To the byte, so that few steps are as telling as many."""
    for checkpointed in (False, True):
        assert growth(steps(case.ours, leaves(case, torch.float32), checkpointed), 5) == 0


@pytest.mark.parametrize("collector", [False, True])
def test_memory_is_flat_over_many_steps_of_a_model(collector: bool) -> None:
    """Batch norm's statistics made a cycle that no collector finds."""
    block = [torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    model = bp_torch.convert(torch.nn.Sequential(*block))
    x = torch.randn(16, 8, requires_grad=True)

    def step() -> None:
        steps(model, (x,), checkpointed=True)()
        model.zero_grad()
        if collector:
            gc.collect(0)

    assert growth(step, 200) == 0


def test_memory_is_flat_where_forward_mode_is_on() -> None:
    case = next(case for case in CASES if case.name == "activation-tanh")
    with forward_ad.dual_level():
        assert growth(steps(case.ours, leaves(case, torch.float32), True), 20) == 0


def test_growth_is_found() -> None:
    x = torch.randn(64, requires_grad=True)
    assert growth(steps(KeepsOutput.apply, (x,), True), 5) == 5 * 256
    assert growth(steps(ReLU.apply, (x,), True), 5) == 0
