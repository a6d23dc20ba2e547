"""A residual connection in one Triton kernel each way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import kernels_for
from ..dropout import may_draw
from ..epilogue import Epilogue
from ..function import TRITON
from ..residual import ResidualFunction


def _forward(h: Tensor, r: Tensor, m: Tensor | None, e: Epilogue) -> Any:
    triton = kernels_for(h, r) if may_draw(m) else None
    if triton is None:
        return NotImplemented
    y, z = triton.residual.forward(h, r, m, e)
    return y if z is None else (y, z)


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dz: Tensor | None = None) -> Any:
    if dy is None or dz is not None or not all(ctx.needs_input_grad[:2]):
        return NotImplemented
    s, m = saved
    triton = kernels_for(dy, s) if may_draw(m) else None
    if triton is None:
        return NotImplemented
    return *triton.residual.backward(dy, s, m, ctx.e, ctx.dtypes), None, None


ResidualFunction.faster(TRITON, forward=_forward, backward=_backward)
