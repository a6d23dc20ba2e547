"""Losses between a prediction and a target in one Triton kernel each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import kernels_for
from ..function import TRITON
from ..loss import BCEWithLogitsFunction, ErrorLossFunction


def _kernels(x: Tensor, t: Tensor, w: Tensor | None, *others: Tensor | None) -> Any:
    return kernels_for(x, t, w, *others) if x.numel() > 0 else None


def _forward(
    x: Tensor, t: Tensor, w: Tensor | None, error: str, parameter: float, reduction: str, dtype: torch.dtype
) -> Any:
    alike = w is None or w.shape == x.shape  # Σw counts each weight once
    triton = _kernels(x, t, w) if alike else None
    if triton is None:
        return NotImplemented
    return triton.loss.forward(x, t, w, None, error, parameter, reduction, dtype)


def _backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> Any:
    x, t, w = saved
    triton = _kernels(x, t, w, dloss) if w is None or w.shape == x.shape else None
    if triton is None:
        return NotImplemented
    needs = ctx.needs_input_grad[:3]
    dx_dt_dw = triton.loss.backward(dloss, x, t, w, None, ctx.error, ctx.parameter, ctx.reduction, needs)
    return *dx_dt_dw, None, None, None, None


def _bce(x: Tensor, t: Tensor, w: Tensor | None, pi: Tensor | None, reduction: str) -> Any:
    triton = _kernels(x, t, w, pi)
    return NotImplemented if triton is None else triton.loss.forward(x, t, w, pi, "bce", 0.0, reduction, t.dtype)


def _bce_backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> Any:
    x, t, w, pi = saved
    need_x, need_t, need_w, need_pi = ctx.needs_input_grad[:4]
    triton = None if need_w or need_pi else _kernels(x, t, w, pi, dloss)
    if triton is None:
        return NotImplemented
    dx, dt, _ = triton.loss.backward(dloss, x, t, w, pi, "bce", 0.0, ctx.reduction, (need_x, need_t, False))
    return dx, dt, None, None, None


ErrorLossFunction.faster(TRITON, forward=_forward, backward=_backward)
BCEWithLogitsFunction.faster(TRITON, forward=_bce, backward=_bce_backward)
