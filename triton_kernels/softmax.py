"""Softmax and its logarithm along one dimension, and how rows of classes are walked through.

    softmax       y = exp(x - m) / Σ exp(x - m),  m = max x      dx = y · (dy - Σ dy · y)
    log-softmax   y = x - m - log Σ exp(x - m)                   dx = dy - exp(y) Σ dy

A tensor is seen as (outer, K, inner), K counting classes. A program takes P positions (outer, inner) with all their K
classes: rows next to each other where the classes lie next to each other in memory (inner = 1), else neighbours along
inner, so that either way neighbouring threads read neighbouring addresses and nothing is copied. A row that fits in a
block is read once and kept in registers; a longer one is read once for the maximum and the sum, which are carried along
(Milakov & Gimelshein 2018, arXiv:1805.02867), and again, backwards, for the result: its end may still be in the cache.

P and the block depend on K and inner alone, so that a row has the same bits whatever the batch around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import exp
from .cast import cast
from .launch import Block, first_block, tuned, warps_of

__all__ = ["Rows", "backward", "elements", "forward", "like", "locate", "merge", "rows_of", "tile_warps", "tuned_rows"]

INFINITY = tl.constexpr(float("inf"))
Result = TypeVar("Result")


@triton.jit
def locate(positions, K, inner, P: tl.constexpr, STRIDED: tl.constexpr):
    """Of this program's P positions: the offset of class 0, whether they exist, and their numbers."""
    program = tl.program_id(0)
    if STRIDED:
        tiles = tl.cdiv(inner, P)
        i = (program % tiles) * P + tl.arange(0, P)
        o = (program // tiles).to(tl.int64)
        return o * K * inner + i, i < inner, o * inner + i
    else:
        j = program.to(tl.int64) * P + tl.arange(0, P)
        return j * K, j < positions, j


@triton.jit
def elements(base, inside, k, K, inner, STRIDED: tl.constexpr):
    """Offsets and mask of the classes k of the positions."""
    if STRIDED:
        at = base[:, None] + k.to(tl.int64)[None, :] * inner
    else:
        at = base[:, None] + k[None, :]
    return at, inside[:, None] & (k < K)[None, :]


@triton.jit
def merge(x, m, s):
    """m = max x and s = Σ exp(x - m) after another block; and what x was shifted by: m, but 0 where m is still -inf."""
    m_new = tl.maximum(m, tl.max(x, axis=1))
    shift = tl.where(m_new == -INFINITY, 0.0, m_new)
    s = s * exp(m - shift) + tl.sum(exp(x - shift[:, None]), axis=1)
    return m_new, s, shift


@triton.jit
def _forward(
    X, Y, positions, K, inner,
    LOG: tl.constexpr, ONE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    base, inside, position = locate(positions, K, inner, P, STRIDED)
    if ONE:
        at, mask = elements(base, inside, tl.arange(0, BLOCK), K, inner, STRIDED)
        u = tl.load(X + at, mask=mask, other=-INFINITY).to(tl.float32)
        u = u - tl.max(u, axis=1)[:, None]
        e = exp(u)
        s = tl.sum(e, axis=1)
        if LOG:
            y = u - tl.log(s)[:, None]
        else:
            y = e * tl.div_rn(1.0, s)[:, None]
        tl.store(Y + at, cast(y, Y.dtype.element_ty), mask=mask)
    else:
        m = tl.full((P,), -INFINITY, dtype=tl.float32)
        s = tl.zeros((P,), dtype=tl.float32)
        steps = tl.cdiv(K, BLOCK)
        for step in range(steps):
            at, mask = elements(base, inside, step * BLOCK + tl.arange(0, BLOCK), K, inner, STRIDED)
            x = tl.load(X + at, mask=mask, other=-INFINITY, eviction_policy="evict_last").to(tl.float32)
            m, s, shift = merge(x, m, s)
        for back in range(steps):
            k = (steps - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            at, mask = elements(base, inside, k, K, inner, STRIDED)
            u = tl.load(X + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32) - m[:, None]
            if LOG:
                y = u - tl.log(s)[:, None]
            else:
                y = exp(u) * tl.div_rn(1.0, s)[:, None]
            tl.store(Y + at, cast(y, Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    DY, Y, DX, positions, K, inner,
    LOG: tl.constexpr, ONE: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    base, inside, position = locate(positions, K, inner, P, STRIDED)
    if ONE:
        at, mask = elements(base, inside, tl.arange(0, BLOCK), K, inner, STRIDED)
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        if LOG:
            dx = dy - exp(y) * tl.sum(dy, axis=1)[:, None]
        else:
            dx = y * (dy - tl.sum(dy * y, axis=1)[:, None])
        tl.store(DX + at, cast(dx, DX.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((P,), dtype=tl.float32)
        steps = tl.cdiv(K, BLOCK)
        for step in range(steps):
            at, mask = elements(base, inside, step * BLOCK + tl.arange(0, BLOCK), K, inner, STRIDED)
            dy = tl.load(DY + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            if LOG:
                total += tl.sum(dy, axis=1)
            else:
                y = tl.load(Y + at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
                total += tl.sum(dy * y, axis=1)
        for back in range(steps):
            k = (steps - 1 - back) * BLOCK + tl.arange(0, BLOCK)
            at, mask = elements(base, inside, k, K, inner, STRIDED)
            dy = tl.load(DY + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            y = tl.load(Y + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if LOG:
                dx = dy - exp(y) * total[:, None]
            else:
                dx = y * (dy - total[:, None])
            tl.store(DX + at, cast(dx, DX.dtype.element_ty), mask=mask)


TILE = first_block("softmax", "long row").columns
"""Elements of a tile where rows are short, or are taken in several blocks."""
NEIGHBOURS = first_block("softmax strided").rows
"""Positions of a tile where classes are strided."""
LARGEST_TILE = 8192
"""Elements of a tile of several rows."""


@dataclass(frozen=True)
class Rows:
    """A tensor as (outer, K, inner)."""

    outer: int
    K: int
    inner: int

    @property
    def positions(self) -> int:
        return self.outer * self.inner

    @property
    def strided(self) -> bool:
        return self.inner > 1

    def tile(self, whole: int = TILE, size: int = TILE, neighbours: int = NEIGHBOURS) -> tuple[int, int]:
        """P and BLOCK of tiles of ``size`` elements; a row of up to ``whole`` classes is one block."""
        K = triton.next_power_of_2(self.K)
        if self.strided:
            P = min(triton.next_power_of_2(self.inner), neighbours)
            return P, min(K, size // P)
        block = K if whole >= K else min(K, size)
        return max(1, min(size // block, 256)), block

    def programs(self, P: int) -> int:
        return self.outer * triton.cdiv(self.inner, P) if self.strided else triton.cdiv(self.outer, P)


def tuned_rows(
    family: str, x: Tensor, rows: Rows, run: Callable[[int, int], Result], what: str, share: int = 1
) -> Result:  # fmt: skip
    """``run`` with P and BLOCK for these rows; tiles of several rows have 1/``share`` of the block's elements."""
    if rows.strided:
        return tuned(
            "softmax strided", rows.K, x,
            lambda b: run(*rows.tile(size=b.rows * b.columns // share, neighbours=b.rows)), f"{family} {what}",
        )  # fmt: skip
    return tuned(family, rows.K, x, lambda b: run(*rows.tile(b.columns, min(b.columns, LARGEST_TILE) // share)), what)


def tile_warps(P: int, block: int) -> int:
    """For 32 elements a thread; 16 in a tile of several positions, whose numbers for each take registers too."""
    return warps_of(Block(block, P, max(1, min(16, P * block // (1024 if P == 1 else 512)))))


def rows_of(x: Tensor, dim: int, in_order: bool = False) -> tuple[Tensor, Rows]:
    """x, copied only where it does not lie densely in memory, and how its elements lie there along ``dim``.

    ``in_order``: the positions lie in the order of dimensions.
    """
    if x.dim() == 0:
        return x, Rows(1, 1, 1)
    dim %= x.dim()
    order = list(range(x.dim()))
    if not x.is_contiguous():
        by_stride = sorted(order, key=x.stride, reverse=True)
        others = [d for d in by_stride if d != dim]
        if x.permute(by_stride).is_contiguous() and not (in_order and others != sorted(others)):
            order = by_stride
        else:
            x = x.contiguous()
    at = order.index(dim)
    sizes = [x.shape[d] for d in order]
    return x, Rows(math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1 :]))


def like(t: Tensor, x: Tensor) -> Tensor:
    """t, laid out in memory as x, which is dense."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def forward(x: Tensor, dim: int, log: bool) -> Tensor:
    """y in x's dtype and memory layout."""
    x, rows = rows_of(x, dim)
    y = torch.empty_like(x)
    if x.numel():

        def run(P: int, block: int) -> None:
            _forward[(rows.programs(P),)](
                x, y, rows.positions, rows.K, rows.inner,
                log, block >= rows.K, P, block, rows.strided, num_warps=tile_warps(P, block),
            )  # fmt: skip

        tuned_rows("softmax", x, rows, run, "forward")
    return y


def backward(dy: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
    """dx in y's dtype and memory layout."""
    y, rows = rows_of(y, dim)
    dy, dx = like(dy, y), torch.empty_like(y)
    if y.numel():

        def run(P: int, block: int) -> None:
            _backward[(rows.programs(P),)](
                dy, y, dx, rows.positions, rows.K, rows.inner,
                log, block >= rows.K, P, block, rows.strided, num_warps=tile_warps(P, block),
            )  # fmt: skip

        tuned_rows("softmax", y, rows, run, "backward")
    return dx
