"""A dense layer by one Triton GEMM with all that follows in its epilogue, or by cuBLAS and one fused pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import is_batch_invariant, kernels_for
from ..dense import DenseFunction, LinearFunction, gradients, product, rows
from ..dropout import may_draw
from ..epilogue import Epilogue
from ..function import TRITON


def _linear(x: Tensor, W: Tensor, b: Tensor | None) -> Any:
    return forward(x, W, b, None, None, Epilogue())


def forward(x: Tensor, W: Tensor, b: Tensor | None, r: Tensor | None, m: Tensor | None, e: Epilogue) -> Any:
    triton = kernels_for(x, W, b, r) if may_draw(m) else None
    if triton is None:
        return NotImplemented
    if is_batch_invariant() or triton.dense.choose() == "triton":
        y, s = triton.dense.forward(x, W, b, r, m, e)
    else:
        z = product(x, W, b)
        if e.name == "identity" and m is None and r is None:
            return z
        y, s = triton.elementwise.forward(z, None, r, m, e)
        s = z if e.keeps(m, r) == "z" else s
    return y if s is None else (y, s)


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, ds: Tensor | None = None) -> Any:
    """dz, and db from the same pass; then two products."""
    x, W, s, m = saved
    need_x, need_W, need_b, need_r, *_ = ctx.needs_input_grad
    if dy is None or ds is not None or (s is None and m is None) or not (need_x or need_W or need_b):
        return NotImplemented
    triton = kernels_for(dy, s) if may_draw(m) else None
    if triton is None:
        return NotImplemented
    if need_b:
        dz, db = triton.elementwise.backward_bias(rows(dy), s if s is None else rows(s), m, ctx.e, ctx.dtype)
    else:
        dz, db = triton.elementwise.backward(dy, s, m, ctx.e, ctx.dtype), None
    dx, dW, _ = gradients(dz, x, W, need_b=False)
    dx = dx if dx is None else dx.reshape(*dy.shape[:-1], dx.shape[-1])
    return dx, dW, db, dy if need_r else None, None, None


LinearFunction.faster(TRITON, forward=_linear)
DenseFunction.faster(TRITON, forward=forward, backward=_backward)
