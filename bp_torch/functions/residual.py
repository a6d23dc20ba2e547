"""The residual connection: a branch, dropped out, is added to what went round it.

    forward    z = r + m ⊙ h / (1 - p)
               y = f(z)
    backward   dz = dy ⊙ f′(z)
               dr = dz
               dh = m ⊙ dz / (1 - p)

Source: He et al. 2016, arXiv:1512.03385.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import plain_kernels
from .activation import activate, activation_backward, lookup
from .dropout import drop, may_draw
from .function import Function, is_plain

__all__ = ["ResidualFunction"]


def _told_by(ctx: Any, output: Tensor | tuple[Tensor, Tensor]) -> Tensor | None:
    """The tensor s that tells f′, among the outputs."""
    if isinstance(output, tuple):
        return output[1]
    return output if _saved(ctx.activation, ctx.parameters) == "y" else None


def _saved(activation: str, parameters: tuple[float, ...]) -> str:
    """Which tensor tells f′ in backward: nothing, the sum ``z``, or ``y``, which the next layer keeps anyway."""
    if activation == "identity":
        return "nothing"
    return "z" if lookup(activation, parameters, fused=True).saves == "input" else "y"


class ResidualFunction(Function):
    """y = f(r + m ⊙ h / (1 - p)).

    Shapes: branch h, residual r and y all equal; the mask m broadcasts to h, or is None.

    ``forward`` returns y, or (y, z) where f′ is computed from z; z is differentiable like y.
    """

    @staticmethod
    def forward(
        branch: Tensor,
        residual: Tensor,
        mask: Tensor | None,
        p: float,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor | tuple[Tensor, Tensor]:
        keep_z = _saved(activation, parameters) == "z"
        triton = plain_kernels(branch, residual) if may_draw(mask) else None
        if triton is not None:
            y, z = triton.elementwise.residual_forward(branch, residual, mask, p, activation, parameters, keep_z)
            return (y, z) if keep_z else y
        z = drop(branch, mask, p, residual)
        if activation == "identity":
            return z
        if activation == "relu" and is_plain(z):
            return z.relu_()  # z is ours, and y tells f′
        y = activate(z, activation, parameters)
        return (y, z) if keep_z else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        branch, residual, mask, ctx.p, ctx.activation, ctx.parameters = inputs
        ctx.set_materialize_grads(False)
        ctx.dtypes = branch.dtype, residual.dtype
        s = _told_by(ctx, output)
        # y does not tell the mask: where the branch was dropped there is still the residual.
        ctx.save_for_backward(s, mask if ctx.needs_input_grad[0] else None)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        ctx.save_for_forward(_told_by(ctx, output), inputs[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, mask = ctx.saved_tensors
        triton = plain_kernels(dy, s) if dy is not None and dz is None and may_draw(mask) else None
        if triton is not None and all(ctx.needs_input_grad[:2]):
            row = lookup(ctx.activation, ctx.parameters, fused=True)
            dh, dr = triton.elementwise.residual_backward(
                dy, s, mask, ctx.p, ctx.activation, ctx.parameters, row.saves == "output", ctx.dtypes
            )
            return dh, dr, None, None, None, None
        if dy is not None:
            pulled = dy if s is None else activation_backward(dy, s, ctx.activation, ctx.parameters)
            dz = pulled if dz is None else pulled + dz
        dh = dr = None
        if dz is not None:
            # One of a wider dtype makes y, and so dz, wider than the other.
            dh = drop(dz, mask, ctx.p).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
            dr = dz.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return dh, dr, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, th: Tensor | None, tr: Tensor | None, *_: None) -> Tensor | tuple[Tensor, Tensor]:
        s, mask = ctx.saved_tensors
        th = None if th is None else drop(th, mask, ctx.p)
        tz = tr if th is None else th if tr is None else tr + th
        assert tz is not None
        tz = tz.to(torch.promote_types(*ctx.dtypes))
        if s is None:
            return tz
        ty = activation_backward(tz, s, ctx.activation, ctx.parameters)
        return (ty, tz) if _saved(ctx.activation, ctx.parameters) == "z" else ty
