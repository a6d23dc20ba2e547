"""Losses between a prediction x and a target t of the same shape, and ordered sums for every loss.

    forward    loss = R(w · ρ(e)),  e = x - t       backward   dx = dR · w · ρ′(e),  dt = -dx,  dw = dR · ρ(e)

    bce        loss = R(w · ((1 - t) x + λ log(1 + exp(-x)))),  λ = 1 + (π - 1) t

ρ is one of e² (mse), |e| (l1), smooth_l1 and huber; R is nothing, Σ, Σ/n or Σ/Σw. Forward reads each input once; each
program leaves its sums over a fixed run of elements, and these few are added up in float64, in the order of programs.
Nothing is added atomically: the same bits, run after run. Backward is one pass that writes the gradients asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import log1p_unit
from .arithmetic import exp
from .cast import cast
from .launch import Block, device_of, first_block, is_wide, tuned, warps_of

__all__ = ["backward", "finish", "forward"]


@triton.jit
def _error(x, t, pi, a, KEY: tl.constexpr):
    """ρ, before weights."""
    e = x - t
    if KEY == "mse":
        return e * e
    elif KEY == "l1":
        return tl.abs(e)
    elif KEY == "smooth_l1":
        c = tl.minimum(tl.maximum(tl.div_rn(e, a), -1.0), 1.0)
        return c * (e - 0.5 * a * c)
    elif KEY == "huber":
        c = tl.minimum(tl.maximum(e, -a), a)
        return c * (e - 0.5 * c)
    else:
        tl.static_assert(KEY == "bce")
        return (1 - t) * x + (t * (pi - 1) + 1) * _softplus_of_minus(x)


@triton.jit
def _softplus_of_minus(x):
    """log(1 + exp(-x)), without overflow."""
    return tl.where(x < 0, -x, 0.0) + log1p_unit(exp(-tl.abs(x)))


@triton.jit
def _slope(x, t, pi, a, KEY: tl.constexpr):
    """∂ρ/∂x. NaN where torch has it: minimum and maximum alone would hide one on a GPU."""
    e = x - t
    if KEY == "mse":
        return 2 * e
    elif KEY == "l1":
        return tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, 0.0))
    elif KEY == "smooth_l1":
        return tl.where(e != e, e, tl.minimum(tl.maximum(tl.div_rn(e, a), -1.0), 1.0))
    elif KEY == "huber":
        return tl.where(e != e, e, tl.minimum(tl.maximum(e, -a), a))
    else:
        tl.static_assert(KEY == "bce")
        # From σ(-|x|), so that neither tail cancels.
        near_one = tl.div_rn(1.0, 1 + exp(-tl.abs(x)))
        small = exp(-tl.abs(x)) * near_one
        left = small - t * (near_one * (pi - 1) + 1)  # σ(x) - t (1 + (π - 1) σ(-x))
        right = (1 - t) - (t * (pi - 1) + 1) * small  # (1 - t) - λ σ(-x)
        return tl.where(x < 0, left, right)


@triton.jit
def _slope_in_target(x, t, pi, a, KEY: tl.constexpr, HAS_PI: tl.constexpr):
    """∂ρ/∂t. Without π no infinity is multiplied by π - 1 = 0."""
    if KEY == "bce":
        if HAS_PI:
            return _softplus_of_minus(x) * (pi - 1) - x
        else:
            return -x
    else:
        return -_slope(x, t, pi, a, KEY)


@triton.jit
def _factor(W, i, inside, count, MODE: tl.constexpr):
    """The weight of the elements i: 1 (MODE 0), one for each (1), or ``count`` that repeat (2)."""
    if MODE == 0:
        return 1.0
    elif MODE == 1:
        return tl.load(W + i, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(W + i % count, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    X, T, W, PI, LOSS, PART, n, w_count, pi_count, a,
    KEY: tl.constexpr, W_MODE: tl.constexpr, PI_MODE: tl.constexpr, NONE: tl.constexpr, W_SUM: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """STEPS blocks; without a reduction the losses, else their sum and, if asked for, that of the weights."""
    program = tl.program_id(0)
    start = program
    if WIDE:
        start = program.to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weights = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(STEPS):
        i = (start * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        x = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(T + i, mask=inside, other=0.0).to(tl.float32)
        w = _factor(W, i, inside, w_count, W_MODE)
        L = _error(x, t, _factor(PI, i, inside, pi_count, PI_MODE), a, KEY) * w
        if NONE:
            tl.store(LOSS + i, cast(L, LOSS.dtype.element_ty), mask=inside)
        else:
            total += tl.where(inside, L, 0.0)
        if W_SUM:
            weights += w  # 0 outside
    if not NONE:
        tl.store(PART + program, tl.sum(total, axis=0).to(tl.float64))
    if W_SUM:
        tl.store(PART + tl.num_programs(0) + program, tl.sum(weights, axis=0).to(tl.float64))


@triton.jit
def _backward(
    X, T, W, PI, DLOSS, TOTAL, LOSS, DX, DT, DW, n, w_count, pi_count, a, divisor,
    KEY: tl.constexpr, W_MODE: tl.constexpr, PI_MODE: tl.constexpr, NONE: tl.constexpr, BY_TOTAL: tl.constexpr,
    NEED_X: tl.constexpr, NEED_T: tl.constexpr, NEED_W: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start = program
    if WIDE:
        start = program.to(tl.int64)
    i = start * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if NONE:
        dR = tl.load(DLOSS + i, mask=inside, other=0.0).to(tl.float32)
    elif BY_TOTAL:
        dR = tl.div_rn(tl.load(DLOSS).to(tl.float32), tl.load(TOTAL))
    else:
        dR = tl.div_rn(tl.load(DLOSS).to(tl.float32), divisor)
    x = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(T + i, mask=inside, other=0.0).to(tl.float32)
    pi = _factor(PI, i, inside, pi_count, PI_MODE)
    weighted = dR * _factor(W, i, inside, w_count, W_MODE)
    if NEED_X:
        dx = _slope(x, t, pi, a, KEY) * weighted
        tl.store(DX + i, cast(dx, DX.dtype.element_ty), mask=inside)
    if NEED_T:
        dt = _slope_in_target(x, t, pi, a, KEY, PI_MODE != 0) * weighted
        tl.store(DT + i, cast(dt, DT.dtype.element_ty), mask=inside)
    if NEED_W:
        L = _error(x, t, pi, a, KEY)
        if BY_TOTAL:
            L -= tl.load(LOSS)  # ∂(Σ w ρ/Σw)/∂w = (ρ - loss)/Σw
        tl.store(DW + i, cast(L * dR, DW.dtype.element_ty), mask=inside)


@triton.jit
def _fold(PART, OUT, count, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of CHUNK partial sums each, in order; the second program axis counts kinds of sums."""
    program = tl.program_id(0)
    kind = tl.program_id(1)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, CHUNK, BLOCK):
        i = program * CHUNK + start + tl.arange(0, BLOCK)
        total += tl.load(PART + kind * count + i, mask=i < count, other=0.0)
    tl.store(OUT + kind * tl.num_programs(0) + program, tl.sum(total, axis=0))


@triton.jit
def _finish(
    PART, LOSS, TOTAL, count, divisor,
    HAS_LOSS: tl.constexpr, HAS_TOTAL: tl.constexpr, BY_TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last sum, by one program: the loss and what its mean divides by."""
    losses = tl.zeros((BLOCK,), dtype=tl.float64)
    totals = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if HAS_LOSS:
            losses += tl.load(PART + i, mask=i < count, other=0.0)
        if HAS_TOTAL:
            totals += tl.load(PART + count + i, mask=i < count, other=0.0)
    total = tl.sum(totals, axis=0)
    if HAS_TOTAL:
        tl.store(TOTAL, total.to(tl.float32))
    if HAS_LOSS:
        loss = tl.sum(losses, axis=0)
        if BY_TOTAL:
            loss = loss / total
        else:
            loss = loss / divisor
        tl.store(LOSS, cast(loss.to(tl.float32), LOSS.dtype.element_ty))


BLOCK = first_block("loss").columns
WARPS = warps_of(first_block("loss"))
"""8 elements a thread: 16-byte accesses in 16-bit dtypes."""
PROGRAMS = 2048
"""About so many programs share a long sum."""
CHUNK = 8192
"""Partial sums that one program adds up."""


def finish(part: Tensor, dtype: torch.dtype | None, divisor: float | None, has_total: bool) -> tuple[Tensor, Tensor]:
    """(loss, total) of the partial sums (kinds, programs), those of the losses first; an absent one is ``part``.

    ``dtype``: of the loss; None if there is none. ``divisor``: of the loss, or None where the total divides it.
    """
    total = part.new_empty((), dtype=torch.float32) if has_total else part
    loss = part if dtype is None else part.new_empty((), dtype=dtype)
    with device_of(part):
        while part.shape[1] > CHUNK:
            kinds, count = part.shape
            folded = part.new_empty((kinds, triton.cdiv(count, CHUNK)))
            _fold[(folded.shape[1], kinds)](part, folded, count, CHUNK, BLOCK, num_warps=2 * WARPS)
            part = folded
        _finish[(1,)](
            part, loss, total, part.shape[1], 1.0 if divisor is None else float(divisor),
            dtype is not None, has_total, divisor is None, BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return loss, total


def _laid_alike(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, of one shape, copied where they do not all lie in memory densely and in the same order."""
    first = next(t for t in tensors if t is not None)
    strides = first.stride()
    alike = all(t is None or t.stride() == strides for t in tensors)
    if alike and (first.is_contiguous() or torch.empty_like(first, device="meta").stride() == strides):
        return list(tensors)
    return [None if t is None else t.contiguous() for t in tensors]


def _repeating(w: Tensor | None, x: Tensor) -> tuple[Tensor | None, int, int]:
    """w, how many of its elements repeat along x's, and the MODE of :func:`_factor`; x is laid out in order."""
    if w is None:
        return None, 0, 0
    trailing = w.numel() == 1 or w.shape == x.shape[x.dim() - w.dim() :]
    w = (w if trailing else w.expand(x.shape)).contiguous()
    return w, w.numel(), 1 if w.numel() == x.numel() else 2


def _prepared(x: Any, t: Any, w: Tensor | None, pi: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """All laid out alike; w and π, which may be smaller, with their counts and modes."""
    if any(f is not None and f.shape != x.shape for f in (w, pi)):
        x, t, *rest = (None if s is None else s.contiguous() for s in (x, t, *others))
    else:
        x, t, w, pi, *rest = _laid_alike(x, t, w, pi, *others)
    w, w_count, w_mode = _repeating(w, x) if w is None or w.shape != x.shape else (w, w.numel(), 1)
    pi, pi_count, pi_mode = _repeating(pi, x) if pi is None or pi.shape != x.shape else (pi, pi.numel(), 1)
    return x, t, w, pi, (w_count, pi_count), (w_mode, pi_mode), *rest


def forward(
    x: Tensor, t: Tensor, w: Tensor | None, pi: Tensor | None, key: str, parameter: float, reduction: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The loss in ``dtype``. ``reduction``: "none", "sum", "mean" or "weighted mean", which divides by Σw.

    w and π broadcast to x; Σw counts each element of x.
    """
    return _loss_and_total(x, t, w, pi, key, parameter, reduction, dtype)[0]


def _loss_and_total(
    x: Tensor, t: Tensor, w: Tensor | None, pi: Tensor | None, key: str, parameter: float, reduction: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, t, w, pi, counts, modes = _prepared(x, t, w, pi)
    n, none, by_total = x.numel(), reduction == "none", reduction == "weighted mean"
    loss = (
        torch.empty_like(x, dtype=dtype)
        if none
        else x.new_full((), math.nan if "mean" in reduction else 0, dtype=dtype)
    )
    if not n:
        return loss, loss

    def run(block: Block) -> Tensor:
        steps = 1 if none else triton.next_power_of_2(max(1, min(64, n // (block.columns * PROGRAMS))))
        programs = triton.cdiv(n, block.columns * steps)
        part = loss if none else x.new_empty((1 + by_total, programs), dtype=torch.float64)
        _forward[(programs,)](
            x, t, w, pi, loss, part, n, *counts, float(parameter),
            key, *modes, none, by_total, steps, block.columns, is_wide(x), num_warps=warps_of(block),
        )  # fmt: skip
        return part

    part = tuned("loss", n, x, run, "forward")
    if none:
        return loss, loss
    return finish(part, dtype, None if by_total else n if reduction == "mean" else 1, by_total)


def backward(
    dloss: Tensor, x: Tensor, t: Tensor, w: Tensor | None, pi: Tensor | None, key: str, parameter: float,
    reduction: str, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, dt and dw, those that ``needs`` names, each in its tensor's dtype. dw only for a w of x's shape."""
    need_x, need_t, need_w = needs
    none, by_total = reduction == "none", reduction == "weighted mean"
    loss = total = None
    if by_total and need_w and x.numel():
        loss, total = _loss_and_total(x, t, w, pi, key, parameter, reduction, torch.float32)
    elif by_total:
        assert w is not None
        total = w.sum(dtype=torch.float32)
    x, t, w, pi, counts, modes, spread = _prepared(x, t, w, pi, dloss if none else None)
    dloss = spread if none else dloss
    dx = torch.empty_like(x) if need_x else None
    dt = torch.empty_like(t) if need_t else None
    dw = torch.empty_like(w) if need_w and w is not None else None
    n = x.numel()
    if n:

        def run(block: Block) -> None:
            _backward[(triton.cdiv(n, block.columns),)](
                x, t, w, pi, dloss, total, loss, dx, dt, dw, n, *counts,
                float(parameter), float(n) if reduction == "mean" else 1.0,
                key, *modes, none, by_total, need_x, need_t, need_w, block.columns, is_wide(x),
                num_warps=warps_of(block),
            )  # fmt: skip

        tuned("loss", n, x, run, "backward")
    return dx, dt, dw
