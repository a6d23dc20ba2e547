"""The dense layer's matrix product with everything that follows it in the epilogue.

    z = x Wᵀ + b
    a = f(z)
    y = keep · a / (1 - p) + r

Products are summed in float32, in one order that the shape of x does not change: tile by tile along K, never split
over programs. So a row of y has the same bits whatever rows stand beside it, which batch-invariant mode relies on.

Which of the two ways a dense layer goes is decided in :func:`choose`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation as act
from . import random
from .arithmetic import IN_INTERPRETER
from .cast import cast
from .epilogue import Epilogue, dropout_of, pair_of
from .launch import Block, is_wide, tuned, warps_of

__all__ = ["choose", "forward", "input_precision", "using"]

WAYS = ("auto", "cublas", "triton")


def _checked(way: str, source: str) -> str:
    if way not in WAYS:
        raise ValueError(f"{source}: expected one of {', '.join(WAYS)}, got {way!r}")
    return way


_forced = _checked(os.environ.get("BP_TORCH_DENSE", "auto"), "BP_TORCH_DENSE")


@contextmanager
def using(way: str) -> Iterator[None]:
    """Inside the block :func:`choose` answers ``"cublas"`` or ``"triton"`` for every shape; ``"auto"`` lets it choose.

    The environment variable ``BP_TORCH_DENSE`` sets the same for a process. ValueError: another name.
    """
    global _forced
    before, _forced = _forced, _checked(way, "using()")
    try:
        yield
    finally:
        _forced = before


def choose() -> str:
    """``"cublas"``: torch's product, then one fused pass; or ``"triton"``: the kernel below.

    ``"cublas"`` unless the other is asked for: see launch.py.
    """
    return "cublas" if _forced == "auto" else _forced


def input_precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: TF32 only where torch's own settings allow it, and never on ROCm."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # The one setting that follows allow_tf32 and set_float32_matmul_precision; reading those may raise.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def _dense(
    X, W, BIAS, R, SEED, Y, S, M, N, K, x_row, x_column, w_row, w_column, a, b, scale,
    KEY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_R: tl.constexpr, STORE: tl.constexpr,
    THRESHOLD: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of y. Programs run down GROUP tiles of rows before they go to the next column, for the L2 cache."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (tiles_n * GROUP) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (tiles_n * GROUP)
    m = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_tile = X + m.to(tl.int64)[:, None] * x_row + k[None, :] * x_column
    w_tile = W + n.to(tl.int64)[None, :] * w_row + k[:, None] * w_column
    step = tl.full((), BLOCK_K, tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_tile, mask=(m < M)[:, None] & (k < K - start)[None, :], other=0.0)
        w = tl.load(w_tile, mask=(n < N)[None, :] & (k < K - start)[:, None], other=0.0)
        if IN_INTERPRETER:  # its dot takes the bits of bfloat16 for integers
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        x_tile += step * x_column
        w_tile += step * w_column
    z = total
    if HAS_BIAS:
        z += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    row = m.to(tl.int64) if WIDE else m
    i = row[:, None] * N + n[None, :]
    if STORE == "z":
        tl.store(S + i, cast(z, S.dtype.element_ty), mask=inside)
    y = act.forward(z, KEY, a, b)
    if STORE == "a":
        tl.store(S + i, cast(y, S.dtype.element_ty), mask=inside)
    if BITS == 0:
        y = y * scale
    else:
        y = y * tl.where(random.keep(tl.load(SEED), i, THRESHOLD, BITS), scale, 0.0)
    if HAS_R:
        y += tl.load(R + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + i, cast(y, Y.dtype.element_ty), mask=inside)


GROUP = 8


def family(dtype: torch.dtype) -> str:
    """Of the launch table. Its classes are told by the weight's size, never by the rows: see batch-invariant mode."""
    return "dense float32" if dtype == torch.float32 else "dense 16-bit"


def forward(
    x: Tensor, W: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, e: Epilogue
) -> tuple[Tensor, Tensor | None]:
    """y = dropout(f(x Wᵀ + b)) + residual, and z or a where that tells f′.

    Shapes: x (..., K), W (N, K), bias (N), residual, y and s (..., N). Any strides. y has x's dtype promoted with the
    residual's, s has x's. The mask is that of elementwise.py for the same seed.
    """
    M, (N, K) = x.shape[:-1].numel(), W.shape
    store = e.keeps(seed, residual)
    store = store if store in ("z", "a") else ""
    rows = x.reshape(M, K)
    r = None if residual is None else residual.contiguous()
    dtype = x.dtype if r is None else torch.promote_types(x.dtype, r.dtype)
    y = torch.empty((M, N), dtype=dtype, device=x.device)
    s = torch.empty((M, N), dtype=x.dtype, device=x.device) if store else None
    if y.numel():
        scale, threshold, bits = dropout_of(e, seed)
        b = None if bias is None else bias.contiguous()

        def run(block: Block) -> None:
            _dense[(triton.cdiv(M, block.rows) * triton.cdiv(N, block.columns),)](
                rows, W, b, r, seed, y, s, M, N, K, *rows.stride(), *W.stride(), *pair_of(e), scale,
                e.name, b is not None, r is not None, store, threshold, bits, input_precision(x.dtype),
                block.rows, block.columns, block.depth, GROUP, is_wide(y), num_warps=warps_of(block),
            )  # fmt: skip

        tuned(family(x.dtype), W.numel(), x, run)
    shape = (*x.shape[:-1], N)
    return y.reshape(shape), None if s is None else s.reshape(shape)
