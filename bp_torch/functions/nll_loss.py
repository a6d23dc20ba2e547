"""The negative log-likelihood of classes, from log-probabilities.

    forward    L = -w_t x_t, and 0 where t is ignored        backward   dx_c = -w_t dL [c = t]

w, t and the reductions are those of cross_entropy.py, which takes the logarithm of the softmax as well.
Faster ways are in aten/nll_loss.py and gpu/nll_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mode import wide
from .classes import check_range, class_dim, counted, one_hot, weight_of
from .function import Function
from .loss import reduce, spread

__all__ = ["NLLLossFunction", "picked_gradient"]


class NLLLossFunction(Function):
    """(loss, total) with L = -w_t x_t, and 0 where t is ignored; total is what a mean divides by.

    Backward: dx_c = -w_t dL [c = t]. Shapes and dtypes: those of cross_entropy.py's CrossEntropyFunction; x itself is
    not kept.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
        c = class_dim(x.shape)
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
        index, k_t = picked_gradient(dloss, t, w, total, class_dim(ctx.shape), ctx.ignore_index, ctx.reduction)
        dx = torch.where(one_hot(ctx.shape, class_dim(ctx.shape), index), -k_t, 0.0).to(ctx.dtype)
        return dx, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, *_: None) -> tuple[Tensor, Tensor]:
        t, w, total = ctx.saved_tensors
        if tx is None:  # a tangent of the weight alone, which is a constant
            tx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=t.device)
        c = class_dim(tx.shape)
        counts, index = counted(t, ctx.ignore_index, c)
        a = weight_of(w, counts, index, c, total.dtype)
        tL = torch.where(counts, -a * wide(tx.gather(c, index)).squeeze(c), 0.0)
        return reduce(tL, ctx.reduction, total).to(ctx.dtype), torch.zeros_like(total)


def picked_gradient(
    dloss: Tensor, t: Tensor, w: Tensor | None, total: Tensor, c: int, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """The index of each position's class, and w_t dL; c is the dimension of classes."""
    counts, index = counted(t, ignore_index, c)
    one = torch.ones((), dtype=total.dtype, device=total.device)
    share = torch.where(counts, spread(one, reduction, total), 0.0)
    k_t = weight_of(w, counts, index, c, total.dtype) * share * wide(dloss)
    return index, torch.where(counts, k_t, 0.0).unsqueeze(c)  # whatever dloss is
