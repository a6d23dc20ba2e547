"""Softmax and its logarithm along one dimension.

    softmax       y = exp(x - m) / Σ exp(x - m),  m = max x      dx = y ⊙ (dy - Σ dy ⊙ y)
    log-softmax   y = x - m - log Σ exp(x - m)                   dx = dy - exp(y) Σ dy

Both save y alone. Source: Bridle 1990, "Probabilistic interpretation of feedforward classification network outputs".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import is_batch_invariant, plain_kernels
from .function import Function, wide

__all__ = ["LogSoftmaxFunction", "SoftmaxFunction"]

aten = torch.ops.aten


class SoftmaxFunction(Function):
    """y = softmax(x) along ``dim``.

    Backward: dx = y ⊙ (dy - Σ dy ⊙ y). Shapes: any, all equal. dtypes: floating.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        triton = plain_kernels(x)
        if triton is not None:
            return triton.softmax.forward(x, dim, log=False)
        return _row_by_row(torch.softmax, x, dim) if is_batch_invariant() else torch.softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        triton = plain_kernels(dy, y)
        if triton is not None:
            return triton.softmax.backward(dy, y, ctx.dim, log=False), None
        if not torch.is_grad_enabled():
            return aten._softmax_backward_data.default(dy, y, ctx.dim, y.dtype), None
        return _softmax_pull(dy, y, ctx.dim), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, *_: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return _softmax_pull(tx, y, ctx.dim)  # the Jacobian diag(y) - y yᵀ is symmetric


def _row_by_row(f: Callable[[Tensor, int], Tensor], x: Tensor, dim: int) -> Tensor:
    """f along the last dimension, where ATen's CPU loops compute each row by itself. Along another they divide what
    lies beside it among threads, and compute the last few numbers of a part by other code than the rest.
    """
    if x.dim() == 0 or dim in (-1, x.dim() - 1):
        return f(x, dim)
    y = torch.empty_like(x)
    return y.copy_(f(x.movedim(dim, -1).contiguous(), -1).movedim(-1, dim))


def _softmax_pull(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    dy, p = wide(dy), wide(y)
    return (p * (dy - (dy * p).sum(dim, keepdim=True))).to(y.dtype)


class LogSoftmaxFunction(Function):
    """y = log softmax(x) along ``dim``.

    Backward: dx = dy - exp(y) Σ dy. Shapes: any, all equal. dtypes: floating.
    """

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        triton = plain_kernels(x)
        if triton is not None:
            return triton.softmax.forward(x, dim, log=True)
        return _row_by_row(torch.log_softmax, x, dim) if is_batch_invariant() else torch.log_softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        triton = plain_kernels(dy, y)
        if triton is not None:
            return triton.softmax.backward(dy, y, ctx.dim, log=True), None
        if not torch.is_grad_enabled():
            return aten._log_softmax_backward_data.default(dy, y, ctx.dim, y.dtype), None
        dy = wide(dy)
        return (dy - wide(y).exp() * dy.sum(ctx.dim, keepdim=True)).to(y.dtype), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, *_: None) -> Tensor:
        (y,) = ctx.saved_tensors
        tx = wide(tx)
        return (tx - (wide(y).exp() * tx).sum(ctx.dim, keepdim=True)).to(y.dtype)
