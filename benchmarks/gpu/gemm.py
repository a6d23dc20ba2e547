"""A product with bias, relu and dropout in its epilogue, in twelve configurations, checked and timed beside cuBLAS.

A study for triton_kernels/dense.py: pointers or TMA descriptors, one Philox call for eight columns, and an accumulator
that the epilogue takes whole or in halves, so that fewer registers hold it::

    python -m benchmarks.gpu.gemm
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bp_torch import triton_kernels as kernels
from bp_torch.functions.epilogue import Epilogue
from bp_torch.triton_kernels.random import _words

SHAPES = ((65536, 1024, 1024), (65536, 1024, 256), (16384, 4096, 4096))
"""M, N, K."""
BLOCKS = (
    (128, 128, 64, 4, 3, 1),
    (128, 128, 64, 8, 3, 2),
    (128, 128, 64, 8, 4, 1),
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 3, 2),
    (256, 128, 64, 8, 3, 2),
)
"""Rows, columns, depth, warps, stages, and the parts that the epilogue takes."""


@triton.jit
def _keep(seed, first, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of a tile; ``first`` (ROWS, COLUMNS // 8) are the numbers of its groups of 8 elements."""
    words = tl.reshape(_words(seed, first), (ROWS, COLUMNS // 8, 4))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLUMNS)) >= THRESHOLD


@triton.jit
def _epilogue(
    total, m, n, BIAS, SEED, Y, M, N, scale, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Of the rows m and the columns n ... n + COLUMNS - 1."""
    c = n + tl.arange(0, COLUMNS)
    z = total + tl.load(BIAS + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    y = (tl.where(z <= 0, 0.0, z) * scale).to(Y.dtype.element_ty)
    groups = m[:, None] * (N // 8) + (n // 8 + tl.arange(0, COLUMNS // 8))[None, :]
    y = tl.where(_keep(tl.load(SEED), groups, THRESHOLD, ROWS, COLUMNS), y, 0.0)
    tl.store(Y + m[:, None] * N + c[None, :], y, mask=(m < M)[:, None] & (c < N)[None, :])


@triton.jit
def _product(
    X, W, BIAS, SEED, Y, M, N, K, scale, TMA: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """K is a multiple of BLOCK_K. X and W are descriptors where TMA, else pointers."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (tiles_n * GROUP) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (tiles_n * GROUP)
    top = (first + within % height) * BLOCK_M
    left = within // height * BLOCK_N
    m = top + tl.arange(0, BLOCK_M)
    n = left + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if TMA:
            total = tl.dot(X.load([top, start]), W.load([left, start]).T, total)
        else:
            x = tl.load(X + (m % M)[:, None] * K + (start + k)[None, :])
            w = tl.load(W + (n % N)[None, :] * K + (start + k)[:, None])
            total = tl.dot(x, w, total)
    if PARTS == 1:
        _epilogue(total, m, left, BIAS, SEED, Y, M, N, scale, THRESHOLD, BLOCK_M, BLOCK_N)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        a, b = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _epilogue(a, m, left, BIAS, SEED, Y, M, N, scale, THRESHOLD, BLOCK_M, HALF)
        _epilogue(b, m, left + HALF, BIAS, SEED, Y, M, N, scale, THRESHOLD, BLOCK_M, HALF)


def launch(x: Tensor, W: Tensor, b: Tensor, seed: Tensor, y: Tensor, block: tuple[int, ...], tma: bool) -> None:
    """y = dropout(relu(x Wᵀ + b)) with p = 0.5."""
    (M, K), N = x.shape, W.shape[0]
    rows, columns, depth, warps, stages, parts = block
    operands: tuple[Any, Any] = (x, W)
    if tma:
        operands = (
            TensorDescriptor.from_tensor(x, [rows, depth]), TensorDescriptor.from_tensor(W, [columns, depth])
        )  # fmt: skip
    _product[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
        *operands, b, seed, y, M, N, K, 2.0, tma, 2**15, rows, columns, depth, 8, parts,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def main() -> None:
    milliseconds = kernels.launch.tuning.milliseconds
    for M, N, K in SHAPES:
        x, W, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((M, K), (N, K), (N,)))
        W /= K**0.5
        y, seed = torch.empty(M, N, device="cuda", dtype=x.dtype), torch.tensor([5], device="cuda")
        rate = 2 * M * N * K / 1e9

        def in_two() -> Tensor:
            z = torch.nn.functional.linear(x, W, b)
            return kernels.elementwise.forward(z, None, None, seed, Epilogue("relu", (), 0.5))[0]

        plain = milliseconds(lambda: torch.mm(x, W.t(), out=y))
        passes = milliseconds(in_two)
        print(f"{M}x{N}x{K}: cuBLAS {plain:.3f} ms, {rate / plain:.0f} TFLOP/s; with a pass after it {passes:.3f} ms")
        z = torch.nn.functional.linear(x[:256].float(), W.float(), b.float())
        right = 2 * z.relu() * kernels.dropout.mask(seed, (M, N), 0.5)[:256]
        found: dict[str, float] = {}
        for block, tma in product(BLOCKS, (False, True)):
            name = f"{'TMA' if tma else 'pointers'} {block}"
            try:
                y.fill_(float("nan"))
                launch(x, W, b, seed, y, block, tma)
                off = ((y[:256].float() - right).norm() / right.norm()).item()
                found[name] = milliseconds(lambda: launch(x, W, b, seed, y, block, tma))
            except Exception as reason:  # a compiler's, or no room on this chip
                print(f"  {name} failed: {type(reason).__name__} {str(reason)[-200:]}", flush=True)
                continue
            print(f"  {name}: {found[name]:.3f} ms, {plain / found[name]:.0%} of plain, error {off:.1e}", flush=True)
        if found:
            name = min(found, key=found.__getitem__)
            print(f"  fastest: {name}, {passes / found[name]:.2f} x cuBLAS with a pass after it", flush=True)


if __name__ == "__main__":
    main()
