"""The negative log-likelihood by Triton kernels."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ...backends import kernels_for
from ..classes import check_classes, class_dim
from ..function import TRITON
from ..nll_loss import NLLLossFunction


def _forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, reduction: str) -> Any:
    triton = kernels_for(x, t, w) if x.numel() > 0 else None
    if triton is None:
        return NotImplemented
    c = class_dim(x.shape)
    check_classes(t, ignore_index, x.shape[c])
    return triton.nll_loss.forward(x, c, t, w, ignore_index, reduction)


def _backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dtotal: Any) -> Any:
    t, w, total = saved
    if dloss is None or math.prod(ctx.shape) == 0:
        return NotImplemented
    triton = kernels_for(dloss, t, w)  # t is an integer: dloss tells the dtype of x
    if triton is None:
        return NotImplemented
    c = class_dim(ctx.shape)
    dx = triton.nll_loss.backward(dloss, ctx.shape, c, ctx.dtype, t, w, total, ctx.ignore_index, ctx.reduction)
    return dx, None, None, None, None


NLLLossFunction.faster(TRITON, forward=_forward, backward=_backward)
