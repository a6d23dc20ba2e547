"""The negative log-likelihood of classes, from log-probabilities.

    forward    L = -w_t x_t, and 0 where t is ignored        backward   dx_c = -w_t dL [c = t]

w, t and the reductions are those of cross_entropy.py, which takes the logarithm of the softmax as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import plain_kernels
from ..mode import NARROW, wide
from .classes import check_classes, check_range, class_dim, counted, one_hot, weight_of
from .function import Function
from .loss import KINDS, fast_on_cpu, reduce, spread

__all__ = ["NLLLossFunction"]

_nll_forward = torch.ops.aten.nll_loss_forward.default
_nll_backward = torch.ops.aten.nll_loss_backward.default


class NLLLossFunction(Function):
    """(loss, total) with L = -w_t x_t, and 0 where t is ignored; total is what a mean divides by.

    Backward: dx_c = -w_t dL [c = t]. Shapes and dtypes: those of cross_entropy.py's CrossEntropyFunction; x itself is
    not kept.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
        c = class_dim(x)
        triton = plain_kernels(x, t, w) if x.numel() > 0 else None
        if triton is not None:
            check_classes(t, ignore_index, x.shape[c])
            return triton.nll_loss.forward(x, c, t, w, ignore_index, reduction)
        if x.dim() <= 2 and x.dtype not in NARROW and fast_on_cpu(x, t, w):
            loss, total = _nll_forward(x, t, w, KINDS[reduction], ignore_index)
            return loss, total
        counts, index = counted(t, ignore_index, c)
        check_range(index, x.shape[c])
        picked = wide(x.gather(c, index)).squeeze(c)
        a = weight_of(w, counts, index, c, picked.dtype)
        L = torch.where(counts, -a * picked, 0.0)
        total = a.sum()
        return reduce(L, reduction, total).to(x.dtype), total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, t, w, ctx.ignore_index, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(t, w, output[1])

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*inputs[1:3], output[1])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dtotal: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return None, None, None, None, None
        t, w, total = ctx.saved_tensors
        c = 0 if len(ctx.shape) == 1 else 1
        # t is an integer: dloss tells the dtype of x.
        triton = plain_kernels(dloss, t, w) if math.prod(ctx.shape) > 0 else None
        if triton is not None:
            dx = triton.nll_loss.backward(dloss, ctx.shape, c, ctx.dtype, t, w, total, ctx.ignore_index, ctx.reduction)
            return dx, None, None, None, None
        fast = fast_on_cpu(t, w, dloss)
        if fast and len(ctx.shape) <= 2 and ctx.dtype == total.dtype:
            x = torch.empty(ctx.shape, dtype=ctx.dtype)  # tells the shape
            kind = KINDS[ctx.reduction]
            return _nll_backward(dloss, x, t, w, kind, ctx.ignore_index, total), *(None,) * 4
        counts, index = counted(t, ctx.ignore_index, c)
        one = torch.ones((), dtype=total.dtype, device=total.device)
        share = torch.where(counts, spread(one, ctx.reduction, total), 0.0)
        k_t = weight_of(w, counts, index, c, total.dtype) * share * wide(dloss)
        k_t = torch.where(counts, k_t, 0.0).unsqueeze(c)  # whatever dloss is
        if fast:
            dx = torch.zeros(ctx.shape, dtype=ctx.dtype).scatter_(c, index, -k_t.to(ctx.dtype))
        else:
            dx = torch.where(one_hot(ctx.shape, c, index), -k_t, 0.0).to(ctx.dtype)
        return dx, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, *_: None) -> tuple[Tensor, Tensor]:
        t, w, total = ctx.saved_tensors
        if tx is None:  # a tangent of the weight alone, which is a constant
            tx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=t.device)
        c = class_dim(tx)
        counts, index = counted(t, ctx.ignore_index, c)
        a = weight_of(w, counts, index, c, total.dtype)
        tL = torch.where(counts, -a * wide(tx.gather(c, index)).squeeze(c), 0.0)
        return reduce(tL, ctx.reduction, total).to(ctx.dtype), torch.zeros_like(total)
