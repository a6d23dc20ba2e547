"""The negative log-likelihood of classes, from log-probabilities: L = -w_t x_t, dx_c = -w_t dL [c = t].

Which positions count, and what a class outside [0, K) does, is as in cross_entropy.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cast import cast
from .cross_entropy import class_of, contiguous, put_loss, upstream
from .launch import device_of, first_block, warps_of
from .loss import finish
from .softmax import elements, locate, rows_of, tile_warps, tuned_rows

__all__ = ["backward", "forward"]


@triton.jit
def _forward(
    X, T, W, LOSS, PART, positions, K, inner, ignored, HAS_W: tl.constexpr, NONE: tl.constexpr, BLOCK: tl.constexpr
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t, counts, exists, a = class_of(T, W, j, j < positions, K, ignored, HAS_W)
    at = ((j // inner) * K + t) * inner + j % inner
    L = tl.where(counts, -a * tl.load(X + at, mask=exists, other=0.0).to(tl.float32), 0.0)
    put_loss(LOSS, PART, L, j, j < positions, NONE)
    tl.store(PART + tl.num_programs(0) + tl.program_id(0), tl.sum(a.to(tl.float64), axis=0))


@triton.jit
def _backward(
    T, W, DLOSS, TOTAL, DX, positions, K, inner, ignored,
    HAS_W: tl.constexpr, NONE: tl.constexpr, MEAN: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    base, inside, j = locate(positions, K, inner, P, STRIDED)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = elements(base, inside, k, K, inner, STRIDED)
    t, counts, exists, a = class_of(T, W, j, inside, K, ignored, HAS_W)
    k_t = tl.where(counts, a * upstream(DLOSS, TOTAL, j, counts, NONE, MEAN), 0.0)
    elsewhere = tl.where(counts & (exists == 0), float("nan"), 0.0)
    dx = tl.where(k[None, :] == t[:, None], -k_t[:, None], elsewhere[:, None])
    tl.store(DX + at, cast(dx, DX.dtype.element_ty), mask=mask)


NLL = first_block("nll")
NLL_BLOCK = NLL.columns


def forward(x: Tensor, c: int, t: Tensor, w: Tensor | None, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, total) for classes t along the dimension c of x, which is not empty."""
    x, rows = rows_of(x, c, in_order=True)
    t, w, none = t.contiguous(), contiguous(w), reduction == "none"
    programs = triton.cdiv(rows.positions, NLL_BLOCK)
    part = torch.empty((2, programs), dtype=torch.float64, device=x.device)
    loss = x.new_empty(t.shape) if none else part
    with device_of(x):
        _forward[(programs,)](
            x, t, w, loss, part, rows.positions, rows.K, rows.inner, ignore_index, w is not None, none, NLL_BLOCK,
            num_warps=warps_of(NLL),
        )  # fmt: skip
    reduced, total = finish(part, None if none else x.dtype, None if reduction == "mean" else 1, True)
    return loss if none else reduced, total


def backward(
    dloss: Tensor, shape: torch.Size, c: int, dtype: torch.dtype, t: Tensor, w: Tensor | None, total: Tensor,
    ignore_index: int, reduction: str,
) -> Tensor:  # fmt: skip
    """dx of this shape and dtype, contiguous."""
    dx = torch.empty(shape, dtype=dtype, device=t.device)
    rows = rows_of(dx, c)[1]
    t, w, dloss = t.contiguous(), contiguous(w), dloss.contiguous()

    def run(P: int, block: int) -> None:
        _backward[rows.programs(P), triton.cdiv(rows.K, block)](
            t, w, dloss, total, dx, rows.positions, rows.K, rows.inner, ignore_index,
            w is not None, reduction == "none", reduction == "mean", P, block, rows.strided,
            num_warps=tile_warps(P, block),
        )  # fmt: skip

    tuned_rows("cross-entropy", dx, rows, run, "nll backward")
    return dx
