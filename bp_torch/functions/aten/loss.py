"""Losses by ATen's own kernels, and on the CPU large ones piece by piece, so that what is computed on the way stays in
a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._torch import losses
from ...mode import NARROW, wide
from ..function import ATEN
from ..loss import ERRORS, BCEWithLogitsFunction, ErrorLossFunction, bce, bce_dx, spread

__all__ = ["CHUNK", "KINDS", "on_cpu"]

CHUNK = 2**17
"""Elements that one step takes."""
KINDS = {"none": 0, "mean": 1, "sum": 2}
"""ATen's numbers for the reductions."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Native:
    """ATen's kernels of one row of ERRORS, with ATen's number for the reduction R."""

    forward: Callable[[Tensor, Tensor, int, float], Tensor]
    """R(ρ(x - t)), of (x, t, R, parameter)."""
    backward: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    """dR ρ′(x - t), of (dloss, x, t, R, parameter)."""
    backward_into: Callable[[Tensor, Tensor, Tensor, int, float, Tensor], Tensor]
    """The same, and where to write it."""
    total: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """Σ ρ(x - t), of (x, t, a tensor to overwrite), where that is faster than the kernel."""


# What has a Python binding of its own takes a microsecond less than by torch.ops.
NATIVE = {
    "mse": Native(
        forward=lambda x, t, kind, _: losses.mse_loss(x, t, kind),
        backward=lambda g, x, t, kind, _: aten.mse_loss_backward.default(g, x, t, kind),
        backward_into=lambda g, x, t, kind, _, dx: aten.mse_loss_backward.grad_input(g, x, t, kind, grad_input=dx),
        total=lambda x, t, e: torch.sub(x, t, out=e).square_().sum(),
    ),
    "smooth_l1": Native(
        forward=lambda x, t, kind, beta: losses.smooth_l1_loss(x, t, kind, beta),
        backward=lambda g, x, t, kind, beta: aten.smooth_l1_loss_backward.default(g, x, t, kind, beta),
        backward_into=lambda g, x, t, kind, beta, dx: aten.smooth_l1_loss_backward.grad_input(
            g, x, t, kind, beta, grad_input=dx
        ),
    ),
    "huber": Native(
        forward=lambda x, t, kind, delta: losses.huber_loss(x, t, kind, delta),
        backward=lambda g, x, t, kind, delta: aten.huber_loss_backward.default(g, x, t, kind, delta),
        backward_into=lambda g, x, t, kind, delta, dx: aten.huber_loss_backward.out(
            g, x, t, kind, delta, grad_input=dx
        ),
    ),
}


def on_cpu(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - all(...) takes twice as long
        if t is not None and not t.is_cpu:
            return False
    return True


def _in_chunks(x: Tensor, t: Tensor) -> bool:
    """Whether x and t are large and laid out alike, so that a pass over them may go piece by piece."""
    return x.numel() > CHUNK and x.is_contiguous() and t.is_contiguous()


def _chunks(*tensors: Tensor) -> Any:
    """The tensors' elements, ``CHUNK`` at a time."""
    return zip(*(t.view(t.numel()).split(CHUNK) for t in tensors), strict=True)


def _forward(
    x: Tensor, t: Tensor, w: Tensor | None, error: str, parameter: float, reduction: str, dtype: torch.dtype
) -> Any:
    if w is not None or not on_cpu(x, t):
        return NotImplemented
    row = NATIVE.get(error)
    exact = row is not None and x.dtype == t.dtype == dtype and dtype not in NARROW
    if reduction != "none" and _in_chunks(x, t):
        if row is not None and row.total is not None and x.dtype == t.dtype and x.dtype not in NARROW:
            e = torch.empty(CHUNK, dtype=x.dtype)  # once, because new memory is slow
            parts = [row.total(a, b, e[: a.shape[0]]) for a, b in _chunks(x, t)]
        elif row is not None and exact:
            parts = [row.forward(a, b, KINDS["sum"], parameter) for a, b in _chunks(x, t)]
        else:
            parts = [ERRORS[error].rho(wide(a) - wide(b), parameter).sum() for a, b in _chunks(x, t)]
        L = torch.stack(parts).sum()
        return (L / x.numel() if reduction == "mean" else L).to(dtype)
    return row.forward(x, t, KINDS[reduction], parameter) if row is not None and exact else NotImplemented


def _backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> Any:
    x, t, w = saved
    if w is not None or not on_cpu(x, t, dloss):
        return NotImplemented
    need_x, need_t, _ = ctx.needs_input_grad[:3]
    row = NATIVE.get(ctx.error)
    if row is not None and x.dtype == t.dtype == dloss.dtype and x.dtype not in NARROW:
        kind = KINDS[ctx.reduction]
        if x.numel() <= CHUNK:
            dx = row.backward(dloss, x, t, kind, ctx.parameter)
        else:  # without the zeros that the other form fills first
            dx = row.backward_into(dloss, x, t, kind, ctx.parameter, torch.empty_like(x))
    elif ctx.reduction != "none" and _in_chunks(x, t):
        dR = spread(wide(dloss), ctx.reduction, x.numel())
        dx = torch.empty_like(x, dtype=torch.promote_types(x.dtype, t.dtype))
        for a, b, d in _chunks(x, t, dx):
            torch.mul(ERRORS[ctx.error].drho(wide(a) - wide(b), ctx.parameter), dR, out=d)
    else:
        return NotImplemented
    if need_t:
        dt = -dx if dx.dtype is t.dtype else (-dx).to(t.dtype)
    dx = dx if dx.dtype is x.dtype else dx.to(x.dtype)
    return dx if need_x else None, dt if need_t else None, None, None, None, None, None


def _bce(x: Tensor, t: Tensor, w: Tensor | None, pi: Tensor | None, reduction: str) -> Any:
    if w is not None or pi is not None or reduction == "none" or not on_cpu(x, t) or not _in_chunks(x, t):
        return NotImplemented
    L = torch.stack([bce(wide(a), wide(b), None).sum() for a, b in _chunks(x, t)]).sum()
    return (L / x.numel() if reduction == "mean" else L).to(t.dtype)


def _bce_backward(ctx: Any, saved: tuple[Any, ...], dloss: Tensor) -> Any:
    x, t, w, pi = saved
    need_x, need_t, *_ = ctx.needs_input_grad
    alone = need_x and not need_t and w is None and pi is None and ctx.reduction != "none"
    if not alone or not on_cpu(x, t, dloss) or not _in_chunks(x, t):
        return NotImplemented
    dR, dx = spread(wide(dloss), ctx.reduction, x.numel()), torch.empty_like(x)
    for a, b, d in _chunks(x, t, dx):
        torch.mul(bce_dx(wide(a), wide(b), None), dR, out=d)
    return dx, None, None, None, None


ErrorLossFunction.faster(ATEN, forward=_forward, backward=_backward)
BCEWithLogitsFunction.faster(ATEN, forward=_bce, backward=_bce_backward)
