"""Softmax cross-entropy, the loss of class scores.

For one position, with logits x_c, m = max x, u = x - m, r = log Σ exp(u) and p = exp(u - r) = softmax(x), the
cross-entropy against weights k_c is

    L = Σ k_c (r - u_c) = -Σ k_c log p_c          dx = (S p - k) dL,  S = Σ k_c

    class t          k_c = w_t (1 - ε) [c = t] + w_c ε/K, and all zero where t is ignored
    probabilities    k_c = w_c ((1 - ε) q_c + ε/K)

(w: class weights; ε: label smoothing, Szegedy et al. 2016, arXiv:1512.00567; K classes.) Reductions: "none"; "sum";
"mean", which divides by Σ w_t over the positions not ignored, or by the number of positions for probabilities.

What is kept is x and, for each position, m and r: two numbers instead of the K probabilities. The log-sum-exp m + r is
kept as its two terms because m + r - x would cancel: with r - u, logits of 1e4 cost no accuracy. m is a constant of the
formulas: neither L nor p depends on it.

Faster ways are in aten/cross_entropy.py and gpu/cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..mode import wide
from .classes import check_range, class_dim, counted, one_hot, weight_of
from .function import Function
from .loss import reduce, spread

__all__ = [
    "CrossEntropyFunction",
    "CrossEntropyProbabilitiesFunction",
    "k_of",
    "loss_of",
    "per_class",
    "positions",
    "shift",
    "terms",
    "weighted_sum",
]

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def per_class(w: Tensor, x: Tensor) -> Tensor:
    """(C) shaped to multiply x: (C, 1, ...) after the batch dimension."""
    return w.reshape(w.shape[0], *(1,) * (x.dim() - 1 - class_dim(x.shape)))


def shift(x: Tensor) -> Tensor:
    """m, (N, 1, ...)."""
    return wide(x.detach()).amax(class_dim(x.shape), keepdim=True)


class CrossEntropyFunction(Function):
    """(loss, total, m, r) for class indices t; total is what a mean divides by.

    Shapes: x (C) or (N, C, ...), t () or (N, ...), integers; w (C) of x's dtype, a constant, or None; m and r as x with
    one class. m, r and the sums are float32 for 16-bit x.
    """

    @staticmethod
    def forward(
        x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str
    ) -> Statistics:
        return loss_of(rows_of, x, t, w, ignore_index, smoothing, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, t, w, ctx.ignore_index, ctx.smoothing, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        _, total, m, r = output
        ctx.save_for_backward(x, t, w, total, m, r)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*inputs[:3], *output[1:])

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor | None, dtotal: Any = None, dm: Any = None, dr: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, t, w, total, m, r, *_ = ctx.saved_tensors
        if r is None:  # aten/cross_entropy.py kept log p instead
            m = shift(x)
            r = (wide(x) - m).exp().sum(class_dim(x.shape), keepdim=True).log()
        index, S, k_t, k_rest = terms(dloss, dr, x, t, w, total, ctx.ignore_index, ctx.smoothing, ctx.reduction)
        if S is None:
            return None, None, None, None, None, None
        dx = S * (wide(x) - m - r).exp()
        if k_t is not None:
            dx = dx - torch.where(one_hot(x.shape, class_dim(x.shape), index), k_t, 0.0)
        if k_rest is not None:
            dx = dx - (k_rest if w is None else k_rest * per_class(w, x))
        return dx.to(x.dtype), None, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, *_: None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, t, w, total, m, r = ctx.saved_tensors
        c = class_dim(x.shape)
        counts, index = counted(t, ctx.ignore_index, c)
        tx = wide(torch.zeros_like(x) if tx is None else tx)  # of the weight alone, which is a constant
        tr = ((wide(x) - m - r).exp() * tx).sum(c, keepdim=True)
        a = weight_of(w, counts, index, c, r.dtype)
        tL = (1 - ctx.smoothing) * a * (tr - tx.gather(c, index)).squeeze(c)
        if ctx.smoothing > 0:
            b, W = _smoothing_weight(x, w, ctx.smoothing)
            tL = tL + b * (W * tr - weighted_sum(tx, w)).squeeze(c)
        tloss = reduce(torch.where(counts, tL, 0.0), ctx.reduction, total)
        return tloss.to(x.dtype), torch.zeros_like(total), torch.zeros_like(m), tr


def loss_of(
    rows: Callable[..., Any],
    x: Tensor,
    t: Tensor,
    w: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> Statistics:
    """loss, total, m and r, with :func:`rows_of` or what gives the same."""
    c = class_dim(x.shape)
    counts, index = counted(t, ignore_index, c)
    check_range(index, x.shape[c])
    m, r, u_t, u_sum = rows(x, index, w, smoothing > 0)
    a = weight_of(w, counts, index, c, r.dtype)
    L = torch.where(counts, (1 - smoothing) * a * (r - u_t).squeeze(c), 0.0)
    if u_sum is not None:
        b, W = _smoothing_weight(x, w, smoothing)
        L = L + torch.where(counts, b * (W * r - u_sum).squeeze(c), 0.0)
    total = a.sum()
    return reduce(L, reduction, total).to(x.dtype), total, m, r


def terms(
    dloss: Tensor | None,
    dr: Tensor | None,
    x: Tensor,
    t: Tensor,
    w: Tensor | None,
    total: Tensor,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The index of each position's class, and with dL in them: S and the two terms of k, k_t = (1 - ε) w_t at the class
    and ε/K at all; None where they are 0.
    """
    c = class_dim(x.shape)
    counts, index = counted(t, ignore_index, c)
    if dloss is None:
        return index, dr, None, None
    one = torch.ones((), dtype=total.dtype, device=total.device)
    share = torch.where(counts, spread(one, reduction, total), 0.0)
    # An ignored position has no gradient, whatever dloss is.
    dL = torch.where(counts, wide(dloss) * share, 0.0).unsqueeze(c)
    k_t = (1 - smoothing) * weight_of(w, counts, index, c, total.dtype).unsqueeze(c) * dL
    S, k_rest = k_t, None
    if smoothing > 0:
        b, W = _smoothing_weight(x, w, smoothing)
        k_rest = b * dL
        S = S + W * k_rest
    return index, S if dr is None else S + dr, k_t, k_rest


def _smoothing_weight(x: Tensor, w: Tensor | None, smoothing: float) -> tuple[float, Tensor | float]:
    """ε/K and Σ w_c."""
    K = x.shape[class_dim(x.shape)]
    return smoothing / K, K if w is None else wide(w).sum()


def weighted_sum(u: Tensor, w: Tensor | None) -> Tensor:
    """Σ w_c u_c."""
    return (u if w is None else u * per_class(w, u)).sum(class_dim(u.shape), keepdim=True)


def rows_of(x: Tensor, index: Tensor, w: Tensor | None, smooth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """m, r, u_t and, for label smoothing, Σ w_c u_c of each position."""
    c, m = class_dim(x.shape), shift(x)
    u = wide(x) - m
    r = u.exp().sum(c, keepdim=True).log()
    return m, r, u.gather(c, index), weighted_sum(u, w) if smooth else None


class CrossEntropyProbabilitiesFunction(Function):
    """(loss, m, r) for class probabilities q.

    Shapes: x and q (C) or (N, C, ...); w (C) or None; m and r as x with one class. Differentiable in x, q and w.
    """

    @staticmethod
    def forward(
        x: Tensor, q: Tensor, w: Tensor | None, smoothing: float, reduction: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = class_dim(x.shape)
        m = shift(x)
        u = wide(x) - m
        r = u.exp().sum(c, keepdim=True).log()
        L = (k_of(q, w, smoothing) * (r - u)).sum(c)
        return reduce(L, reduction, positions(x)).to(dtype), m, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, q, w, ctx.smoothing, ctx.reduction, ctx.dtype = inputs
        ctx.set_materialize_grads(False)
        _, m, r = output
        ctx.save_for_backward(x, q, w, m, r)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*inputs[:3], *output[1:])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, dm: Any, dr: Tensor | None) -> tuple[Tensor | None, ...]:
        x, q, w, m, r = ctx.saved_tensors
        need_x, need_q, need_w = ctx.needs_input_grad[:3]
        c, dx, dq, dw = class_dim(x.shape), None, None, None
        if dloss is not None:
            dL = spread(wide(dloss), ctx.reduction, positions(x))
            dL = dL.unsqueeze(c) if ctx.reduction == "none" else dL
        minus_log_p = r - (wide(x) - m)
        if dr is not None and need_x:
            dx = dr * (-minus_log_p).exp()
        if dloss is not None:
            if need_x:
                k = k_of(q, w, ctx.smoothing)
                dk = dL * (k.sum(c, keepdim=True) * (-minus_log_p).exp() - k)
                dx = dk if dx is None else dx + dk
            if need_q:
                dq = (1 - ctx.smoothing) * dL * minus_log_p
                dq = dq if w is None else dq * per_class(w, x)
            if need_w:
                dw = dL * k_of(q, None, ctx.smoothing) * minus_log_p
                dw = dw.movedim(c, 0).reshape(x.shape[c], positions(x)).sum(1)
        return (
            None if dx is None else dx.to(x.dtype),
            None if dq is None else dq.to(q.dtype),
            None if dw is None else dw.to(w.dtype),
            None, None, None,
        )  # fmt: skip

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tq: Tensor | None, tw: Tensor | None, *_: None) -> tuple[Tensor, ...]:
        x, q, w, m, r = ctx.saved_tensors
        c, k = class_dim(x.shape), k_of(q, w, ctx.smoothing)
        minus_log_p = r - (wide(x) - m)
        tr, tL = torch.zeros_like(r), torch.zeros_like(k * minus_log_p)
        if tx is not None:
            tr = ((-minus_log_p).exp() * tx).sum(c, keepdim=True)
            tL = tL + k * (tr - tx)
        if tq is not None:
            tk = (1 - ctx.smoothing) * tq
            tL = tL + (tk if w is None else tk * per_class(w, x)) * minus_log_p
        if tw is not None:
            tL = tL + k_of(q, None, ctx.smoothing) * per_class(tw, x) * minus_log_p
        return reduce(tL.sum(c), ctx.reduction, positions(x)).to(ctx.dtype), torch.zeros_like(m), tr


def k_of(q: Tensor, w: Tensor | None, smoothing: float) -> Tensor:
    """The weights k_c, in float32 or wider."""
    k = wide(q)
    k = (1 - smoothing) * k + smoothing / q.shape[class_dim(q.shape)] if smoothing > 0 else k
    return k if w is None else k * per_class(wide(w), q)


def positions(x: Tensor) -> int:
    """How many positions have a loss: N d1 d2 ..., and 1 for (C)."""
    return x.numel() // x.shape[class_dim(x.shape)]
