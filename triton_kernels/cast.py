"""Rounding to the dtype of what is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import IN_INTERPRETER

__all__ = ["cast"]


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to dtype, to the nearest and to even, as GPUs round. Triton 3.7's interpreter truncates to bfloat16."""
    if IN_INTERPRETER and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, rounded.to(tl.float32, bitcast=True))
    return x.to(dtype)
