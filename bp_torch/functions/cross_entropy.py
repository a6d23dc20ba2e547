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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import log_softmax_backward
from ..backends import current_backend, plain_kernels
from ..mode import NARROW, is_plain, wide
from .classes import check_classes, check_range, class_dim, counted, one_hot, weight_of
from .function import Function
from .loss import KINDS, fast_on_cpu, on_cpu, reduce, spread

__all__ = ["CrossEntropyFunction", "CrossEntropyProbabilitiesFunction"]

_nll_forward = torch.ops.aten.nll_loss_forward.default
_nll_backward = torch.ops.aten.nll_loss_backward.default
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]

CHUNK = 2**17
"""Elements of x that one step of a fast path takes: their temporaries stay in a core's cache."""
SMALL = 2**14
"""Up to so many logits, the number of operators matters more than the passes over memory."""


def _per_class(w: Tensor, x: Tensor) -> Tensor:
    """(C) shaped to multiply x: (C, 1, ...) after the batch dimension."""
    return w.reshape(w.shape[0], *(1,) * (x.dim() - 1 - class_dim(x)))


def _shift(x: Tensor) -> Tensor:
    """m, (N, 1, ...)."""
    return wide(x.detach()).amax(class_dim(x), keepdim=True)


class CrossEntropyFunction(Function):
    """(loss, total, m, r) for class indices t; total is what a mean divides by.

    Shapes: x (C) or (N, C, ...), t () or (N, ...), integers; w (C) of x's dtype, a constant, or None; m and r as x with
    one class. m, r and the sums are float32 for 16-bit x.

    Few logits in reverse mode: (loss,) alone, by ATen's kernels, which keep log p. Only they use it; a backward that is
    itself recorded takes m and r from x.
    """

    @staticmethod
    def forward(
        x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str
    ) -> Statistics:
        c, fast = class_dim(x), fast_on_cpu(x, t, w)
        triton = plain_kernels(x, t, w) if x.numel() > 0 else None
        if triton is not None:
            check_classes(t, ignore_index, x.shape[c])
            return triton.cross_entropy.forward(x, c, t, w, ignore_index, smoothing, reduction)
        counts, index = counted(t, ignore_index, c)
        check_range(index, x.shape[c])
        m, r, u_t, u_sum = (_rows_in_chunks if fast else _rows)(x, index, w, smoothing > 0)
        a = weight_of(w, counts, index, c, r.dtype)
        L = torch.where(counts, (1 - smoothing) * a * (r - u_t).squeeze(c), 0.0)
        if u_sum is not None:
            b, W = _smoothing_weight(x, w, smoothing)
            L = L + torch.where(counts, b * (W * r - u_sum).squeeze(c), 0.0)
        total = a.sum()
        return reduce(L, reduction, total).to(x.dtype), total, m, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, t, w, ctx.ignore_index, ctx.smoothing, ctx.reduction = inputs
        ctx.set_materialize_grads(False)
        _, total, m, r = output
        ctx.small = None
        ctx.save_for_backward(x, t, w, total, m, r)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_forward(*inputs[:3], *output[1:])

    @staticmethod
    def forward_and_save(
        ctx: Any, x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str
    ) -> Statistics | tuple[Tensor]:
        dim = x.dim()
        # Few calls of Python, for each takes as long as a pass over so few numbers.
        if smoothing != 0 or dim > 2 or x.numel() > SMALL or current_backend() == "triton" or not on_cpu(x, t, w):
            inputs = x, t, w, ignore_index, smoothing, reduction
            outputs = CrossEntropyFunction.forward(*inputs)
            CrossEntropyFunction.setup_context(ctx, inputs, outputs)
            return outputs
        u, weight, narrow = x, w, x.dtype in NARROW
        if narrow or not x.is_contiguous():  # nll_loss_backward takes no other layout
            u, weight = wide(x).contiguous(), w if w is None else wide(w)
        log_p = torch.log_softmax(u, dim - 1)
        # In two calls they pick, weigh, ignore, reduce and check the range.
        loss, total = _nll_forward(log_p, t, weight, KINDS[reduction], ignore_index)
        ctx.small = dim - 1, ignore_index, reduction
        ctx.save_for_backward(x, t, w, total, log_p)
        return (loss.to(x.dtype) if narrow else loss,)

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor | None, dtotal: Any = None, dm: Any = None, dr: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if ctx.small is not None:
            assert dloss is not None, "the gradient of an only output"
            return _small_backward(ctx, dloss)
        x, t, w, total, m, r = ctx.saved_tensors
        return _backward(ctx, dloss, dr, x, t, w, total, m, r)

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, *_: None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, t, w, total, m, r = ctx.saved_tensors
        c = class_dim(x)
        counts, index = counted(t, ctx.ignore_index, c)
        tx = wide(torch.zeros_like(x) if tx is None else tx)  # of the weight alone, which is a constant
        tr = ((wide(x) - m - r).exp() * tx).sum(c, keepdim=True)
        a = weight_of(w, counts, index, c, r.dtype)
        tL = (1 - ctx.smoothing) * a * (tr - tx.gather(c, index)).squeeze(c)
        if ctx.smoothing > 0:
            b, W = _smoothing_weight(x, w, ctx.smoothing)
            tL = tL + b * (W * tr - _weighted_sum(tx, w)).squeeze(c)
        tloss = reduce(torch.where(counts, tL, 0.0), ctx.reduction, total)
        return tloss.to(x.dtype), torch.zeros_like(total), torch.zeros_like(m), tr


def _backward(
    ctx: Any,
    dloss: Tensor | None,
    dr: Tensor | None,
    x: Tensor,
    t: Tensor,
    w: Tensor | None,
    total: Tensor,
    m: Tensor,
    r: Tensor,
) -> tuple[Tensor | None, ...]:
    """dx from what forward returned, and a None for each other argument."""
    c = class_dim(x)
    triton = plain_kernels(x, t, w, dloss) if dloss is not None and dr is None and x.numel() > 0 else None
    if triton is not None:
        dx = triton.cross_entropy.backward(
            dloss, x, c, t, w, total, m, r, ctx.ignore_index, ctx.smoothing, ctx.reduction
        )
        return dx, None, None, None, None, None
    counts, index = counted(t, ctx.ignore_index, c)
    one = torch.ones((), dtype=r.dtype, device=r.device)
    share = torch.where(counts, spread(one, ctx.reduction, total), 0.0)
    # An ignored position has no gradient, whatever dloss is.
    dL = None if dloss is None else torch.where(counts, wide(dloss) * share, 0.0).unsqueeze(c)
    if dL is None:
        dx = None if dr is None else dr * (wide(x) - m - r).exp()
        return dx if dx is None else dx.to(x.dtype), None, None, None, None, None
    k_t = (1 - ctx.smoothing) * weight_of(w, counts, index, c, r.dtype).unsqueeze(c) * dL
    S, k_rest = k_t, None
    if ctx.smoothing > 0:
        b, W = _smoothing_weight(x, w, ctx.smoothing)
        k_rest = b * dL
        S = S + W * k_rest
    if dr is not None:
        S = S + dr
    if fast_on_cpu(x, t, w, dloss, dr):
        return _backward_in_chunks(x, index, w, m, r, S, k_t, k_rest), None, None, None, None, None
    dx = S * (wide(x) - m - r).exp() - torch.where(one_hot(x.shape, c, index), k_t, 0.0)
    if k_rest is not None:
        dx = dx - (k_rest if w is None else k_rest * _per_class(w, x))
    return dx.to(x.dtype), None, None, None, None, None


def _smoothing_weight(x: Tensor, w: Tensor | None, smoothing: float) -> tuple[float, Tensor | float]:
    """ε/K and Σ w_c."""
    K = x.shape[class_dim(x)]
    return smoothing / K, K if w is None else wide(w).sum()


def _weighted_sum(u: Tensor, w: Tensor | None) -> Tensor:
    """Σ w_c u_c."""
    return (u if w is None else u * _per_class(w, u)).sum(class_dim(u), keepdim=True)


def _rows(x: Tensor, index: Tensor, w: Tensor | None, smooth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """m, r, u_t and, for label smoothing, Σ w_c u_c of each position."""
    c, m = class_dim(x), _shift(x)
    u = wide(x) - m
    r = u.exp().sum(c, keepdim=True).log()
    return m, r, u.gather(c, index), _weighted_sum(u, w) if smooth else None


def _slices(x: Tensor) -> Any:
    """Pieces of about ``CHUNK`` elements along the batch."""
    if x.dim() == 1 or x.numel() <= CHUNK:
        return [slice(None)]
    step = max(1, CHUNK * x.shape[0] // x.numel())
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _rows_in_chunks(
    x: Tensor, index: Tensor, w: Tensor | None, smooth: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :func:`_rows`, reading x once and writing nothing of its size."""
    c = class_dim(x)
    parts: list[tuple[Tensor, ...]] = []
    for i in _slices(x):
        m = _shift(x[i])
        u = torch.sub(x[i], m)
        u_t, u_sum = u.gather(c, index[i]), [_weighted_sum(u, w)] if smooth else []
        parts.append((m, u.exp_().sum(c, keepdim=True).log_(), u_t, *u_sum))
    whole = parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return whole[0], whole[1], whole[2], whole[3] if smooth else None


def _backward_in_chunks(
    x: Tensor, index: Tensor, w: Tensor | None, m: Tensor, r: Tensor, S: Tensor, k_t: Tensor, k_rest: Tensor | None
) -> Tensor:
    """dx = S p - k, writing dx once."""
    c, scale = class_dim(x), S * (-r).exp()
    dx = torch.empty_like(x)
    narrow = dx.dtype != m.dtype
    for i in _slices(x):
        d = torch.sub(x[i], m[i]) if narrow else torch.sub(x[i], m[i], out=dx[i])
        d.exp_().mul_(scale[i]).scatter_add_(c, index[i], -k_t[i])
        if k_rest is not None:
            d.sub_(k_rest[i] if w is None else k_rest[i] * _per_class(w, x))
        if narrow:
            dx[i] = d
    return dx


def _small_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    """From log p, where no derivative is being taken of it; else from x."""
    x, t, w, total, log_p = ctx.saved_tensors
    c, ignore_index, kind = ctx.small
    if not is_plain(dloss):
        ctx.ignore_index, ctx.smoothing, ctx.reduction = ignore_index, 0.0, kind
        m = _shift(x)
        return _backward(ctx, dloss, None, x, t, w, total, m, (wide(x) - m).exp().sum(c, keepdim=True).log())
    narrow = x.dtype != log_p.dtype
    if narrow:
        dloss, w = dloss.float(), w if w is None else w.float()
    d = _nll_backward(dloss, log_p, t, w, KINDS[kind], ignore_index, total)
    dx = log_softmax_backward(d, log_p, c, log_p.dtype)
    return dx.to(x.dtype) if narrow else dx, None, None, None, None, None


class CrossEntropyProbabilitiesFunction(Function):
    """(loss, m, r) for class probabilities q.

    Shapes: x and q (C) or (N, C, ...); w (C) or None; m and r as x with one class. Differentiable in x, q and w.
    """

    @staticmethod
    def forward(
        x: Tensor, q: Tensor, w: Tensor | None, smoothing: float, reduction: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = class_dim(x)
        triton = plain_kernels(x, q, w) if x.numel() > 0 else None
        if triton is not None:
            return triton.cross_entropy.probabilities_forward(x, c, q, w, smoothing, reduction, dtype)
        rows = [slice(None)] if not fast_on_cpu(x, q, w) else _slices(x)
        parts = []
        for i in rows:
            m = _shift(x[i])
            u = wide(x[i]) - m
            r = u.exp().sum(c, keepdim=True).log()
            parts.append((m, r, (_k(q[i], w, smoothing) * (r - u)).sum(c)))
        m, r, L = parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return reduce(L, reduction, _positions(x)).to(dtype), m, r

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
        c, dx, dq, dw = class_dim(x), None, None, None
        fused = dloss is not None and dr is None and not need_w and x.numel() > 0
        triton = plain_kernels(x, q, w, dloss) if fused else None
        if triton is not None:
            dx, dq = triton.cross_entropy.probabilities_backward(
                dloss, x, c, q, w, m, r, ctx.smoothing, ctx.reduction, (need_x, need_q)
            )
            return dx, dq, None, None, None, None
        if dloss is not None:
            dL = spread(wide(dloss), ctx.reduction, _positions(x))
            dL = dL.unsqueeze(c) if ctx.reduction == "none" else dL
            if need_x and dr is None and not need_q and not need_w and fast_on_cpu(x, q, w, dloss):
                return _probabilities_backward_in_chunks(x, q, w, m, r, dL, ctx.smoothing), *(None,) * 5
        minus_log_p = r - (wide(x) - m)
        if dr is not None and need_x:
            dx = dr * (-minus_log_p).exp()
        if dloss is not None:
            if need_x:
                k = _k(q, w, ctx.smoothing)
                dk = dL * (k.sum(c, keepdim=True) * (-minus_log_p).exp() - k)
                dx = dk if dx is None else dx + dk
            if need_q:
                dq = (1 - ctx.smoothing) * dL * minus_log_p
                dq = dq if w is None else dq * _per_class(w, x)
            if need_w:
                dw = dL * _k(q, None, ctx.smoothing) * minus_log_p
                dw = dw.movedim(c, 0).reshape(x.shape[c], _positions(x)).sum(1)
        return (
            None if dx is None else dx.to(x.dtype),
            None if dq is None else dq.to(q.dtype),
            None if dw is None else dw.to(w.dtype),
            None, None, None,
        )  # fmt: skip

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tq: Tensor | None, tw: Tensor | None, *_: None) -> tuple[Tensor, ...]:
        x, q, w, m, r = ctx.saved_tensors
        c, k = class_dim(x), _k(q, w, ctx.smoothing)
        minus_log_p = r - (wide(x) - m)
        tr, tL = torch.zeros_like(r), torch.zeros_like(k * minus_log_p)
        if tx is not None:
            tr = ((-minus_log_p).exp() * tx).sum(c, keepdim=True)
            tL = tL + k * (tr - tx)
        if tq is not None:
            tk = (1 - ctx.smoothing) * tq
            tL = tL + (tk if w is None else tk * _per_class(w, x)) * minus_log_p
        if tw is not None:
            tL = tL + _k(q, None, ctx.smoothing) * _per_class(tw, x) * minus_log_p
        return reduce(tL.sum(c), ctx.reduction, _positions(x)).to(ctx.dtype), torch.zeros_like(m), tr


def _probabilities_backward_in_chunks(
    x: Tensor, q: Tensor, w: Tensor | None, m: Tensor, r: Tensor, dL: Tensor, smoothing: float
) -> Tensor:
    """dx = dL (S p - k), writing dx once."""
    c, dx = class_dim(x), torch.empty_like(x)
    for i in _slices(x):
        k, d = _k(q[i], w, smoothing), torch.sub(x[i], m[i]).exp_()
        d.mul_(k.sum(c, keepdim=True) * (-r[i]).exp()).sub_(k)
        dx[i] = d.mul_(dL[i] if dL.dim() > 0 else dL)
    return dx


def _k(q: Tensor, w: Tensor | None, smoothing: float) -> Tensor:
    """The weights k_c, in float32 or wider."""
    k = wide(q)
    k = (1 - smoothing) * k + smoothing / q.shape[class_dim(q)] if smoothing > 0 else k
    return k if w is None else k * _per_class(wide(w), q)


def _positions(x: Tensor) -> int:
    """How many positions have a loss: N d1 d2 ..., and 1 for (C)."""
    return x.numel() // x.shape[class_dim(x)]
