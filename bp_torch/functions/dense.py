"""The dense (fully connected) layer, with what usually follows it.

Forward::

    z = x Wᵀ + b
    y = m ⊙ f(z) / (1 - p) + r

Backward::

    dz = m ⊙ dy / (1 - p) ⊙ f′(z)
    dx = dz W
    dW = dzᵀ x
    db = Σ dz over rows
    dr = dy

What follows z is an :class:`Epilogue`. Faster ways are in aten/dense.py and gpu/dense.py; batch_invariant.py has the
products of that mode.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import unsafe_view
from .dropout import drop
from .epilogue import Epilogue
from .function import Function

__all__ = ["DenseFunction", "LinearFunction", "gradients", "product", "product_tangent", "rows"]


class LinearFunction(Function):
    """y = x Wᵀ + b.

    Backward: db = Σ dy, dx = dy W, dW = dyᵀ x. Shapes: x (..., I), W (O, I), b (O) or None, y (..., O).

    What :class:`DenseFunction` is without an activation, dropout or a residual. It stands by itself because each
    argument and each tensor kept costs time, which a small layer notices.
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return product(x, W, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, _ = inputs
        need_x, need_W, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_W else None, W if need_x else None)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad
        if dy.dim() != 2:
            return gradients(dy, x, W, need_b)
        dx = torch.mm(dy, W) if need_x else None  # the same in fewer calls, which a small layer notices
        return dx, torch.mm(dy.t(), x) if need_W else None, dy.sum(0) if need_b else None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None) -> Tensor:
        x, W = ctx.saved_tensors
        return product_tangent(x, W, tx, tW, tb)


class DenseFunction(Function):
    """y = m ⊙ f(x Wᵀ + b) / (1 - p) + r.

    Shapes: x (..., I), W (O, I), b (O), r, m and y (..., O). b, r and m may be None.

    ``forward`` returns y, or (y, s) where s is the pre-activation z or the activation a: f′ is computed from s then,
    and s is differentiable like y. relu and dropout without a residual keep neither s nor m: y tells both.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, r: Tensor | None, m: Tensor | None, e: Epilogue
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, s = e.forward(product(x, W, b), m, r)
        return y if s is None else (y, s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, W, b, r, m, ctx.e = inputs
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.keeps_s = W.dtype, isinstance(output, tuple)
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        s, m = _told_by(ctx.e, output, m)
        s, m = (s, m) if need_x or need_W or need_b else (None, None)
        ctx.save_for_backward(x if need_W else None, W if need_x else None, s, m)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, W, _, _, m, _ = inputs
        ctx.save_for_forward(x, W, *_told_by(ctx.e, output, m))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, W, s, m = ctx.saved_tensors
        need_x, need_W, need_b, need_r, *_ = ctx.needs_input_grad
        dz = None
        if need_x or need_W or need_b:
            # A residual of a wider dtype makes y, and so dy, wider than z.
            dz = None if dy is None else ctx.e.backward(dy.to(ctx.dtype), s, m)
            dz = _sum(dz, ctx.e.pull(ds, s) if ds is not None and ctx.e.told_by == "a" else ds)
        dx, dW, db = (None, None, None) if dz is None else gradients(dz, x, W, need_b)
        return dx, dW, db, dy if need_r else None, None, None

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None, tr: Tensor | None, *_: None
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, W, s, m = ctx.saved_tensors
        tz = product_tangent(x, W, tx, tW, tb)
        ta = ctx.e.pull(tz, s)
        ty = drop(ta, m, ctx.e.p, tr)
        return (ty, tz if ctx.e.told_by == "z" else ta) if ctx.keeps_s else ty


def product(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b, as the only tensor of what F.linear makes a view of where x has more dimensions: autograd refuses to
    change a view that a Function returned.
    """
    z = F.linear(x, W, b)
    if b is None or z.dim() == 2 or torch.compiler.is_exporting():
        return z
    view: Tensor = unsafe_view(z, z.shape)
    return view


def gradients(
    dz: Tensor, x: Tensor | None, W: Tensor | None, need_b: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx where W was kept for it, dW where x was, and db."""
    flat = rows(dz)
    dx = None if W is None else torch.mm(flat, W)
    dx = dx if dx is None or dz.dim() == 2 else dx.reshape(*dz.shape[:-1], dx.shape[1])
    return dx, None if x is None else torch.mm(flat.t(), rows(x)), flat.sum(0) if need_b else None


def rows(t: Tensor) -> Tensor:
    """(..., C) → (N, C); explicit sizes, because -1 is ambiguous when C is 0."""
    # Size.numel() would make a constant of a compiler's symbol.
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _told_by(
    e: Epilogue, output: Tensor | tuple[Tensor, Tensor], m: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The tensor s that tells f′, and the mask, unless y tells both."""
    if isinstance(output, tuple):
        return output[1], m
    return (output, None) if e.told_by else (None, m)


def product_tangent(x: Tensor, W: Tensor, tx: Tensor | None, tW: Tensor | None, tb: Tensor | None) -> Tensor:
    """The tangent of x Wᵀ + b."""
    tz = x.new_zeros((*x.shape[:-1], W.shape[0]))
    tz = tz if tx is None else tz + tx @ W.mT
    tz = tz if tW is None else tz + x @ tW.mT
    return tz if tb is None else tz + tb


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
