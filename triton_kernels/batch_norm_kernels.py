"""The kernels of batch normalization. What they compute is written in batch_norm.py, which launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from . import activation as act
from .arithmetic import IN_INTERPRETER, fma
from .batch_norm_tiles import channels_of, last_first, matrix_tile, share_of, spread, tile
from .cast import cast

__all__: list[str] = []


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
def _largest(t, PLANES: tl.constexpr):
    """Of a tile, for each channel of its group."""
    if PLANES:
        return tl.max(tl.max(t, axis=1), axis=0, keep_dims=True)
    else:
        return tl.max(t, axis=0)


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
def _deviation(var, eps):
    """s = 1/√(var + eps), to the last bit or nearly: a chip's approximation, and one step of Newton's method."""
    v = var + eps
    s = tl.rsqrt(v)
    w = v * s
    error = fma(-w, s, tl.full(s.shape, 1.0, tl.float32)) - fma(v, s, -w) * s
    return tl.where((s > 0) & (s < float("inf")), fma(0.5 * s, error, s), s)


@triton.jit
def _moments(
    X, group, first, last, rows, columns, channels, across,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """count, K, mean - K and Σ (x - mean)² of each channel in the tiles first ... last - 1."""
    i, inside, count = tile(
        first, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    x = _load(X, i, inside)
    K = tl.div_rn(_sum(x, PLANES), count)
    # In steps of the x, lest every x - K is rounded the same way: what that takes from the mean does not average out.
    coarse = 4 * _largest(tl.abs(x), PLANES)
    coarse = tl.where(coarse < float("inf"), coarse, 0.0)
    K = (K + coarse) - coarse
    K = tl.where(tl.abs(K) < float("inf"), K, 0.0)  # so that the mean is the infinity that Σ x is
    d = tl.where(inside, x - K[None, :], 0.0)
    s1 = d
    s2 = d * d
    for t in range(first + 1, last):
        i, inside, more = tile(
            t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
        )  # fmt: skip
        d = tl.where(inside, _load(X, i, inside) - K[None, :], 0.0)
        s1 += d
        s2 += d * d
        count += more
    total = _sum(s1, PLANES)
    delta = tl.div_rn(total, count)
    m2 = _sum(s2, PLANES) - total * delta
    return count, K, delta, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def _pre_activation(d, k, beta, R, i, inside):
    """z, from d = x - mean."""
    z = fma(d, k, beta)
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
        return tl.where(inside, act.pull(dy, s, KEY, OUTPUT, a, b), 0.0)


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
        i, inside, _count = tile(t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
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
    return tl.div_rn(dmean, n), tl.div_rn(dvar, n)


# Forward.


@triton.jit
def _statistics(
    X, PARTIAL, rows, columns, channels, across, groups, steps, tiles, splits,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A split of a group: its count, K, mean - K and Σ (x - mean)²."""
    group, split, first, last = share_of(groups, steps, tiles)
    c, known = channels_of(group, channels, PLANES, BLOCK_COLUMNS)
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
def _merge(
    PARTIAL, MEAN, REST, VAR, n, channels, splits, BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """The statistics of all splits. Means count from the first split's K, so that a common offset costs no digits.

    REST, if given, gets what the mean lost when it was rounded.
    """
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
    delta = tl.div_rn(tl.sum(total, axis=0), n)
    m2 = tl.zeros((BLOCK_SPLITS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        i = split[:, None] * channels + c[None, :]
        inside = (split < splits)[:, None] & known[None, :]
        mean = _load(PARTIAL + size, i, inside) - K[None, :] + _load(PARTIAL + 2 * size, i, inside) - delta[None, :]
        own = _load(PARTIAL, i, inside) * mean * mean + _load(PARTIAL + 3 * size, i, inside)
        m2 += tl.where(inside, own, 0.0)
    mean = K + delta
    tl.store(MEAN + c, mean, mask=known)
    if REST is not None:  # exact, whichever of the two is larger (Knuth's sum)
        given = mean - K
        tl.store(REST + c, (K - (mean - given)) + (delta - given), mask=known)
    tl.store(VAR + c, tl.div_rn(tl.sum(m2, axis=0), n), mask=known)


@triton.jit
def _apply(
    X, GAMMA, BETA, R, MEAN, VAR, Y, eps, a, b, rows, columns, channels, across,
    KEY: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i, inside, c, known = matrix_tile(
        last_first(), rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    k = _optional(GAMMA, c, known, 1.0) * _deviation(_load(VAR, c, known), eps)
    beta = _optional(BETA, c, known, 0.0)
    d = _load(X, i, inside) - spread(_load(MEAN, c, known), PLANES)
    z = _pre_activation(d, spread(k, PLANES), spread(beta, PLANES), R, i, inside)
    tl.store(Y + i, cast(act.forward(z, KEY, a, b), Y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_whole(
    X, GAMMA, BETA, R, MEAN, VAR, Y, eps, a, b, rows, columns, channels, across, tiles,
    KEY: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a whole group."""
    group, _split, first, last = share_of(tl.num_programs(0), tiles, tiles)
    c, known = channels_of(group, channels, PLANES, BLOCK_COLUMNS)
    count, K, delta, m2 = _moments(
        X, group, first, last, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    mean = K + delta
    var = tl.div_rn(m2, count)
    tl.store(MEAN + c, mean, mask=known)
    tl.store(VAR + c, var, mask=known)
    k = _optional(GAMMA, c, known, 1.0) * _deviation(var, eps)
    beta = _optional(BETA, c, known, 0.0)
    for t in range(first, last):
        i, inside, _count = tile(t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
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
    group, split, first, last = share_of(groups, steps, tiles)
    c, known = channels_of(group, channels, PLANES, BLOCK_COLUMNS)
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
    i, inside, c, known = matrix_tile(
        last_first(), rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE
    )  # fmt: skip
    k = spread(_optional(GAMMA, c, known, 1.0) * _deviation(_load(VAR, c, known), eps), PLANES)
    beta = spread(_optional(BETA, c, known, 0.0), PLANES)
    d = _load(X, i, inside) - spread(_load(MEAN, c, known), PLANES)
    dz = _dz(DY, S, R, d, k, beta, i, inside, a, b, KEY, OUTPUT, X.dtype.element_ty)
    if COEFFICIENTS is not None:
        shift = spread(_load(COEFFICIENTS, c, known), PLANES)
        slope = spread(_load(COEFFICIENTS + channels, c, known), PLANES)
        dx = fma(k, dz, fma(slope, d, shift))
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
    group, _split, first, last = share_of(tl.num_programs(0), tiles, tiles)
    c, known = channels_of(group, channels, PLANES, BLOCK_COLUMNS)
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
            i, inside, _count = tile(t, group, rows, columns, channels, across, PLANES, BLOCK_ROWS, BLOCK_COLUMNS, WIDE)
            d = _load(X, i, inside) - mean[None, :]
            dz = _dz(
                DY, S, R, d, k[None, :], beta[None, :], i, inside, a, b, KEY, OUTPUT, X.dtype.element_ty
            )  # fmt: skip
            dx = fma(k[None, :], dz, fma(slope[None, :], d, shift[None, :]))
            tl.store(DX + i, cast(dx, DX.dtype.element_ty), mask=inside)
            if DR is not None:
                tl.store(DR + i, cast(dz, DR.dtype.element_ty), mask=inside)
