"""Batch normalization with a residual and an activation: statistics, forward and backward.

Forward, over the n values x of a channel c::

    mean = Σ x / n,  var = Σ (x - mean)² / n,  k = γ / √(var + eps)
    y = f(k (x - mean) + β + r)

Backward, where z or y is computed again, elementwise, instead of being read::

    dz = dy · f′(z),  dr = dz,  dβ = Σ dz,  dγ = Σ dz (x - mean) / √(var + eps)
    dx = k dz + shift + slope (x - mean),
    shift = (dmean - k dβ) / n,  slope = (2 dvar - k dγ / √(var + eps)) / n      both 0 where statistics are given
    dmean = -k dβ,  dvar = -k dγ / (2 √(var + eps))                             where statistics are given

A tensor is read as a matrix, of one of two kinds:

- rows: (rows, C), of 2-D and channels_last tensors. A tile is rows × up to 64 channels, a group is a tile's channels.
- planes: (N·C, points), of (N, C, ...) tensors. A tile of a reduction is some of the N rows of one channel, which is a
  group, × points.

A reduction over a channel is split over programs, each of which takes some tiles one after the other (see
:class:`Plan`). Each writes its own sums, which a second small kernel adds up in a fixed order: the same bits each time.
Statistics are sums of x - K and (x - K)² in float32, where K is the mean of the program's first tile: a common offset
of the data costs no digits. The sums of programs merge by the formula of Chan, Golub and LeVeque (1979,
STAN-CS-79-773). Where one program has a whole channel, it applies what it found too, in the same launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation as act
from .cast import IN_INTERPRETER, cast
from .elementwise import Layout, _pair, _times
from .launch import Block, device_of, grid_of, is_wide, warps_of

__all__ = ["TARGETS", "Plan", "apply", "backward", "forward", "normalize_backward", "statistics"]


# Where a tile lies.


@triton.jit
def _tile(
    t, group, rows, columns, channels, across,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tile t of a group of channels: offsets, mask, and the number of values of a channel in it."""
    if PLANES:
        top = (t // across) * BLOCK_ROWS
        left = (t % across) * BLOCK_COLUMNS
    else:
        top = t * BLOCK_ROWS
        left = group * BLOCK_COLUMNS
    r = top + tl.arange(0, BLOCK_ROWS)
    k = left + tl.arange(0, BLOCK_COLUMNS)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    count = tl.minimum(rows - top, BLOCK_ROWS)
    if WIDE:
        r = r.to(tl.int64)
    if PLANES:
        count = count * tl.minimum(columns - left, BLOCK_COLUMNS)
        r = r * channels + group
    return r[:, None] * columns + k[None, :], inside, count.to(tl.float32)


@triton.jit
def _matrix_tile(
    t, rows, columns, channels, across,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tile t of the whole matrix: offsets, mask, and the channels of its rows (planes) or columns, with their mask."""
    r = (t // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = (t % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    if WIDE:
        r = r.to(tl.int64)
    i = r[:, None] * columns + k[None, :]
    if PLANES:
        return i, inside, r % channels, r < rows
    else:
        return i, inside, k, k < columns


@triton.jit
def _last_first(WIDE: tl.constexpr):
    """The program's number, counted from the end: what the sweep before read last is in the L2 cache still."""
    t = tl.num_programs(0) - 1 - tl.program_id(0)
    return t.to(tl.int64) if WIDE else t


@triton.jit
def _share(groups, steps, tiles, WIDE: tl.constexpr):
    """The program's group and split, and its tiles first ... last - 1."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    split = program // groups
    first = split * steps
    return program % groups, split, first, tl.minimum(first + steps, tiles)


@triton.jit
def _channels(group, channels, PLANES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The channels of a group, and which of them there are."""
    if PLANES:
        c = group + tl.arange(0, 1)
    else:
        c = group * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return c, c < channels


@triton.jit
def _spread(v, PLANES: tl.constexpr):
    """A value of each row (planes) or column, to broadcast over a tile of the whole matrix."""
    return v[:, None] if PLANES else v[None, :]


# What is computed in it.


@triton.jit
def _sum(t, PLANES: tl.constexpr):
    """Over a tile, for each channel of its group."""
    if PLANES:
        return tl.sum(tl.sum(t, axis=1), axis=0, keep_dims=True)
    else:
        if IN_INTERPRETER:  # which adds row to row; by halves, as a chip does
            while t.shape[0] > 1:
                t = tl.sum(tl.reshape(t, (t.shape[0] // 2, 2, t.shape[1])), axis=1)
        return tl.sum(t, axis=0)


@triton.jit
def _load(P, i, mask):
    return tl.load(P + i, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _optional(P, i, mask, default: tl.constexpr):
    """As :func:`_load`, or the default where there is no tensor."""
    if P is None:
        return tl.full(i.shape, default, tl.float32)
    else:
        return _load(P, i, mask)


@triton.jit
def _fma(x, y, z):
    """x y + z, rounded once: the same bits in each kernel. Triton 3.7's interpreter rounds the product as well."""
    if IN_INTERPRETER:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def _deviation(var, eps):
    """s = 1/√(var + eps), to the last bit or nearly: a chip's approximation, and one step of Newton's method."""
    v = var + eps
    s = tl.rsqrt(v)
    w = v * s
    error = _fma(-w, s, tl.full(s.shape, 1.0, tl.float32)) - _fma(v, s, -w) * s
    return tl.where((s > 0) & (s < float("inf")), _fma(0.5 * s, error, s), s)


@triton.jit
def _moments(
    X, group, first, last, rows, columns, channels, across,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """count, K, mean - K and Σ (x - mean)² of each channel in the tiles first ... last - 1."""
    i, inside, count = _tile(
        first, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    x = _load(X, i, inside)
    K = _sum(x, PLANES) / count
    K = tl.where(tl.abs(K) < float("inf"), K, 0.0)  # so that the mean is the infinity that Σ x is
    d = tl.where(inside, x - K[None, :], 0.0)
    s1 = d
    s2 = d * d
    for t in range(first + 1, last):
        i, inside, more = _tile(
            t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
        )  # fmt: skip
        d = tl.where(inside, _load(X, i, inside) - K[None, :], 0.0)
        s1 += d
        s2 += d * d
        count += more
    total = _sum(s1, PLANES)
    m2 = _sum(s2, PLANES) - total * (total / count)
    return count, K, total / count, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _pre_activation(d, k, beta, R, i, inside):
    """z, from d = x - mean."""
    z = _fma(d, k, beta)
    if R is not None:
        z += _load(R, i, inside)
    return z


@triton.jit
def _dz(
    DY, S, R, d, k, beta, i, inside, a, b,
    KEY: tl.constexpr, OUTPUT: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """dy · f′, from the saved y (S), or from z computed again: then y is f(z) rounded to its dtype, as it was."""
    dy = _load(DY, i, inside)
    if KEY == "identity":
        return dy
    else:
        if S is not None:
            s = _load(S, i, inside)
        else:
            s = _pre_activation(d, k, beta, R, i, inside)
            if OUTPUT:
                s = cast(act.forward(s, KEY, a, b), dtype).to(tl.float32)
        return tl.where(inside, _times(dy, act.derivative(s, KEY, OUTPUT, a, b), KEY), 0.0)


@triton.jit
def _sums(
    DY, X, S, R, DX, DR, mean, k, beta, a, b,
    group, first, last, rows, columns, channels, across,
    KEY: tl.constexpr, OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz (x - mean) of each channel in the tiles first ... last - 1; stores dr, and dx = k dz, if asked."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dot = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for t in range(first, last):
        i, inside, _count = _tile(t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
        d = _load(X, i, inside) - mean[None, :]
        dz = _dz(
            DY, S, R, d, k[None, :], beta[None, :], i, inside, a, b, KEY, OUTPUT, X.dtype.element_ty
        )  # fmt: skip
        total += dz
        dot += tl.where(inside, dz * d, 0.0)
        if DR is not None:
            tl.store(DR + i, cast(dz, DR.dtype.element_ty), mask=inside)
        if DX is not None:
            tl.store(DX + i, cast(dz * k[None, :], DX.dtype.element_ty), mask=inside)
    return _sum(total, PLANES), _sum(dot, PLANES)


@triton.jit
def _finished(total, dot, s, k, c, known, n, DGAMMA, DBETA, DMEAN, DVAR, GIVEN: tl.constexpr):
    """From dβ = Σ dz and Σ dz (x - mean): stores the gradients of γ, β and statistics; shift and slope of dx.

    DMEAN and DVAR are the gradients of statistics: written where those are GIVEN, else read.
    """
    dgamma = dot * s
    if DGAMMA is not None:
        tl.store(DGAMMA + c, cast(dgamma, DGAMMA.dtype.element_ty), mask=known)
    if DBETA is not None:
        tl.store(DBETA + c, cast(total, DBETA.dtype.element_ty), mask=known)
    dmean = -k * total
    dvar = -k * s * dgamma
    if GIVEN:
        if DMEAN is not None:
            tl.store(DMEAN + c, cast(dmean, DMEAN.dtype.element_ty), mask=known)
        if DVAR is not None:
            tl.store(DVAR + c, cast(0.5 * dvar, DVAR.dtype.element_ty), mask=known)
    else:
        dmean += _optional(DMEAN, c, known, 0.0)
        dvar += 2 * _optional(DVAR, c, known, 0.0)
    return dmean / n, dvar / n


# Forward.


@triton.jit
def _statistics(
    X, PARTIAL, rows, columns, channels, across, groups, steps, tiles, splits,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A split of a group: its count, K, mean - K and Σ (x - mean)²."""
    group, split, first, last = _share(groups, steps, tiles, WIDE)
    c, known = _channels(group, channels, PLANES, BLOCK_COLUMNS)
    count, K, delta, m2 = _moments(
        X, group, first, last, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    at = split * channels + c
    size = splits * channels
    tl.store(PARTIAL + at, tl.zeros_like(K) + count, mask=known)
    tl.store(PARTIAL + size + at, K, mask=known)
    tl.store(PARTIAL + 2 * size + at, delta, mask=known)
    tl.store(PARTIAL + 3 * size + at, m2, mask=known)


@triton.jit
def _merge(PARTIAL, MEAN, VAR, n, channels, splits, BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The statistics of all splits. Means count from the first split's K, so that a common offset costs no digits."""
    c = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    known = c < channels
    size = splits * channels
    K = _load(PARTIAL + size, c, known)
    total = tl.zeros((BLOCK_SPLITS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        i = split[:, None] * channels + c[None, :]
        inside = (split < splits)[:, None] & known[None, :]
        mean = _load(PARTIAL + size, i, inside) - K[None, :] + _load(PARTIAL + 2 * size, i, inside)
        total += tl.where(inside, _load(PARTIAL, i, inside) * mean, 0.0)
    delta = tl.sum(total, axis=0) / n
    m2 = tl.zeros((BLOCK_SPLITS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        i = split[:, None] * channels + c[None, :]
        inside = (split < splits)[:, None] & known[None, :]
        mean = _load(PARTIAL + size, i, inside) - K[None, :] + _load(PARTIAL + 2 * size, i, inside) - delta[None, :]
        own = _load(PARTIAL, i, inside) * mean * mean + _load(PARTIAL + 3 * size, i, inside)
        m2 += tl.where(inside, own, 0.0)
    tl.store(MEAN + c, K + delta, mask=known)
    tl.store(VAR + c, tl.sum(m2, axis=0) / n, mask=known)


@triton.jit
def _apply(
    X, GAMMA, BETA, R, MEAN, VAR, Y, eps, a, b, rows, columns, channels, across,
    KEY: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i, inside, c, known = _matrix_tile(
        _last_first(WIDE), rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    k = _optional(GAMMA, c, known, 1.0) * _deviation(_load(VAR, c, known), eps)
    beta = _optional(BETA, c, known, 0.0)
    d = _load(X, i, inside) - _spread(_load(MEAN, c, known), PLANES)
    z = _pre_activation(d, _spread(k, PLANES), _spread(beta, PLANES), R, i, inside)
    tl.store(Y + i, cast(act.forward(z, KEY, a, b), Y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_whole(
    X, GAMMA, BETA, R, MEAN, VAR, Y, eps, a, b, rows, columns, channels, across, tiles,
    KEY: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a whole group."""
    group, _split, first, last = _share(tl.num_programs(0), tiles, tiles, WIDE)
    c, known = _channels(group, channels, PLANES, BLOCK_COLUMNS)
    count, K, delta, m2 = _moments(
        X, group, first, last, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    mean = K + delta
    var = m2 / count
    tl.store(MEAN + c, mean, mask=known)
    tl.store(VAR + c, var, mask=known)
    k = _optional(GAMMA, c, known, 1.0) * _deviation(var, eps)
    beta = _optional(BETA, c, known, 0.0)
    for t in range(first, last):
        i, inside, _count = _tile(t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
        z = _pre_activation(_load(X, i, inside) - mean[None, :], k[None, :], beta[None, :], R, i, inside)
        tl.store(Y + i, cast(act.forward(z, KEY, a, b), Y.dtype.element_ty), mask=inside)


# Backward.


@triton.jit
def _reduce(
    DY, X, GAMMA, BETA, R, S, MEAN, VAR, DX, DR, PARTIAL, eps, a, b,
    rows, columns, channels, across, groups, steps, tiles, splits,
    KEY: tl.constexpr, OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A split of a group: Σ dz and Σ dz (x - mean); dr, and the dx of given statistics, in the same sweep."""
    group, split, first, last = _share(groups, steps, tiles, WIDE)
    c, known = _channels(group, channels, PLANES, BLOCK_COLUMNS)
    mean = _load(MEAN, c, known)
    k = _optional(GAMMA, c, known, 1.0) * _deviation(_load(VAR, c, known), eps)
    total, dot = _sums(
        DY, X, S, R, DX, DR, mean, k, _optional(BETA, c, known, 0.0), a, b,
        group, first, last, rows, columns, channels, across,
        KEY, OUTPUT, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE,
    )  # fmt: skip
    tl.store(PARTIAL + split * channels + c, total, mask=known)
    tl.store(PARTIAL + (splits + split) * channels + c, dot, mask=known)


@triton.jit
def _finish(
    PARTIAL, GAMMA, VAR, DGAMMA, DBETA, DMEAN, DVAR, COEFFICIENTS, eps, n, channels, splits,
    GIVEN: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the splits, in order."""
    c = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    known = c < channels
    total = tl.zeros((BLOCK_SPLITS, BLOCK_COLUMNS), tl.float32)
    dot = tl.zeros((BLOCK_SPLITS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        i = split[:, None] * channels + c[None, :]
        inside = (split < splits)[:, None] & known[None, :]
        total += _load(PARTIAL, i, inside)
        dot += _load(PARTIAL + splits * channels, i, inside)
    s = _deviation(_load(VAR, c, known), eps)
    k = _optional(GAMMA, c, known, 1.0) * s
    shift, slope = _finished(
        tl.sum(total, axis=0), tl.sum(dot, axis=0), s, k, c, known, n, DGAMMA, DBETA, DMEAN, DVAR, GIVEN
    )  # fmt: skip
    if COEFFICIENTS is not None:
        tl.store(COEFFICIENTS + c, shift, mask=known)
        tl.store(COEFFICIENTS + channels + c, slope, mask=known)


@triton.jit
def _backward_apply(
    DY, X, GAMMA, BETA, R, S, MEAN, VAR, COEFFICIENTS, DX, DR, eps, a, b, rows, columns, channels, across,
    KEY: tl.constexpr, OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i, inside, c, known = _matrix_tile(
        _last_first(WIDE), rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    k = _spread(_optional(GAMMA, c, known, 1.0) * _deviation(_load(VAR, c, known), eps), PLANES)
    beta = _spread(_optional(BETA, c, known, 0.0), PLANES)
    d = _load(X, i, inside) - _spread(_load(MEAN, c, known), PLANES)
    dz = _dz(DY, S, R, d, k, beta, i, inside, a, b, KEY, OUTPUT, X.dtype.element_ty)
    if COEFFICIENTS is not None:
        shift = _spread(_load(COEFFICIENTS, c, known), PLANES)
        slope = _spread(_load(COEFFICIENTS + channels, c, known), PLANES)
        dx = _fma(k, dz, _fma(slope, d, shift))
    else:
        dx = k * dz
    if DX is not None:
        tl.store(DX + i, cast(dx, DX.dtype.element_ty), mask=inside)
    if DR is not None:
        tl.store(DR + i, cast(dz, DR.dtype.element_ty), mask=inside)


@triton.jit
def _backward_whole(
    DY, X, GAMMA, BETA, R, S, MEAN, VAR, DX, DR, DGAMMA, DBETA, DMEAN, DVAR, eps, n, a, b,
    rows, columns, channels, across, tiles,
    KEY: tl.constexpr, OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All gradients of a whole group, in training."""
    group, _split, first, last = _share(tl.num_programs(0), tiles, tiles, WIDE)
    c, known = _channels(group, channels, PLANES, BLOCK_COLUMNS)
    mean = _load(MEAN, c, known)
    s = _deviation(_load(VAR, c, known), eps)
    k = _optional(GAMMA, c, known, 1.0) * s
    beta = _optional(BETA, c, known, 0.0)
    total, dot = _sums(
        DY, X, S, R, None, None if DX is not None else DR, mean, k, beta, a, b,
        group, first, last, rows, columns, channels, across,
        KEY, OUTPUT, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE,
    )  # fmt: skip
    shift, slope = _finished(total, dot, s, k, c, known, n, DGAMMA, DBETA, DMEAN, DVAR, False)
    if DX is not None:
        for t in range(first, last):
            i, inside, _count = _tile(
                t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
            )
            d = _load(X, i, inside) - mean[None, :]
            dz = _dz(
                DY, S, R, d, k[None, :], beta[None, :], i, inside, a, b, KEY, OUTPUT, X.dtype.element_ty
            )  # fmt: skip
            dx = _fma(k[None, :], dz, _fma(slope[None, :], d, shift[None, :]))
            tl.store(DX + i, cast(dx, DX.dtype.element_ty), mask=inside)
            if DR is not None:
                tl.store(DR + i, cast(dz, DR.dtype.element_ty), mask=inside)


# Launching.

# Not yet measured on a GPU.
TILE = 2048  # 16 elements of each of 128 threads: two 16-byte accesses in 16-bit dtypes
WARPS = warps_of(Block(TILE, warps=4))
CHANNELS, POINTS = 64, 1024  # the most columns of a tile: channels of rows, points of planes
PROGRAMS = 1024  # that a reduction is split into, where there is the work for them
FEWEST_TILES, MOST_TILES = 4, 64  # of a program of a reduction; beyond the most, Σ (x - K)² could lose digits
SPLITS_AT_ONCE, CHANNELS_AT_ONCE = 256, 8  # of the kernels that add up splits


@dataclass(frozen=True)
class Plan:
    """How a tensor is cut up: by its shape and memory format alone, so that the bits depend on nothing else.

    A channel's tiles are split so that there are about PROGRAMS programs over all groups, each with FEWEST_TILES to
    MOST_TILES tiles (or fewer, where a channel has fewer).
    """

    planes: bool
    rows: int
    """Of planes N, else all rows."""
    columns: int
    channels: int
    block_rows: int
    block_columns: int
    across: int
    """Tiles beside each other."""
    groups: int
    tiles: int
    """Of a group."""
    steps: int
    """Tiles of a program, of which the last may have fewer."""
    splits: int

    @property
    def n(self) -> int:
        """The number of values of a channel."""
        return self.rows * self.columns if self.planes else self.rows

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(planes: bool, rows: int, columns: int, channels: int) -> Plan:
        block_columns = min(triton.next_power_of_2(columns), POINTS if planes else CHANNELS)
        block_rows = min(triton.next_power_of_2(rows), max(TILE // block_columns, 1))
        across = -(-columns // block_columns)
        groups = channels if planes else across
        tiles = -(-rows // block_rows) * (across if planes else 1)
        steps = -(-tiles * groups // PROGRAMS)
        steps = min(max(steps, FEWEST_TILES), MOST_TILES, tiles)
        return Plan(
            planes, rows, columns, channels, block_rows, block_columns, across, groups, tiles, steps, -(-tiles // steps)
        )

    @staticmethod
    def for_tensor(x: Tensor, layout: Layout) -> Plan:
        """Of x (N, C, ...), not empty."""
        n, channels = x.shape[:2]
        points = x.shape[2:].numel()
        if layout.channels or points == 1:
            return Plan.of(False, n * points, channels, channels)
        return Plan.of(True, n, points, channels)

    def matrix(self) -> tuple[int, ...]:
        """The arguments of kernels over the whole matrix."""
        return (self.rows * self.channels if self.planes else self.rows, self.columns, self.channels, self.across)

    def grid(self) -> tuple[int]:
        """Of kernels over the whole matrix."""
        return grid_of(self.matrix()[0], self.block_rows, self.across)

    def reduction(self) -> tuple[int, ...]:
        """The arguments of kernels over groups."""
        return (self.rows, self.columns, self.channels, self.across)

    def groups_grid(self) -> tuple[int]:
        return grid_of(self.groups, 1, self.splits)

    def blocks(self, x: Tensor) -> tuple[Any, ...]:
        return (self.planes, self.block_rows, self.block_columns, is_wide(x))

    def columns_grid(self) -> tuple[int]:
        """Of the kernels that add up splits."""
        return grid_of(self.channels, CHANNELS_AT_ONCE)

    def splits_at_once(self) -> int:
        return min(triton.next_power_of_2(self.splits), SPLITS_AT_ONCE)


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and biased var (C), float32, of x (N, C, ...) that is not empty."""
    layout = Layout.of(x)
    mean, var = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)
    _run_statistics(layout.flat(x), Plan.for_tensor(x, layout), mean, var)
    return mean, var


def _run_statistics(x: Tensor, plan: Plan, mean: Tensor, var: Tensor) -> None:
    partial = torch.empty((4, plan.splits, plan.channels), dtype=torch.float32, device=x.device)
    with device_of(x):
        _statistics[plan.groups_grid()](
            x, partial, *plan.reduction(), plan.groups, plan.steps, plan.tiles, plan.splits, *plan.blocks(x),
            num_warps=WARPS,
        )  # fmt: skip
        _merge[plan.columns_grid()](
            partial, mean, var, float(plan.n), plan.channels, plan.splits, plan.splits_at_once(), CHANNELS_AT_ONCE,
            num_warps=WARPS,
        )  # fmt: skip


def forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float,
    activation: str, parameters: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, in x's dtype promoted with the residual's, and the batch's mean and biased var in float32. x is not empty."""
    layout = Layout.of(x)
    plan = Plan.for_tensor(x, layout)
    mean, var = torch.empty((2, plan.channels), dtype=torch.float32, device=x.device)
    if plan.splits > 1:
        _run_statistics(layout.flat(x), plan, mean, var)
        return apply(x, gamma, beta, residual, mean, var, eps, activation, parameters), mean, var
    flat, r, gamma, beta = layout.flat(x), layout.flat(residual), _vector(gamma), _vector(beta)
    y = torch.empty_like(flat, dtype=x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
    with device_of(x):
        _forward_whole[plan.groups_grid()](
            flat, gamma, beta, r, mean, var, y, eps, *_pair(parameters), *plan.reduction(), plan.tiles,
            activation, *plan.blocks(x), num_warps=WARPS,
        )  # fmt: skip
    return layout.restored(y), mean, var


def apply(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, activation: str, parameters: tuple[float, ...],
) -> Tensor:  # fmt: skip
    """y by statistics that are given, in x's dtype promoted with the residual's. x is not empty."""
    layout = Layout.of(x)
    plan = Plan.for_tensor(x, layout)
    x, residual = layout.flat(x), layout.flat(residual)
    y = torch.empty_like(x, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    with device_of(x):
        _apply[plan.grid()](
            x, _vector(gamma), _vector(beta), residual, _vector(mean), _vector(var), y, eps, *_pair(parameters),
            *plan.matrix(), activation, *plan.blocks(x), num_warps=WARPS,
        )  # fmt: skip
    return layout.restored(y)


def _new(like: Tensor, dtype: torch.dtype | None, needed: bool) -> Any:
    return torch.empty_like(like, dtype=dtype) if needed and dtype is not None else None


Gradients = list[Any]
Dtypes = Sequence["torch.dtype | None"]


def backward(
    dy: Tensor, dmean: Tensor | None, dvar: Tensor | None,
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor,
    y: Tensor | None, eps: float, activation: str, parameters: tuple[float, ...], output: bool,
    needs: Sequence[bool], dtypes: Dtypes,
) -> Gradients:  # fmt: skip
    """[dx, dγ, dβ, dr] of :func:`forward`, each where it is needed, in these dtypes.

    Args:
        dmean, dvar: the gradients of the statistics, or None.
        y: the output, or None where it shall be computed again from x, β and the residual.
        output: f′ is told by y, not by z.
        needs, dtypes: for x, γ, β and r.
    """
    layout = Layout.of(x)
    plan = Plan.for_tensor(x, layout)
    dy, x, residual, y = (layout.flat(t) for t in (dy, x, residual, y))
    gamma, beta, dmean, dvar = (_vector(t) for t in (gamma, beta, dmean, dvar))
    identity = activation == "identity"
    dx = _new(x, dtypes[0], needs[0])
    dgamma, dbeta = (_new(mean, dtypes[i], needs[i]) for i in (1, 2))
    dr = _new(x, dtypes[3], needs[3] and not identity)
    saved = (x, gamma, beta, residual, y, mean, var)
    constants = (activation, output, *plan.blocks(x))
    a, b = _pair(parameters)
    with device_of(x):
        if plan.splits == 1:
            _backward_whole[plan.groups_grid()](
                dy, *saved, dx, dr, dgamma, dbeta, dmean, dvar, eps, float(plan.n), a, b,
                *plan.reduction(), plan.tiles, *constants, num_warps=WARPS,
            )  # fmt: skip
        else:
            partial = torch.empty((2, plan.splits, plan.channels), dtype=torch.float32, device=x.device)
            coefficients = None if dx is None else torch.empty((2, plan.channels), device=x.device)
            # Where dr is as exact as dy, the second sweep reads it instead of what dz is computed from.
            early = dr is not None and (dx is None or dr.dtype == dy.dtype)
            _reduce[plan.groups_grid()](
                dy, *saved, None, dr if early else None, partial, eps, a, b, *plan.reduction(),
                plan.groups, plan.steps, plan.tiles, plan.splits, *constants, num_warps=WARPS,
            )  # fmt: skip
            _finish[plan.columns_grid()](
                partial, gamma, var, dgamma, dbeta, dmean, dvar, coefficients, eps, float(plan.n),
                plan.channels, plan.splits, False, plan.splits_at_once(), CHANNELS_AT_ONCE, num_warps=WARPS,
            )  # fmt: skip
            if dx is not None:
                if early:
                    constants = ("identity", False, *plan.blocks(x))
                    saved = (x, gamma, None, None, None, mean, var)
                _backward_apply[plan.grid()](
                    dr if early else dy, *saved, coefficients, dx, None if early else dr, eps, a, b,
                    *plan.matrix(), *constants, num_warps=WARPS,
                )  # fmt: skip
    if identity and needs[3]:
        dr = dy.to(dtypes[3])
    return [layout.restored(dx), dgamma, dbeta, layout.restored(dr)]


def normalize_backward(
    dy: Tensor,
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor,
    y: Tensor | None, eps: float, activation: str, parameters: tuple[float, ...], output: bool,
    needs: Sequence[bool], dtypes: Dtypes,
) -> Gradients:  # fmt: skip
    """[dx, dγ, dβ, dr, dmean, dvar] of :func:`apply`, as :func:`backward`: one sweep, and a reduction where needed."""
    layout = Layout.of(x)
    plan = Plan.for_tensor(x, layout)
    dy, x, residual, y = (layout.flat(t) for t in (dy, x, residual, y))
    gamma, beta, mean, var = (_vector(t) for t in (gamma, beta, mean, var))
    identity = activation == "identity"
    dx = _new(x, dtypes[0], needs[0])
    dr = _new(x, dtypes[3], needs[3] and not identity)
    of_channels = [_new(mean, dtypes[i], needs[i]) for i in (1, 2, 4, 5)]
    saved = (x, gamma, beta, residual, y, mean, var)
    constants = (activation, output, *plan.blocks(x))
    a, b = _pair(parameters)
    with device_of(x):
        if any(t is not None for t in of_channels):
            partial = torch.empty((2, plan.splits, plan.channels), dtype=torch.float32, device=x.device)
            _reduce[plan.groups_grid()](
                dy, *saved, dx, dr, partial, eps, a, b, *plan.reduction(),
                plan.groups, plan.steps, plan.tiles, plan.splits, *constants, num_warps=WARPS,
            )  # fmt: skip
            _finish[plan.columns_grid()](
                partial, gamma, var, *of_channels, None, eps, float(plan.n),
                plan.channels, plan.splits, True, plan.splits_at_once(), CHANNELS_AT_ONCE, num_warps=WARPS,
            )  # fmt: skip
        elif dx is not None or dr is not None:
            _backward_apply[plan.grid()](
                dy, *saved, None, dx, dr, eps, a, b, *plan.matrix(), *constants, num_warps=WARPS
            )  # fmt: skip
    if identity and needs[3]:
        dr = dy.to(dtypes[3])
    dgamma, dbeta, dmean, dvar = of_channels
    return [layout.restored(dx), dgamma, dbeta, layout.restored(dr), dmean, dvar]


def _targets() -> Iterator[dict[str, Any]]:
    """Every kernel, of both kinds of matrices, with its main options."""
    x, s = "*{dtype}", "*fp32"
    types = {
        **dict.fromkeys(("X", "R", "Y", "S", "DY", "DX", "DR"), x),
        **dict.fromkeys(("GAMMA", "BETA", "MEAN", "VAR", "PARTIAL", "COEFFICIENTS"), s),
        **dict.fromkeys(("DGAMMA", "DBETA", "DMEAN", "DVAR"), s),
        **dict.fromkeys(("eps", "n", "a", "b"), "fp32"),
        **dict.fromkeys(("rows", "columns", "channels", "across", "groups", "steps", "tiles", "splits"), "i32"),
    }

    def target(name: str, kernel: Any, absent: str = "", wide: bool = True, **constants: Any) -> dict[str, Any]:
        constants |= dict.fromkeys(absent.split())
        given = {name: types[name] for name in kernel.arg_names if name not in constants}
        return {
            "name": f"batch_norm.{name}", "kernel": kernel, "types": given, "constants": constants, "num_warps": 4,
            "wide_accesses": wide,
        }  # fmt: skip

    rows = {"PLANES": False, "BLOCK_ROWS": TILE // CHANNELS, "BLOCK_COLUMNS": CHANNELS, "WIDE": False}
    planes = {"PLANES": True, "BLOCK_ROWS": TILE // POINTS, "BLOCK_COLUMNS": POINTS, "WIDE": False}
    relu, gelu, none = {"KEY": "relu", "OUTPUT": True}, {"KEY": "gelu", "OUTPUT": False}, {"KEY": "identity"}
    splits = {"BLOCK_SPLITS": SPLITS_AT_ONCE, "BLOCK_COLUMNS": CHANNELS_AT_ONCE}
    for kind, blocks in (("rows", rows), ("planes", planes), ("planes, over 2³¹ elements", {**planes, "WIDE": True})):
        yield target(f"statistics, {kind}", _statistics, **blocks)
        yield target(f"apply relu, {kind}", _apply, "R", KEY="relu", **blocks)
        yield target(f"apply gelu residual, {kind}", _apply, KEY="gelu", **blocks)
        yield target(f"forward_whole relu residual, {kind}", _forward_whole, KEY="relu", **blocks)
        yield target(f"reduce relu, {kind}", _reduce, "R S DX DR", **relu, **blocks)
        yield target(f"reduce relu residual, {kind}", _reduce, "R DX", **relu, **blocks)
        yield target(f"reduce gelu residual, statistics given, {kind}", _reduce, "S", **gelu, **blocks)
        yield target(f"backward_apply relu, {kind}", _backward_apply, "R S DR", **relu, **blocks)
        yield target(f"backward_apply identity, {kind}", _backward_apply, "BETA R S DR", **none, OUTPUT=False, **blocks)
        yield target(f"backward_apply gelu residual, {kind}", _backward_apply, "S", **gelu, **blocks)
        yield target(f"backward_whole relu, {kind}", _backward_whole, "R S DR DMEAN DVAR", **relu, **blocks)
        yield target(f"backward_whole gelu residual, {kind}", _backward_whole, "S", **gelu, **blocks)
    yield target("merge", _merge, wide=False, **splits)
    yield target("finish", _finish, "DMEAN DVAR", wide=False, GIVEN=False, **splits)
    yield target("finish, statistics given", _finish, "COEFFICIENTS", wide=False, GIVEN=True, **splits)


TARGETS = list(_targets())  # what tests/test_compile_targets.py compiles
