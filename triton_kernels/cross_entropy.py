"""Softmax cross-entropy, of classes or of probabilities.

For one position, with logits x_c, m = max x, u = x - m, r = log Σ exp(u) and p = exp(u - r), against weights k_c::

    L = Σ k_c (r - u_c)          dx = (S p - k) dL,  S = Σ k_c

    class t          k_c = w_t (1 - ε) [c = t] + w_c ε/K, and all zero where t is ignored
    probabilities    k_c = w_c ((1 - ε) q_c + ε/K)

Forward reads the logits once, in blocks: m, Σ exp(u) and Σ k_c u_c are carried along and shifted whenever m grows, so
that logits of 1e4 cost no accuracy. It keeps m and r alone; backward reads the logits once more and writes dx into a
tensor of its own. The losses of positions are added up in float64. How positions lie in memory is softmax.py's matter:
classes need not be the last dimension.

A class outside [0, K) that is not ignored reads nothing; its loss and its gradient are NaN, and ``TRITON_DEBUG=1``
makes it a device-side assertion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import exp
from .cast import cast
from .loss import finish
from .softmax import INFINITY, elements, like, locate, merge, rows_of, tile_warps, tuned_rows

__all__ = ["backward", "forward", "probabilities_backward", "probabilities_forward"]


@triton.jit
def class_of(T, W, j, inside, K, ignored, HAS_W: tl.constexpr):
    """Of the positions j: the class, whether it counts, whether it exists, and its weight: 0 where ignored."""
    t = tl.load(T + j, mask=inside, other=0)
    counts = inside & (t != ignored)
    exists = counts & (t >= 0) & (t < K)
    tl.device_assert(exists | (counts == 0), "cross-entropy: a class outside [0, K)")
    if HAS_W:
        a = tl.load(W + t, mask=exists, other=float("nan")).to(tl.float32)
    else:
        a = tl.where(exists, 1.0, float("nan"))
    return t, counts, exists, tl.where(counts, a, 0.0)


@triton.jit
def _class_weights(W, k, K, HAS_W: tl.constexpr):
    """w_c of the classes k, or 1; 0 outside."""
    if HAS_W:
        return tl.load(W + k, mask=k < K, other=0.0).to(tl.float32)
    else:
        return tl.where(k < K, 1.0, 0.0)


@triton.jit
def _weighted_sum(total, weight, x, k_c, mask, m, shift):
    """Σ k_c (x_c - shift), of a block and of those before, whose Σ k_c (x_c - m) is total and Σ k_c is weight."""
    total += tl.where(m == -INFINITY, 0.0, m - shift) * weight
    return total + tl.sum(tl.where(mask, (x - shift[:, None]) * k_c, 0.0), axis=1)


@triton.jit
def put_loss(LOSS, PART, L, j, inside, NONE: tl.constexpr):
    """The loss of each position; or the sum of this program's, for which L must be 0 outside."""
    if NONE:
        tl.store(LOSS + j, cast(L, LOSS.dtype.element_ty), mask=inside)
    else:
        tl.store(PART + tl.program_id(0), tl.sum(L.to(tl.float64), axis=0))


@triton.jit
def _forward(
    X, T, W, M, R, LOSS, PART, positions, K, inner, ignored, keep, share,
    HAS_W: tl.constexpr, SMOOTH: tl.constexpr, NONE: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    """keep = 1 - ε, share = ε/K."""
    base, inside, j = locate(positions, K, inner, P, STRIDED)
    m = tl.full((P,), -INFINITY, dtype=tl.float32)
    s = tl.zeros((P,), dtype=tl.float32)
    u_sum = tl.zeros((P,), dtype=tl.float32)  # Σ w_c u_c
    w_sum = tl.zeros((P,), dtype=tl.float32)  # Σ w_c
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at, mask = elements(base, inside, k, K, inner, STRIDED)
        x = tl.load(X + at, mask=mask, other=-INFINITY).to(tl.float32)
        m_new, s, shift = merge(x, m, s)
        if SMOOTH:
            w = _class_weights(W, k, K, HAS_W)
            u_sum = _weighted_sum(u_sum, w_sum, x, w[None, :], mask, m, shift)
            w_sum += tl.sum(w, axis=0)
        m = m_new
    r = tl.log(s)
    t, counts, exists, a = class_of(T, W, j, inside, K, ignored, HAS_W)
    u_t = tl.load(X + base + t * inner, mask=exists, other=0.0).to(tl.float32) - m
    L = keep * a * (r - u_t)
    if SMOOTH:
        L += share * (w_sum * r - u_sum)
    tl.store(M + j, m, mask=inside)
    tl.store(R + j, r, mask=inside)
    put_loss(LOSS, PART, tl.where(counts, L, 0.0), j, inside, NONE)
    tl.store(PART + tl.num_programs(0) + tl.program_id(0), tl.sum(a.to(tl.float64), axis=0))


@triton.jit
def _backward(
    X, T, W, M, R, DLOSS, TOTAL, W_SUM, DX, positions, K, inner, ignored, keep, share,
    HAS_W: tl.constexpr, SMOOTH: tl.constexpr, NONE: tl.constexpr, MEAN: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    base, inside, j = locate(positions, K, inner, P, STRIDED)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = elements(base, inside, k, K, inner, STRIDED)
    t, counts, exists, a = class_of(T, W, j, inside, K, ignored, HAS_W)
    dL = upstream(DLOSS, TOTAL, j, counts, NONE, MEAN)
    x = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(M + j, mask=inside, other=0.0)
    r = tl.load(R + j, mask=inside, other=0.0)
    p = exp(x - m[:, None] - r[:, None])
    # S p - k, the class and the smoothing each for itself: with one class both are exactly 0.
    dx = (keep * a * dL)[:, None] * (p - tl.where(k[None, :] == t[:, None], 1.0, 0.0))
    if SMOOTH:
        w = _class_weights(W, k, K, HAS_W)
        dx += (share * dL)[:, None] * (p * tl.load(W_SUM) - w[None, :])
    tl.store(DX + at, cast(dx, DX.dtype.element_ty), mask=mask)


@triton.jit
def upstream(DLOSS, TOTAL, j, counts, NONE: tl.constexpr, MEAN: tl.constexpr):
    """dL of each position; 0 where it does not count."""
    if NONE:
        dL = tl.load(DLOSS + j, mask=counts, other=0.0).to(tl.float32)
    else:
        dL = tl.load(DLOSS).to(tl.float32)
        if MEAN:
            dL = tl.div_rn(dL, tl.load(TOTAL))
    return tl.where(counts, dL, 0.0)


@triton.jit
def _weights(Q, W, at, mask, k, K, keep, share, HAS_W: tl.constexpr, SMOOTH: tl.constexpr):
    """k_c = w_c ((1 - ε) q_c + ε/K), 0 outside."""
    weights = tl.load(Q + at, mask=mask, other=0.0).to(tl.float32)
    if SMOOTH:
        weights = tl.where(mask, weights * keep + share, 0.0)
    if HAS_W:
        weights *= _class_weights(W, k, K, True)[None, :]
    return weights


@triton.jit
def _probabilities_forward(
    X, Q, W, M, R, LOSS, PART, positions, K, inner, keep, share,
    HAS_W: tl.constexpr, SMOOTH: tl.constexpr, NONE: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    base, inside, j = locate(positions, K, inner, P, STRIDED)
    m = tl.full((P,), -INFINITY, dtype=tl.float32)
    s = tl.zeros((P,), dtype=tl.float32)
    ku_sum = tl.zeros((P,), dtype=tl.float32)  # Σ k_c u_c
    k_sum = tl.zeros((P,), dtype=tl.float32)  # Σ k_c
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at, mask = elements(base, inside, k, K, inner, STRIDED)
        x = tl.load(X + at, mask=mask, other=-INFINITY).to(tl.float32)
        weights = _weights(Q, W, at, mask, k, K, keep, share, HAS_W, SMOOTH)
        m_new, s, shift = merge(x, m, s)
        ku_sum = _weighted_sum(ku_sum, k_sum, x, weights, mask, m, shift)
        k_sum += tl.sum(weights, axis=1)
        m = m_new
    r = tl.log(s)
    tl.store(M + j, m, mask=inside)
    tl.store(R + j, r, mask=inside)
    L = k_sum * r - ku_sum  # NaN outside
    put_loss(LOSS, PART, L if NONE else tl.where(inside, L, 0.0), j, inside, NONE)


@triton.jit
def _probabilities_backward(
    X, Q, W, M, R, DLOSS, DX, DQ, positions, K, inner, keep, share, divisor,
    HAS_W: tl.constexpr, SMOOTH: tl.constexpr, NONE: tl.constexpr, NEED_X: tl.constexpr, NEED_Q: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    base, inside, j = locate(positions, K, inner, P, STRIDED)
    k_sum = tl.zeros((P,), dtype=tl.float32)
    if NEED_X:
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            at, mask = elements(base, inside, k, K, inner, STRIDED)
            k_sum += tl.sum(_weights(Q, W, at, mask, k, K, keep, share, HAS_W, SMOOTH), axis=1)
    dL = tl.div_rn(upstream(DLOSS, None, j, inside, NONE, False), divisor)
    m = tl.load(M + j, mask=inside, other=0.0)
    r = tl.load(R + j, mask=inside, other=0.0)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at, mask = elements(base, inside, k, K, inner, STRIDED)
        minus_log_p = r[:, None] - (tl.load(X + at, mask=mask, other=0.0).to(tl.float32) - m[:, None])
        if NEED_X:
            weights = _weights(Q, W, at, mask, k, K, keep, share, HAS_W, SMOOTH)
            dx = dL[:, None] * (k_sum[:, None] * exp(-minus_log_p) - weights)
            tl.store(DX + at, cast(dx, DX.dtype.element_ty), mask=mask)
        if NEED_Q:
            dq = (keep * dL)[:, None] * minus_log_p
            if HAS_W:
                dq *= _class_weights(W, k, K, True)[None, :]
            tl.store(DQ + at, cast(dq, DQ.dtype.element_ty), mask=mask)


def _forward_warps(P: int, block: int, smooth: bool) -> int:
    """With smoothing there are sums of two kinds: with fewer threads registers are spilled."""
    return (2 if smooth else 1) * tile_warps(P, block)


def _more_warps(P: int, block: int, strided: bool) -> int:
    """Where classes lie next to each other, the sums of two kinds want more threads, or registers are spilled."""
    return tile_warps(P, block) if strided else 2 * tile_warps(P, block)


def _shape_of_statistics(x: Tensor, c: int) -> tuple[int, ...]:
    return (*x.shape[:c], 1, *x.shape[c + 1 :])


def _smoothing(smoothing: float, K: int) -> tuple[float, float]:
    """1 - ε and ε/K."""
    return 1.0 - smoothing, smoothing / K


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    x: Tensor, c: int, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, total, m, r) for classes t along the dimension c of x, which is not empty."""
    x, rows = rows_of(x, c, in_order=True)
    t, w = t.contiguous(), contiguous(w)
    m = x.new_empty(_shape_of_statistics(x, c), dtype=torch.float32)
    r, none = torch.empty_like(m), reduction == "none"
    loss = x.new_empty(t.shape) if none else None

    def run(P: int, block: int) -> Tensor:
        programs = rows.programs(P)
        part = torch.empty((2, programs), dtype=torch.float64, device=x.device)
        _forward[(programs,)](
            x, t, w, m, r, part if loss is None else loss, part, rows.positions, rows.K, rows.inner, ignore_index,
            *_smoothing(smoothing, rows.K), w is not None, smoothing > 0, none, P, block, rows.strided,
            num_warps=_forward_warps(P, block, smoothing > 0),
        )  # fmt: skip
        return part

    part = tuned_rows("cross-entropy", x, rows, run, "forward")
    reduced, total = finish(part, None if none else x.dtype, None if reduction == "mean" else 1, True)
    return reduced if loss is None else loss, total, m, r


def backward(
    dloss: Tensor, x: Tensor, c: int, t: Tensor, w: Tensor | None, total: Tensor, m: Tensor, r: Tensor,
    ignore_index: int, smoothing: float, reduction: str,
) -> Tensor:  # fmt: skip
    """dx in x's dtype, and in its memory layout where that is dense with positions in order."""
    x, rows = rows_of(x, c, in_order=True)
    dx, none, smooth = torch.empty_like(x), reduction == "none", smoothing > 0
    t, w, m, r = t.contiguous(), contiguous(w), m.contiguous(), r.contiguous()
    dloss = dloss.contiguous()
    w_sum = total
    if smooth:
        w_sum = m.new_full((), float(rows.K)) if w is None else w.sum(dtype=torch.float32)

    def run(P: int, block: int) -> None:
        _backward[rows.programs(P), triton.cdiv(rows.K, block)](
            x, t, w, m, r, dloss, total, w_sum, dx, rows.positions, rows.K, rows.inner, ignore_index,
            *_smoothing(smoothing, rows.K), w is not None, smooth, none, reduction == "mean", P, block, rows.strided,
            num_warps=tile_warps(P, block),
        )  # fmt: skip

    tuned_rows("cross-entropy", x, rows, run, "backward")
    return dx


def probabilities_forward(
    x: Tensor, c: int, q: Tensor, w: Tensor | None, smoothing: float, reduction: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, m, r) for probabilities q of x's shape; the loss in ``dtype``."""
    x, rows = rows_of(x, c, in_order=True)
    q, w = like(q, x), contiguous(w)
    m = x.new_empty(_shape_of_statistics(x, c), dtype=torch.float32)
    r, none = torch.empty_like(m), reduction == "none"
    loss = x.new_empty((*x.shape[:c], *x.shape[c + 1 :]), dtype=dtype) if none else None

    def run(P: int, block: int) -> Tensor:
        programs = rows.programs(P)
        part = m if none else torch.empty((1, programs), dtype=torch.float64, device=x.device)
        _probabilities_forward[(programs,)](
            x, q, w, m, r, part if loss is None else loss, part, rows.positions, rows.K, rows.inner,
            *_smoothing(smoothing, rows.K), w is not None, smoothing > 0, none, P, block, rows.strided,
            num_warps=_more_warps(P, block, rows.strided),
        )  # fmt: skip
        return part

    part = tuned_rows("cross-entropy probabilities", x, rows, run, "forward", share=2)
    if loss is None:
        loss = finish(part, dtype, rows.positions if reduction == "mean" else 1, False)[0]
    return loss, m, r


def probabilities_backward(
    dloss: Tensor, x: Tensor, c: int, q: Tensor, w: Tensor | None, m: Tensor, r: Tensor,
    smoothing: float, reduction: str, needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and dq, those that ``needs`` names, in the dtypes of x and q."""
    x, rows = rows_of(x, c, in_order=True)
    q, w, m, r, dloss = like(q, x), contiguous(w), m.contiguous(), r.contiguous(), dloss.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    dq = torch.empty_like(q) if needs[1] else None

    def run(P: int, block: int) -> None:
        _probabilities_backward[(rows.programs(P),)](
            x, q, w, m, r, dloss, dx, dq, rows.positions, rows.K, rows.inner, *_smoothing(smoothing, rows.K),
            float(rows.positions) if reduction == "mean" else 1.0,
            w is not None, smoothing > 0, reduction == "none", *needs, P, block, rows.strided,
            num_warps=tile_warps(P, block),
        )  # fmt: skip

    tuned_rows("cross-entropy probabilities", x, rows, run, "backward", share=2)
    return dx, dq
