"""Penalties on the size of parameters: L1, L2 and elastic net over any number of tensors.

    forward    R = λ₁ Σ |w| + λ₂ Σ w²        over all elements w of all tensors
    backward   dw = (λ₁ sign(w) + 2 λ₂ w) dR,   sign(0) = 0

There is no ½ before λ₂: weight decay λ of an optimizer, which adds λ w to the gradient, is λ₂ = λ/2.

Sources: Tibshirani 1996, JRSS B 58 (L1); Hoerl & Kennard 1970, Technometrics 12 (L2); Zou & Hastie 2005, JRSS B 67
(elastic net).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .function import Function

__all__ = ["PenaltyFunction"]


def _dtypes(parameters: tuple[Tensor, ...]) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the result and the one it is summed in: float32 for 16-bit parameters."""
    dtype = reduce(torch.promote_types, (w.dtype for w in parameters))
    return dtype, torch.promote_types(dtype, torch.float32)


def _slope(w: Tensor, l1: float, l2: float) -> Tensor:
    """λ₁ sign(w) + 2 λ₂ w, in float32 for 16-bit w."""
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if l2 == 0:
        return l1 * torch.sgn(w)
    return 2 * l2 * w if l1 == 0 else l1 * torch.sgn(w) + 2 * l2 * w


class PenaltyFunction(Function):
    """R = λ₁ Σ |w| + λ₂ Σ w².

    Backward: dw = (λ₁ sign(w) + 2 λ₂ w) dR. Shapes: any; R has none. dtypes: floating, may differ; R has the widest.
    """

    @staticmethod
    def forward(l1: float, l2: float, *parameters: Tensor) -> Tensor:
        dtype, wide = _dtypes(parameters)
        total = parameters[0].new_zeros((), dtype=wide)
        for w in parameters:
            if l1 != 0:
                total = total + l1 * torch.linalg.vector_norm(w, 1, dtype=torch.promote_types(w.dtype, torch.float32))
            if l2 != 0:
                v = w.reshape(w.numel()).to(torch.promote_types(w.dtype, torch.float32))
                total = total + l2 * torch.dot(v, v)
        return total.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.l1, ctx.l2, *parameters = inputs
        ctx.save_for_backward(
            *(w if need else None for w, need in zip(parameters, ctx.needs_input_grad[2:], strict=True))
        )
        ctx.save_for_forward(*parameters)

    @staticmethod
    def backward(ctx: Any, dR: Tensor) -> tuple[Tensor | None, ...]:
        dws = []
        for w in ctx.saved_tensors:
            dws.append(None if w is None else (_slope(w, ctx.l1, ctx.l2) * dR).to(w.dtype))
        return None, None, *dws

    @staticmethod
    def jvp_rule(ctx: Any, _l1: None, _l2: None, *tangents: Tensor | None) -> Tensor:
        dtype, wide = _dtypes(ctx.saved_tensors)
        total = ctx.saved_tensors[0].new_zeros((), dtype=wide)
        for w, t in zip(ctx.saved_tensors, tangents, strict=True):
            if t is not None:
                total = total + (_slope(w, ctx.l1, ctx.l2) * t).sum()
        return total.to(dtype)
