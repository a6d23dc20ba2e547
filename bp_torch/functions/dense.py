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

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import is_batch_invariant, plain_kernels
from . import batch_invariant
from .activation import activate, activation_backward, lookup
from .dropout import drop, may_draw
from .function import Function, is_plain, no_view

__all__ = ["DenseFunction", "LinearFunction"]


class LinearFunction(Function):
    """y = x Wᵀ + b.

    Backward: db = Σ dy, dx = dy W, dW = dyᵀ x. Shapes: x (..., I), W (O, I), b (O) or None, y (..., O).

    What :class:`DenseFunction` is without an activation, dropout or a residual. It stands by itself because each
    argument and each tensor kept costs time, which a small layer notices.
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        triton = plain_kernels(x, W, b)
        if triton is not None:
            y = _forward_by_kernels(triton, x, W, b, None, None, 0.0, "identity", ())
            assert isinstance(y, Tensor)
            return y
        return batch_invariant.linear(x, W, b) if is_batch_invariant() else _product(x, W, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, _ = inputs
        need_x, need_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_W else None, W if need_x else None)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def forward_and_save(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        need_x, need_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_W else None, W if need_x else None)
        return LinearFunction.forward(x, W, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad
        if dy.dim() != 2:
            x, dy, shape = None if x is None else _rows(x), _rows(dy), dy.shape
            dx = torch.mm(dy, W).reshape(*shape[:-1], W.shape[1]) if need_x else None
        else:
            dx = torch.mm(dy, W) if need_x else None
        return dx, torch.mm(dy.t(), x) if need_W else None, dy.sum(0) if need_b else None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None) -> Tensor:
        x, W = ctx.saved_tensors
        return _product_tangent(x, W, tx, tW, tb)


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
        triton = plain_kernels(x, W, b, residual) if may_draw(mask) else None
        if triton is not None:
            return _forward_by_kernels(triton, x, W, b, residual, mask, p, activation, parameters)
        z = _batch_invariant_product(x, W, b) if is_batch_invariant() else _product(x, W, b)
        if activation == "identity":
            return drop(z, mask, p, residual)
        saved = f_prime_from(activation, parameters, mask, residual)
        # z is ours, and where y tells f′ nobody will read it.
        own = activation == "relu" and saved == "y" and is_plain(x, W, b)
        a = z.relu_() if own else activate(z, activation, parameters)
        y = drop(a, mask, p, residual)
        return (y, z) if saved == "z" else (y, a) if saved == "a" else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, W, b, residual, mask, ctx.p, ctx.activation, ctx.parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.dtype = W.dtype
        ctx.saved = f_prime_from(ctx.activation, ctx.parameters, mask, residual)
        ctx.gated = ctx.saved == "y" and mask is not None
        s = _told_by(ctx, output)
        mask = None if ctx.gated else mask
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        need_z = need_x or need_W or need_b
        ctx.save_for_backward(
            x if need_W else None, W if need_x else None, s if need_z else None, mask if need_z else None
        )

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, W, _, _, mask, *_ = inputs
        ctx.save_for_forward(x, W, _told_by(ctx, output), None if ctx.gated else mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, W, s, mask = ctx.saved_tensors
        need_x, need_W, need_b, need_residual, *_ = ctx.needs_input_grad
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
            if need_x:
                dx = torch.mm(rows, W)
                dx = dx if given.dim() == 2 else dx.reshape(*given.shape[:-1], W.shape[1])
            if need_W:
                dW = torch.mm(rows.t(), _rows(x))
        return dx, dW, db, dy if need_residual else None, None, None, None, None

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None, tr: Tensor | None, *_: None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, W, s, mask = ctx.saved_tensors
        tz = _product_tangent(x, W, tx, tW, tb)
        ta = tz if ctx.activation == "identity" else activation_backward(tz, s, ctx.activation, ctx.parameters)
        ty = drop(ta, mask, ctx.p, tr)
        return (ty, tz) if ctx.saved == "z" else (ty, ta) if ctx.saved == "a" else ty


def _product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b, which is no view: F.linear's result is one of a product of matrices where x has more dimensions."""
    z = F.linear(x, W, b)
    return z if b is None or z.dim() == 2 or torch.compiler.is_exporting() else no_view(z)


def _told_by(ctx: Any, output: Tensor | tuple[Tensor, Tensor]) -> Tensor | None:
    """The tensor s that tells f′, among the outputs."""
    return output[1] if isinstance(output, tuple) else output if ctx.saved == "y" else None


def _rows(t: Tensor) -> Tensor:
    """(..., C) → (N, C); explicit sizes, because -1 is ambiguous when C is 0."""
    return t if t.dim() == 2 else t.reshape(_count(t), t.shape[-1])


def _product_tangent(x: Tensor, W: Tensor, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None) -> Tensor:
    """The tangent of x Wᵀ + b."""
    tz = x.new_zeros((*x.shape[:-1], W.shape[0]))
    tz = tz if tx is None else tz + tx @ W.mT
    tz = tz if tW is None else tz + x @ tW.mT
    return tz if tb is None else tz + tb


def _count(t: Tensor) -> int:
    return math.prod(t.shape[:-1])  # Size.numel() would make a constant of a compiler's symbol


def _batch_invariant_product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    triton = plain_kernels(x, W, b)
    if triton is None:
        return batch_invariant.linear(x, W, b)
    z: Tensor = triton.dense.forward(x, W, b, None, None, 0.0, "identity", ())[0]
    return z


def _forward_by_kernels(
    triton: ModuleType,
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    p: float,
    activation: str,
    parameters: tuple[float, ...],
) -> Tensor | tuple[Tensor, Tensor]:
    """One Triton GEMM with all that follows in its epilogue, or cuBLAS and one fused pass."""
    saved = f_prime_from(activation, parameters, mask, residual)
    if is_batch_invariant() or triton.dense.choose(_count(x), *W.shape, x.dtype) == "triton":
        y: Tensor
        y, s = triton.dense.forward(
            x, W, b, residual, mask, p, activation, parameters, saved if saved in ("z", "a") else ""
        )
        return y if s is None else (y, s)
    z = _product(x, W, b)
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
    triton = plain_kernels(dy, s) if may_draw(mask) else None
    if triton is None:
        return None
    output = lookup(ctx.activation, ctx.parameters, fused=True).saves == "output"
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
    row = lookup(activation, parameters, fused=True)
    if row.saves == "input":
        return "z"
    return "y" if residual is None and (mask is None or row.gate) else "a"


def _pre_activation_gradient(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, s: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """dz, from dy and from the gradient ds of the second output."""
    dz = None
    if dy is not None:
        if dy.dtype != ctx.dtype:
            dy = dy.to(ctx.dtype)  # a residual of a wider dtype makes y, and so dy, wider than z
        if s is None:
            dz = drop(dy, mask, ctx.p)
        else:
            dz = activation_backward(dy, s, ctx.activation, ctx.parameters, mask, ctx.p)
    if ds is not None and s is not None and ctx.saved == "a":
        ds = activation_backward(ds, s, ctx.activation, ctx.parameters)
    return dz if ds is None else ds if dz is None else dz + ds
