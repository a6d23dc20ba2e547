"""Dropout by itself, as aten/epilogue.py has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dropout import AlphaDropoutFunction, DropoutFunction, affine
from ..function import ATEN
from .epilogue import drop, masked


def _forward(ctx: Any, x: Tensor, mask: Tensor, p: float) -> Tensor:
    ctx.p = p
    ctx.save_for_backward(mask)
    return drop(x, mask, p)


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    (m,) = saved
    return drop(dy, m, ctx.p), None, None


def _alpha_forward(x: Tensor, mask: Tensor, p: float) -> Tensor:
    a, b, alpha = affine(p)
    return masked(x, mask, a, (~mask).to(x.dtype) * (a * alpha) + b)


def _alpha_backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    (m,) = saved
    return masked(dy, m, affine(ctx.p)[0]), None, None


DropoutFunction.faster(ATEN, forward_and_save=_forward, backward=_backward, always=True)
AlphaDropoutFunction.faster(ATEN, forward=_alpha_forward, backward=_alpha_backward)
