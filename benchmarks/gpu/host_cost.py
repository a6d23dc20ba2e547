"""Microseconds of Python of a call at 64 x 64: the kernels with their launches stubbed, the formulas, and torch.

It needs no GPU: tests/stub_driver.py stands in for one::

    python -m benchmarks.gpu.host_cost
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF

SIZE, CLASSES = 64, 10
Row = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...], Tensor]
"""Ours, torch's, their inputs, and the gradient of what they return."""


def rows() -> dict[str, Row]:
    x, W, logits = (torch.randn(SIZE, n, requires_grad=True) for n in (SIZE, SIZE, CLASSES))
    b, g = torch.zeros(SIZE, requires_grad=True), torch.ones(SIZE, requires_grad=True)
    t, target, one, dy = (
        torch.randint(CLASSES, (SIZE,)),
        torch.randn(SIZE, SIZE),
        torch.ones(()),
        torch.randn(SIZE, SIZE),
    )

    def dropped(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return torch.native_dropout(F.relu(F.linear(x, W, b)), 0.5, True)[0]

    return {
        "linear": (bpF.linear, F.linear, (x, W, b), dy),
        "dense relu": (
            lambda *t: bpF.dense(*t, activation="relu"), lambda *t: F.relu(F.linear(*t)), (x, W, b), dy
        ),
        "dense relu dropout": (lambda *t: bpF.dense(*t, activation="relu", p=0.5), dropped, (x, W, b), dy),
        "relu": (bpF.relu, F.relu, (x,), dy),
        "softmax": (lambda x: bpF.softmax(x, -1), lambda x: F.softmax(x, -1), (x,), dy),
        "mse": (lambda x: bpF.mse_loss(x, target), lambda x: F.mse_loss(x, target), (x,), one),
        "cross-entropy": (lambda x: bpF.cross_entropy(x, t), lambda x: F.cross_entropy(x, t), (logits,), one),
        "batch norm relu": (
            lambda x, g, b: bpF.batch_norm_act(x, None, None, g, b, None, True, activation="relu"),
            lambda x, g, b: F.relu(F.batch_norm(x, None, None, g, b, True)), (x, g, b), dy,
        ),
    }  # fmt: skip


def microseconds(f: Callable[[], object], number: int = 50, repeats: int = 30) -> float:
    """Of this process's CPU time, the best of several."""
    f()
    return min(timeit.repeat(f, number=number, repeat=repeats, timer=time.process_time)) / number * 1e6


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    stub: Any = importlib.import_module("stub_driver")
    with tempfile.TemporaryDirectory() as folder:
        stub.install("ttir", folder)
        torch.set_num_threads(1)
        print(f"{'microseconds, forward / both':28s} {'kernels':>15s} {'formulas':>15s} {'torch':>15s}  launches")
        for name, (ours, theirs, inputs, dy) in rows().items():
            cells = []
            for backend, f in (("triton", ours), ("torch", ours), ("torch", theirs)):
                with bp_torch.backend(backend):
                    forward = microseconds(lambda: f(*inputs))
                    both = microseconds(lambda: torch.autograd.grad(f(*inputs), inputs, dy))
                cells.append(f"{forward:6.1f} / {both:6.1f}")
            before = sum(stub.LAUNCHED.values())
            with bp_torch.backend("triton"):
                torch.autograd.grad(ours(*inputs), inputs, dy)
            print(f"{name:28s} {'  '.join(cells)}  {sum(stub.LAUNCHED.values()) - before}", flush=True)


if __name__ == "__main__":
    main()
