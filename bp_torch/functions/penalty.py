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

from ..mode import PLAIN
from .function import Function

__all__ = ["PenaltyFunction"]


def _dtypes(parameters: tuple[Tensor, ...]) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the result and the one it is summed in: float32 for 16-bit parameters."""
    dtype = reduce(torch.promote_types, (w.dtype for w in parameters))
    return dtype, torch.promote_types(dtype, torch.float32)


def _wide(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _squares(w: Tensor) -> Tensor:
    """Σ w². A subclass such as DTensor, whose parts on each device may differ in size, cannot be flattened."""
    if type(w) not in PLAIN:
        return w.square().sum()
    v = w.reshape(w.numel())
    return torch.dot(v, v)


def _slope(w: Tensor, l1: float, l2: float, dR: Tensor) -> Tensor:
    """(λ₁ sign(w) + 2 λ₂ w) dR."""
    if l1 == 0:
        return w * (2 * l2 * dR)
    dw = torch.sgn(w) * (l1 * dR)
    return dw if l2 == 0 else dw + w * (2 * l2 * dR)


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
                total = total + l1 * w.abs().sum(dtype=torch.promote_types(w.dtype, torch.float32))
            if l2 != 0:
                total = total + l2 * _squares(_wide(w))
        return total.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.l1, ctx.l2, *parameters = inputs
        ctx.save_for_backward(
            *(w if need else None for w, need in zip(parameters, ctx.needs_input_grad[2:], strict=True))
        )

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, dR: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        dR = _wide(dR)
        return (
            None,
            None,
            *(None if w is None else _slope(_wide(w), ctx.l1, ctx.l2, dR).to(w.dtype) for w in parameters),
        )

    @staticmethod
    def jvp_rule(ctx: Any, _l1: None, _l2: None, *tangents: Tensor | None) -> Tensor:
        dtype, wide = _dtypes(ctx.saved_tensors)
        total = ctx.saved_tensors[0].new_zeros((), dtype=wide)
        one = total.new_ones(())
        for w, t in zip(ctx.saved_tensors, tangents, strict=True):
            if t is not None:
                total = total + (_slope(_wide(w), ctx.l1, ctx.l2, one) * t).sum()
        return total.to(dtype)
