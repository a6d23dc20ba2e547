"""How far a reader walks who follows one training step of a dense layer with a debugger."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import bp_torch
from bp_torch import nn, settings

ROOT = Path(bp_torch.__file__).parent
MOST_CALLS, MOST_MOVES = 15, 5


def walk(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``run`` returns, and the files of this package's functions in the order of their calls."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            files.append(str(path.relative_to(ROOT)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        return run(), files
    finally:
        sys.setprofile(before)


@pytest.mark.one_backend("torch", "counts the calls of the CPU's way; kernels have a host of their own")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_a_step_of_a_dense_layer(activation: str | None, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "were_set", False)  # as where no block was ever entered
    monkeypatch.setattr(settings, "triton_was_asked_for", False)
    layer = nn.Dense(6, 5, activation=activation, dropout=dropout)
    x = torch.randn(4, 6, requires_grad=True)
    leaves = [x, *layer.parameters()]
    dy = torch.ones(4, 5)
    torch.autograd.grad(layer(x), leaves, dy)  # what is imported and made once
    y, forward = walk(lambda: layer.forward(x))
    _, backward = walk(lambda: torch.autograd.grad(y, leaves, dy))
    for name, files in (("forward", forward), ("backward", backward)):
        moves = sum(a != b for a, b in pairwise(files))
        assert len(files) <= MOST_CALLS, f"{name}: {files}"
        assert moves <= MOST_MOVES, f"{name}: {files}"
