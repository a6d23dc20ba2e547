"""Cross-entropy in one online pass of a Triton kernel, and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import kernels_for
from ..classes import check_classes, class_dim
from ..cross_entropy import CrossEntropyFunction, CrossEntropyProbabilitiesFunction
from ..function import TRITON


def _forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, smoothing: float, reduction: str) -> Any:
    triton = kernels_for(x, t, w) if x.numel() > 0 else None
    if triton is None:
        return NotImplemented
    c = class_dim(x.shape)
    check_classes(t, ignore_index, x.shape[c])
    return triton.cross_entropy.forward(x, c, t, w, ignore_index, smoothing, reduction)


def _backward(
    ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dtotal: Any = None, dm: Any = None, dr: Tensor | None = None
) -> Any:
    x, t, w, total, m, r, *_ = saved
    if dloss is None or dr is not None or r is None or x.numel() == 0:
        return NotImplemented
    triton = kernels_for(x, t, w, dloss)
    if triton is None:
        return NotImplemented
    dx = triton.cross_entropy.backward(
        dloss, x, class_dim(x.shape), t, w, total, m, r, ctx.ignore_index, ctx.smoothing, ctx.reduction
    )
    return dx, None, None, None, None, None


def _probabilities(x: Tensor, q: Tensor, w: Tensor | None, smoothing: float, reduction: str, dtype: torch.dtype) -> Any:
    triton = kernels_for(x, q, w) if x.numel() > 0 else None
    if triton is None:
        return NotImplemented
    return triton.cross_entropy.probabilities_forward(x, class_dim(x.shape), q, w, smoothing, reduction, dtype)


def _probabilities_backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dm: Any, dr: Tensor | None) -> Any:
    x, q, w, m, r = saved
    need_x, need_q, need_w = ctx.needs_input_grad[:3]
    if dloss is None or dr is not None or need_w or x.numel() == 0:
        return NotImplemented
    triton = kernels_for(x, q, w, dloss)
    if triton is None:
        return NotImplemented
    dx, dq = triton.cross_entropy.probabilities_backward(
        dloss, x, class_dim(x.shape), q, w, m, r, ctx.smoothing, ctx.reduction, (need_x, need_q)
    )
    return dx, dq, None, None, None, None


CrossEntropyFunction.faster(TRITON, forward=_forward, backward=_backward)
CrossEntropyProbabilitiesFunction.faster(TRITON, forward=_probabilities, backward=_probabilities_backward)
