"""Softmax and its logarithm along one dimension.

    softmax       y = exp(x - m) / Σ exp(x - m),  m = max x      dx = y ⊙ (dy - Σ dy ⊙ y)
    log-softmax   y = x - m - log Σ exp(x - m)                   dx = dy - exp(y) Σ dy

Both save y alone. Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs".

Faster ways are in aten/softmax.py and gpu/softmax.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mode import wide
from .function import Function

__all__ = ["LogSoftmaxFunction", "SoftmaxFunction"]


class _OfOutput:
    """What both save: the output, which tells the derivative."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(output)


class SoftmaxFunction(_OfOutput, Function):
    """y = softmax(x) along ``dim``.

    Backward: dx = y ⊙ (dy - Σ dy ⊙ y). Shapes: any, all equal. dtypes: floating.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _softmax_pull(dy, y, ctx.dim), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, *_: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return _softmax_pull(tx, y, ctx.dim)  # the Jacobian diag(y) - y yᵀ is symmetric


def _softmax_pull(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    dy, p = wide(dy), wide(y)
    return (p * (dy - (dy * p).sum(dim, keepdim=True))).to(y.dtype)


class LogSoftmaxFunction(_OfOutput, Function):
    """y = log softmax(x) along ``dim``.

    Backward: dx = dy - exp(y) Σ dy. Shapes: any, all equal. dtypes: floating.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return torch.log_softmax(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        dy = wide(dy)
        return (dy - wide(y).exp() * dy.sum(ctx.dim, keepdim=True)).to(y.dtype), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, *_: None) -> Tensor:
        (y,) = ctx.saved_tensors
        tx = wide(tx)
        return (tx - (wide(y).exp() * tx).sum(ctx.dim, keepdim=True)).to(y.dtype)
