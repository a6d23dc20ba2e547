"""Losses between a prediction x and a target t of the same shape.

    forward    loss = R(w ⊙ ρ(e)),  e = x - t         backward   dx = dR ⊙ w ⊙ ρ′(e),  dt = -dx,  dw = dR ⊙ ρ(e)

R is the reduction: nothing ("none"), Σ ("sum"), Σ/n ("mean") or Σ/Σw ("weighted mean"); dR is dloss, dloss, dloss/n or
dloss/Σw for each element. ρ is a row of :data:`ERRORS`.

    BCE with logits   loss = R(w ⊙ ((1 - t) x + λ log(1 + exp(-x)))),   λ = 1 + (π - 1) t
               backward   dx = dR ⊙ w ⊙ (λ σ(x) - π t),   dt = dR ⊙ w ⊙ ((π - 1) log(1 + exp(-x)) - x)
                          dw = dR ⊙ ρ,   dπ = dR ⊙ w ⊙ t log(1 + exp(-x)),   ρ what w multiplies

The losses of class scores are in cross_entropy.py and nll_loss.py, faster ways in aten/loss.py and gpu/loss.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mode import wide
from .function import Function

__all__ = [
    "ERRORS",
    "BCEWithLogitsFunction",
    "ErrorLossFunction",
    "bce",
    "bce_dx",
    "reduce",
    "spread",
    "total_of",
]


@dataclass(frozen=True)
class Error:
    """One row: ρ and ρ′ as functions of e and of the loss's parameter."""

    rho: Callable[[Tensor, float], Tensor]
    drho: Callable[[Tensor, float], Tensor]
    formula: str
    source: str


def _smooth_l1(e: Tensor, beta: float) -> Tensor:
    c = (e / beta).clamp(-1, 1)
    return c * (e - 0.5 * beta * c)


def _huber(e: Tensor, delta: float) -> Tensor:
    c = e.clamp(-delta, delta)
    return c * (e - 0.5 * c)


ERRORS: dict[str, Error] = {
    "mse": Error(
        rho=lambda e, _: e * e, drho=lambda e, _: 2 * e,
        formula="e²", source="torch.nn.MSELoss",
    ),
    "l1": Error(
        rho=lambda e, _: e.abs(), drho=lambda e, _: torch.sign(e),
        formula="|e|; ρ′(0) = 0", source="torch.nn.L1Loss",
    ),
    "smooth_l1": Error(
        rho=_smooth_l1, drho=lambda e, beta: (e / beta).clamp(-1, 1),
        formula="e²/(2β) if |e| < β else |e| - β/2", source="torch.nn.SmoothL1Loss; Girshick 2015, arXiv:1504.08083",
    ),
    "huber": Error(
        rho=_huber, drho=lambda e, delta: e.clamp(-delta, delta),
        formula="e²/2 if |e| ≤ δ else δ (|e| - δ/2)", source="torch.nn.HuberLoss; Huber 1964",
    ),
}  # fmt: skip


def reduce(L: Tensor, reduction: str, total: Tensor | float | None = None) -> Tensor:
    """R(L); ``total`` is what a mean divides by, if not the number of elements."""
    if reduction == "none":
        return L
    if reduction == "sum":
        return L.sum()
    return L.mean() if total is None else L.sum() / total


def spread(dloss: Tensor, reduction: str, total: Tensor | float) -> Tensor:
    """dR: the gradient of each element before the reduction, or one number for all of them."""
    return dloss / total if reduction.endswith("mean") else dloss


class ErrorLossFunction(Function):
    """loss = R(w ⊙ ρ(x - t)).

    Shapes: x and t equal; w, which may be None, broadcasts to them. The loss has the dtype ``dtype``.
    """

    @staticmethod
    def forward(
        x: Tensor, t: Tensor, w: Tensor | None, error: str, parameter: float, reduction: str, dtype: torch.dtype
    ) -> Tensor:
        L = ERRORS[error].rho(wide(x) - wide(t), parameter)
        if w is not None:
            L = L * wide(w)
        return reduce(L, reduction, total_of(reduction, x, w)).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, t, w, ctx.error, ctx.parameter, ctx.reduction, ctx.dtype = inputs
        ctx.w_dtype = None if w is None else w.dtype
        needs = any(ctx.needs_input_grad[:3])
        ctx.save_for_backward(x if needs else None, t if needs else None, w if needs else None)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w = ctx.saved_tensors
        need_x, need_t, need_w = ctx.needs_input_grad[:3]
        w = None if w is None else wide(w)
        row, e, dx, dw = ERRORS[ctx.error], wide(x) - wide(t), None, None
        total = total_of(ctx.reduction, x, w)
        dR = spread(wide(dloss), ctx.reduction, total)
        if need_x or need_t:
            dx = row.drho(e, ctx.parameter) * (dR if w is None else dR * w)
        if need_w and w is not None:
            L = row.rho(e, ctx.parameter)
            dw = (L * dR).sum_to_size(w.shape)
            if ctx.reduction == "weighted mean":
                # Σw depends on w too: ∂(Σ w L/Σw)/∂w = (L - loss)/Σw. Σw counts each w once, however it broadcasts.
                dw = dw - (L * w).sum() / total * dR
        return (
            dx.to(x.dtype) if need_x and dx is not None else None,
            (-dx).to(t.dtype) if need_t and dx is not None else None,
            None if dw is None else dw.to(ctx.w_dtype),
            None, None, None, None,
        )  # fmt: skip

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tt: Tensor | None, tw: Tensor | None, *rest: None) -> Tensor:
        x, t, w = ctx.saved_tensors
        w = None if w is None else wide(w)
        e, row, total = wide(x) - wide(t), ERRORS[ctx.error], total_of(ctx.reduction, x, w)
        te = torch.zeros_like(e)
        te = te if tx is None else te + tx
        te = te if tt is None else te - tt
        L, tL = row.rho(e, ctx.parameter), row.drho(e, ctx.parameter) * te
        tL = tL if w is None else tL * w
        tL = tL if tw is None else tL + L * tw
        tloss = reduce(tL, ctx.reduction, total)
        if w is not None and tw is not None and ctx.reduction == "weighted mean":
            tloss = tloss - (L * w).sum() / total * tw.sum() / total
        return tloss.to(ctx.dtype)


def total_of(reduction: str, x: Tensor, w: Tensor | None) -> Tensor | float:
    """What a mean divides by; a mean over nothing is NaN."""
    return wide(w).sum() if reduction == "weighted mean" and w is not None else x.numel() or math.nan


class BCEWithLogitsFunction(Function):
    """loss = R(w ⊙ ((1 - t) x + λ log(1 + exp(-x)))), λ = 1 + (π - 1) t, which overflows nowhere.

    Shapes: x and t equal; the weights w and π, which may be None, broadcast to them.
    """

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, pi: Tensor | None, reduction: str) -> Tensor:
        dtype = t.dtype
        x, t, w, pi = _all_wide(x, t, w, pi)
        L = bce(x, t, pi)
        return reduce(L if w is None else L * w, reduction).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, t, w, pi, ctx.reduction = inputs
        ctx.dtypes = [None if s is None else s.dtype for s in (x, t, w, pi)]
        needs = any(ctx.needs_input_grad[:4])
        saved = (x, t, w, pi) if needs else (None,) * 4
        ctx.save_for_backward(*saved)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w, pi = ctx.saved_tensors
        need_x, need_t, need_w, need_pi = ctx.needs_input_grad[:4]
        dR = spread(wide(dloss), ctx.reduction, x.numel() or math.nan)
        x, t, w, pi = _all_wide(x, t, w, pi)
        dw = dpi = None
        if need_w:
            dw = (dR * bce(x, t, pi)).sum_to_size(w.shape).to(ctx.dtypes[2])
        dR = dR if w is None else dR * w
        if need_pi:
            dpi = (dR * _bce_dpi(x, t)).sum_to_size(pi.shape).to(ctx.dtypes[3])
        return (
            (dR * bce_dx(x, t, pi)).to(ctx.dtypes[0]) if need_x else None,
            (dR * _bce_dt(x, pi)).to(ctx.dtypes[1]) if need_t else None,
            dw,
            dpi,
            None,
        )

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tt: Tensor | None, tw: Tensor | None, tpi: Tensor | None, *_: None
    ) -> Tensor:
        x, t, w, pi = _all_wide(*ctx.saved_tensors)
        tL = torch.zeros_like(x)
        tL = tL if tx is None else tL + bce_dx(x, t, pi) * tx
        tL = tL if tt is None else tL + _bce_dt(x, pi) * tt
        tL = tL if tpi is None else tL + _bce_dpi(x, t) * tpi
        tL = tL if w is None else tL * w
        tL = tL if tw is None else tL + bce(x, t, pi) * tw
        return reduce(tL, ctx.reduction).to(ctx.dtypes[1])


def _all_wide(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else wide(t) for t in tensors)


def bce(x: Tensor, t: Tensor, pi: Tensor | None) -> Tensor:
    s = torch.nn.functional.logsigmoid(x)  # = -log(1 + exp(-x))
    return (1 - t) * x - (s if pi is None else s * _lambda(t, pi))


def _lambda(t: Tensor, pi: Tensor) -> Tensor:
    return 1 + (pi - 1) * t


def bce_dx(x: Tensor, t: Tensor, pi: Tensor | None) -> Tensor:
    s = torch.sigmoid(x)  # 1 - t - λ σ(-x) would be 0 where σ(x) is small
    return s - t if pi is None else s * _lambda(t, pi) - pi * t


def _bce_dpi(x: Tensor, t: Tensor) -> Tensor:
    return -t * torch.nn.functional.logsigmoid(x)


def _bce_dt(x: Tensor, pi: Tensor | None) -> Tensor:
    return -x if pi is None else -(pi - 1) * torch.nn.functional.logsigmoid(x) - x
