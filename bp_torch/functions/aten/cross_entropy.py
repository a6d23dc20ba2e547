"""Cross-entropy on the CPU: few logits by ATen's kernels, which keep log p; many piece by piece, so that what is
computed on the way stays in a core's cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._torch import log_softmax_backward
from ...mode import NARROW, wide
from ..classes import class_dim
from ..cross_entropy import (
    CrossEntropyFunction,
    CrossEntropyProbabilitiesFunction,
    k_of,
    loss_of,
    per_class,
    positions,
    shift,
    terms,
    weighted_sum,
)
from ..function import ATEN
from ..loss import reduce, spread
from .loss import CHUNK, KINDS, on_cpu
from .nll_loss import nll_backward, nll_forward

SMALL = 2**14
"""Up to so many logits, the number of operators matters more than the passes over memory."""


def _forward_and_save(
    ctx: Any, x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str
) -> Any:
    """The loss alone. log p is no output: a backward that is itself recorded takes m and r from x."""
    dim = x.dim()
    if smoothing != 0 or dim > 2 or x.numel() > SMALL or not on_cpu(x, t, w):
        return NotImplemented
    u, weight, narrow = x, w, x.dtype in NARROW
    if narrow or not x.is_contiguous():  # nll_loss_backward takes no other layout
        u, weight = wide(x).contiguous(), w if w is None else wide(w)
    log_p = torch.log_softmax(u, dim - 1)
    loss, total = nll_forward(log_p, t, weight, KINDS[reduction], ignore_index)
    ctx.ignore_index, ctx.smoothing, ctx.reduction = ignore_index, 0.0, reduction
    ctx.save_for_backward(x, t, w, total, None, None, log_p)
    return (loss.to(x.dtype) if narrow else loss,)


def _forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str) -> Any:
    if not on_cpu(x, t, w):
        return NotImplemented
    return loss_of(_rows_in_chunks, x, t, w, ignore_index, smoothing, reduction)


def _backward(
    ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dtotal: Any = None, dm: Any = None, dr: Tensor | None = None
) -> Any:
    x, t, w, total, m, r, *rest = saved
    if rest and dloss is not None:
        dx = _small_backward(dloss, x, t, w, total, rest[0], ctx.ignore_index, ctx.reduction)
        return dx, None, None, None, None, None
    if dloss is None or not on_cpu(x, t, w, dloss, dr):
        return NotImplemented
    index, S, k_t, k_rest = terms(dloss, dr, x, t, w, total, ctx.ignore_index, ctx.smoothing, ctx.reduction)
    assert S is not None
    assert k_t is not None
    c, scale = class_dim(x.shape), S * (-r).exp()
    dx = torch.empty_like(x)
    narrow = dx.dtype != m.dtype
    for i in _slices(x):
        d = torch.sub(x[i], m[i]) if narrow else torch.sub(x[i], m[i], out=dx[i])
        d.exp_().mul_(scale[i]).scatter_add_(c, index[i], -k_t[i])
        if k_rest is not None:
            d.sub_(k_rest[i] if w is None else k_rest[i] * per_class(w, x))
        if narrow:
            dx[i] = d
    return dx, None, None, None, None, None


def _small_backward(
    dloss: Tensor,
    x: Tensor,
    t: Tensor,
    w: Tensor | None,
    total: Tensor,
    log_p: Tensor,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """dx, from log p."""
    narrow = x.dtype != log_p.dtype
    if narrow:
        dloss, w = dloss.float(), w if w is None else w.float()
    d = nll_backward(dloss, log_p, t, w, KINDS[reduction], ignore_index, total)
    dx = log_softmax_backward(d, log_p, x.dim() - 1, log_p.dtype)
    return dx.to(x.dtype) if narrow else dx


def _slices(x: Tensor) -> Any:
    """Pieces of about ``CHUNK`` elements along the batch."""
    if x.dim() == 1 or x.numel() <= CHUNK:
        return [slice(None)]
    step = max(1, CHUNK * x.shape[0] // x.numel())
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _rows_in_chunks(
    x: Tensor, index: Tensor, w: Tensor | None, smooth: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """m, r, u_t and, for label smoothing, Σ w_c u_c of each position, in one read of x and no write of its size."""
    c = class_dim(x.shape)
    parts: list[tuple[Tensor, ...]] = []
    for i in _slices(x):
        m = shift(x[i])
        u = torch.sub(x[i], m)
        u_t, u_sum = u.gather(c, index[i]), [weighted_sum(u, w)] if smooth else []
        parts.append((m, u.exp_().sum(c, keepdim=True).log_(), u_t, *u_sum))
    whole = parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return whole[0], whole[1], whole[2], whole[3] if smooth else None


def _probabilities(x: Tensor, q: Tensor, w: Tensor | None, smoothing: float, reduction: str, dtype: torch.dtype) -> Any:
    if not on_cpu(x, q, w) or x.numel() <= CHUNK:
        return NotImplemented
    c, parts = class_dim(x.shape), []
    for i in _slices(x):
        m = shift(x[i])
        u = wide(x[i]) - m
        r = u.exp().sum(c, keepdim=True).log()
        parts.append((m, r, (k_of(q[i], w, smoothing) * (r - u)).sum(c)))
    m, r, L = (torch.cat(column) for column in zip(*parts, strict=True))
    return reduce(L, reduction, positions(x)).to(dtype), m, r


def _probabilities_backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dm: Any, dr: Tensor | None) -> Any:
    x, q, w, m, r = saved
    need_x, need_q, need_w = ctx.needs_input_grad[:3]
    if dloss is None or dr is not None or not need_x or need_q or need_w or not on_cpu(x, q, w, dloss):
        return NotImplemented
    c, dx = class_dim(x.shape), torch.empty_like(x)
    dL = spread(wide(dloss), ctx.reduction, positions(x))
    dL = dL.unsqueeze(c) if ctx.reduction == "none" else dL
    for i in _slices(x):
        k, d = k_of(q[i], w, ctx.smoothing), torch.sub(x[i], m[i]).exp_()
        d.mul_(k.sum(c, keepdim=True) * (-r[i]).exp()).sub_(k)
        dx[i] = d.mul_(dL[i] if dL.dim() > 0 else dL)
    return dx, None, None, None, None, None


CrossEntropyFunction.faster(ATEN, forward_and_save=_forward_and_save, forward=_forward, backward=_backward)
CrossEntropyProbabilitiesFunction.faster(ATEN, forward=_probabilities, backward=_probabilities_backward)
