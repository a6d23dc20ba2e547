"""Dropout's mask: the seed that it is drawn from, and the mask written out.

What drops elements draws its part of the mask by itself, with the functions of random.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Block, block_for, device_of, grid_of, warps_of
from .random import bits_for, keep_contiguous, threshold

__all__ = ["mask", "new_seed"]


def new_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A 64-bit seed from torch's generator of the device, on the device: a replayed CUDA graph draws a fresh one."""
    return torch.empty((1,), dtype=torch.int64, device=device).random_(generator=generator)


@triton.jit
def _mask(OUT, SEED, n, THRESHOLD: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    kept = keep_contiguous(tl.load(SEED), start, THRESHOLD, BITS, BLOCK)
    tl.store(OUT + i, kept, mask=i < n)


def mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """The mask written out, for what needs it as a tensor (a backward that is itself differentiated)."""
    out = torch.empty(shape, dtype=torch.bool, device=seed.device)
    n = out.numel()
    if n:

        def launch(block: Block) -> None:
            _mask[grid_of(n, block.columns)](
                out, seed, n, threshold(p), bits_for(p), block.columns, num_warps=warps_of(block)
            )

        with device_of(out):
            launch(block_for("mask", n, seed.device, launch))
    return out
