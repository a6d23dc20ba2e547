"""The same network, initialization and batches: torch.nn and bp_torch follow one loss curve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bp_torch import nn

STEPS = 200


def network(namespace: Any) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        namespace.Linear(20, 32),
        namespace.BatchNorm1d(32),
        namespace.ReLU(),
        namespace.Linear(32, 32),
        namespace.GELU(),
        namespace.Linear(32, 32),
        namespace.Tanh(),
        namespace.Linear(32, 5),
    )


def data(classes: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(STEPS, 64, 20)
    teacher = torch.randn(20, 5)
    y = torch.tanh(x @ teacher)
    return x, y.argmax(-1) if classes else y


def curve(namespace: Any, loss: str, steps: int = STEPS) -> Tensor:
    model = network(namespace)
    criterion = getattr(namespace, loss)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, y in zip(*(t[:steps] for t in data(loss == "CrossEntropyLoss")), strict=True):
        optimizer.zero_grad()
        value = criterion(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss", "SmoothL1Loss"])
def test_loss_curves_agree_to_float32_rounding(loss: str, on_backend: str) -> None:
    steps = 60 if on_backend == "triton" else STEPS  # the interpreter takes a tenth of a second a step
    ours, theirs = curve(nn, loss, steps), curve(torch.nn, loss, steps)
    assert theirs[-20:].mean() < 0.7 * theirs[:20].mean(), "the network learns, so that the comparison means something"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
