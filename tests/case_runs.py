"""A case of the table run: its inputs as leaves, its outputs, its gradients; and what marks the tests of every case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from seeds import seeded
from torch import Tensor

every_case = pytest.mark.parametrize("case", CASES, ids=str)
contract = pytest.mark.contract


def leaves(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype).requires_grad_() for t in case.inputs())


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) for t in case.inputs())


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def upstream(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = seeded(11)
    return tuple(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in result)


def run(f: Callable[..., Any], inputs: tuple[Tensor, ...], dys: tuple[Tensor, ...] | None = None) -> tuple[Any, Any]:
    """Outputs, and the gradient of each input that needs one."""
    ys = outputs(f(*inputs))
    wanted = [t for t in inputs if t.requires_grad]
    return ys, torch.autograd.grad(ys, wanted, upstream(ys) if dys is None else dys, allow_unused=True)


def scalar(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """A curved scalar of f's outputs, so that second derivatives are not trivially zero."""
    return lambda *inputs: sum(torch.sin(y * 0.7).sum() for y in outputs(f(*inputs)))
