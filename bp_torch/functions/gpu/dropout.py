"""Dropout by a Triton kernel that draws the mask from its seed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import kernels_for
from ..dropout import DropoutFunction, may_draw
from ..epilogue import Epilogue
from ..function import TRITON

__all__ = ["drop"]


def drop(x: Tensor, m: Tensor, p: float) -> Any:
    triton = kernels_for(x) if may_draw(m) else None
    return NotImplemented if triton is None else triton.elementwise.forward(x, None, None, m, Epilogue(p=p))[0]


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> Any:
    (m,) = saved
    dx = drop(dy, m, ctx.p)
    return dx if dx is NotImplemented else (dx, None, None)


DropoutFunction.faster(TRITON, forward=drop, backward=_backward)
