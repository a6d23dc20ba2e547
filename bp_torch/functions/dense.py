"""The dense (fully connected) layer, with what usually follows it.

    forward    z = x Wᵀ + b
               a = f(z)
               y = m ⊙ a / (1 - p) + r
    backward   da = m ⊙ dy / (1 - p)
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

from .activation import activation_backward, activation_jvp, lookup
from .dropout import drop
from .function import Function

__all__ = ["DenseFunction"]


def _saved(activation: str, parameters: tuple[float, ...], mask: Tensor | None, residual: Tensor | None) -> str:
    """Which tensor tells f′ in backward: nothing, ``z``, ``a``, or ``y``, which the next layer keeps anyway."""
    row = lookup(activation, parameters)
    if activation == "identity":
        return "nothing"
    if row.saves == "input":
        return "z"
    return "y" if residual is None and (mask is None or row.gate) else "a"


def _rows(t: Tensor) -> Tensor:
    """(..., C) → (N, C); explicit sizes, because -1 is ambiguous when C is 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


class DenseFunction(Function):
    """y = dropout(f(x Wᵀ + b)) + r.

    Shapes: x (..., I), W (O, I), b (O), r, m and y (..., O). b, r and m may be None.

    ``forward`` returns y, or (y, s) where s is the pre-activation z or the activation a: f′ is computed from s then, and
    s is differentiable like y. relu and dropout without a residual keep neither s nor m: y tells both.
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
        z = torch.nn.functional.linear(x, W, b)
        a = z if activation == "identity" else lookup(activation, parameters).f(z, *parameters)
        y = drop(a, mask, p)
        if residual is not None:
            y = y + residual
        saved = _saved(activation, parameters, mask, residual)
        if saved == "z":
            return y, z
        if saved == "a":
            return y, a
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        x, W, b, residual, mask, ctx.p, ctx.activation, ctx.parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.dtype = W.dtype
        ctx.saved = _saved(ctx.activation, ctx.parameters, mask, residual)
        s = output[1] if isinstance(output, tuple) else output if ctx.saved == "y" else None
        if ctx.saved == "y":
            mask_kept, ctx.gated = None, mask is not None
        else:
            mask_kept, ctx.gated = mask, False
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        need_z = need_x or need_W or need_b
        ctx.save_for_backward(
            x if need_W else None, W if need_x else None, s if need_z else None, mask_kept if need_z else None
        )
        ctx.save_for_forward(x, W, s, mask_kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, W, s, mask = ctx.saved_tensors
        need_x, need_W, need_b, need_residual = ctx.needs_input_grad[:4]
        dx = dW = db = None
        if need_x or need_W or need_b:
            dz = _pull(ctx, dy, ds, s, mask)
            if dz is not None:
                if need_x:
                    assert W is not None
                    dx = (_rows(dz) @ W).reshape(*dz.shape[:-1], W.shape[-1])
                dW = _rows(dz).mT @ _rows(x) if need_W else None
                db = _rows(dz).sum(0) if need_b else None
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
        ta = tz if ctx.activation == "identity" else activation_jvp(tz, s, ctx.activation, ctx.parameters)
        ty = ta / (1 - ctx.p) if ctx.gated and ctx.p < 1 else drop(ta, mask, ctx.p)
        ty = ty if tr is None else ty + tr
        if ctx.saved == "z":
            return ty, tz
        if ctx.saved == "a":
            return ty, ta
        return ty


def _pull(ctx: Any, dy: Tensor | None, ds: Tensor | None, s: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """dz from dy and from the gradient ds of the second output."""
    # A residual of a wider dtype makes y, and so dy, wider than z.
    da = None if dy is None else drop(dy.to(ctx.dtype), mask, ctx.p)
    if ctx.gated and da is not None and ctx.p < 1:
        da = da / (1 - ctx.p)
    if ctx.saved == "a" and ds is not None:
        da, ds = ds if da is None else da + ds, None
    if da is None or s is None:
        dz = da
    else:
        dz = activation_backward(da, s, ctx.activation, ctx.parameters)
    return dz if ds is None else ds if dz is None else dz + ds
