"""The dense (fully connected) layer, with what usually follows it.

Forward::

    z = x Wᵀ + b
    a = f(z)
    y = m ⊙ a / (1 - p) + r

Backward::

    da = m ⊙ dy / (1 - p)
    dz = da ⊙ f′(z)
    dx = dz W
    dW = dzᵀ x
    db = Σ dz over rows
    dr = dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import is_batch_invariant, kernels
from . import batch_invariant
from .activation import ActivationFunction, activation_backward, lookup
from .dropout import drop, may_draw
from .function import Function, is_plain

__all__ = ["DenseFunction"]


class DenseFunction(Function):
    """y = dropout(f(x Wᵀ + b)) + r.

    Shapes: x (..., I), W (O, I), b (O), r, m and y (..., O). b, r and m may be None.

    ``forward`` returns y, or (y, s) where s is the pre-activation z or the activation a: f′ is computed from s then,
    and s is differentiable like y. relu and dropout without a residual keep neither s nor m: y tells both.
    """

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        p: float,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor | tuple[Tensor, Tensor]:
        fused = _forward_by_kernels(x, W, b, residual, mask, p, activation, parameters)
        if fused is not None:
            return fused
        z = _batch_invariant_product(x, W, b) if is_batch_invariant() else torch.nn.functional.linear(x, W, b)
        if activation == "identity":
            return drop(z, mask, p, residual)
        a = ActivationFunction.forward(z, activation, parameters)
        y = drop(a, mask, p, residual)
        saved = f_prime_from(activation, parameters, mask, residual)
        return (y, z) if saved == "z" else (y, a) if saved == "a" else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, W, b, residual, mask, ctx.p, ctx.activation, ctx.parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.dtype = W.dtype
        ctx.saved = f_prime_from(ctx.activation, ctx.parameters, mask, residual)
        ctx.gated = ctx.saved == "y" and mask is not None
        s = output[1] if isinstance(output, tuple) else output if ctx.saved == "y" else None
        mask = None if ctx.gated else mask
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        need_z = need_x or need_W or need_b
        ctx.save_for_backward(
            x if need_W else None, W if need_x else None, s if need_z else None, mask if need_z else None
        )
        ctx.save_for_forward(x, W, s, mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, W, s, mask = ctx.saved_tensors
        need_x, need_W, need_b, need_residual = ctx.needs_input_grad[:4]
        dx = dW = db = rows = None  # type: Tensor | None
        fused = _backward_by_kernels(ctx, dy, ds, s, mask) if need_b else None
        if fused is not None:
            rows, db = fused
        else:
            dz = _pre_activation_gradient(ctx, dy, ds, s, mask) if need_x or need_W or need_b else None
            rows = None if dz is None else _rows(dz)
            db = rows.sum(0) if rows is not None and need_b else None
        given = ds if dy is None else dy
        if rows is not None and given is not None:
            dx = (rows @ W).reshape(*given.shape[:-1], W.shape[-1]) if need_x else None
            dW = rows.mT @ _rows(x) if need_W else None
        return dx, dW, db, dy if need_residual else None, None, None, None, None

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None, tr: Tensor | None, *_: None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, W, s, mask = ctx.saved_tensors
        tz = x.new_zeros((*x.shape[:-1], W.shape[0]))
        tz = tz if tx is None else tz + tx @ W.mT
        tz = tz if tW is None else tz + x @ tW.mT
        tz = tz if tb is None else tz + tb
        ta = tz if ctx.activation == "identity" else activation_backward(tz, s, ctx.activation, ctx.parameters)
        ty = drop(ta, mask, ctx.p, tr)
        return (ty, tz) if ctx.saved == "z" else (ty, ta) if ctx.saved == "a" else ty


def _rows(t: Tensor) -> Tensor:
    """(..., C) → (N, C); explicit sizes, because -1 is ambiguous when C is 0."""
    return t.reshape(_count(t), t.shape[-1])


def _count(t: Tensor) -> int:
    return t.shape[:-1].numel()


def _batch_invariant_product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    triton = kernels(x, W, b) if is_plain(x, W, b) else None
    if triton is None:
        return batch_invariant.linear(x, W, b)
    z: Tensor = triton.dense.forward(x, W, b, None, None, 0.0, "identity", ())[0]
    return z


def _forward_by_kernels(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    p: float,
    activation: str,
    parameters: tuple[float, ...],
) -> Tensor | tuple[Tensor, Tensor] | None:
    """One Triton GEMM with all that follows in its epilogue, or cuBLAS and one fused pass; None where neither runs."""
    triton = kernels(x, W, b, residual) if is_plain(x, W, b, residual) and may_draw(mask) else None
    if triton is None:
        return None
    saved = f_prime_from(activation, parameters, mask, residual)
    if is_batch_invariant() or triton.dense.choose(_count(x), *W.shape, x.dtype) == "triton":
        y, s = triton.dense.forward(
            x, W, b, residual, mask, p, activation, parameters, saved if saved in ("z", "a") else ""
        )
        return y if s is None else (y, s)
    z = torch.nn.functional.linear(x, W, b)
    if activation == "identity":
        return drop(z, mask, p, residual)
    if saved == "a":
        both: tuple[Tensor, Tensor] = triton.elementwise.forward_keeping(z, residual, mask, p, activation, parameters)
        return both
    y = triton.elementwise.forward(z, None, residual, mask, p, activation, parameters)
    return (y, z) if saved == "z" else y


def _backward_by_kernels(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, s: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """dz as rows, and db from the same pass; None where the kernels do not run or there is nothing to fuse."""
    if dy is None or ds is not None or (s is None and mask is None):
        return None
    triton = kernels(dy, s) if is_plain(dy, s) and may_draw(mask) else None
    if triton is None:
        return None
    output = lookup(ctx.activation, ctx.parameters).saves == "output"
    both: tuple[Tensor, Tensor] = triton.elementwise.backward_bias(
        _rows(dy), s if s is None else _rows(s), mask, ctx.p, ctx.activation, ctx.parameters, output, ctx.dtype
    )
    return both


def f_prime_from(
    activation: str, parameters: tuple[float, ...], mask: Tensor | None, residual: Tensor | None
) -> str | None:
    """Which tensor tells f′ in backward: None, ``z``, ``a``, or ``y``, which the next layer keeps anyway."""
    if activation == "identity":
        return None
    row = lookup(activation, parameters)
    if row.saves == "input":
        return "z"
    return "y" if residual is None and (mask is None or row.gate) else "a"


def _pre_activation_gradient(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, s: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """dz, from dy and from the gradient ds of the second output."""
    dz = None
    if dy is not None:
        dy = dy.to(ctx.dtype)  # a residual of a wider dtype makes y, and so dy, wider than z
        if s is None:
            dz = drop(dy, mask, ctx.p)
        else:
            dz = activation_backward(dy, s, ctx.activation, ctx.parameters, mask, ctx.p)
    if ds is not None and s is not None and ctx.saved == "a":
        ds = activation_backward(ds, s, ctx.activation, ctx.parameters)
    return dz if ds is None else ds if dz is None else dz + ds
