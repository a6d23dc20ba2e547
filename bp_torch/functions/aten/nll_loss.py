"""The negative log-likelihood by ATen's own kernels, which pick, weigh, ignore, reduce and check the range in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...mode import NARROW
from ..classes import class_dim
from ..function import ATEN
from ..nll_loss import NLLLossFunction, picked_gradient
from .loss import KINDS, on_cpu

__all__ = ["nll_backward", "nll_forward"]

nll_forward = torch.ops.aten.nll_loss_forward.default
nll_backward = torch.ops.aten.nll_loss_backward.default


def _forward(x: Tensor, t: Tensor, w: Tensor | None, ignore_index: int, reduction: str) -> Any:
    if x.dim() > 2 or x.dtype in NARROW or not on_cpu(x, t, w):
        return NotImplemented
    return tuple(nll_forward(x, t, w, KINDS[reduction], ignore_index))


def _backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor | None, dtotal: Any) -> Any:
    t, w, total = saved
    if dloss is None or not on_cpu(t, w, dloss):
        return NotImplemented
    if len(ctx.shape) <= 2 and ctx.dtype == total.dtype:
        x = torch.empty(ctx.shape, dtype=ctx.dtype)  # tells the shape
        dx = nll_backward(dloss, x, t, w, KINDS[ctx.reduction], ctx.ignore_index, total)
    else:
        c = class_dim(ctx.shape)
        index, k_t = picked_gradient(dloss, t, w, total, c, ctx.ignore_index, ctx.reduction)
        dx = torch.zeros(ctx.shape, dtype=ctx.dtype).scatter_(c, index, -k_t.to(ctx.dtype))
    return dx, None, None, None, None


NLLLossFunction.faster(ATEN, forward=_forward, backward=_backward)
