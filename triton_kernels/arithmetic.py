"""Arithmetic to the last digits, where what the language has is less exact on a chip than in its interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import INTERPRETED

__all__ = ["IN_INTERPRETER", "exp", "fma"]

IN_INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once: the same bits in each kernel. Triton 3.7's interpreter rounds the product as well."""
    if IN_INTERPRETER:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def exp(x):
    """e^x in float32, to a few units of the last place whatever x is.

    A chip's own is 2^t with t = x log₂ e, whose rounding costs |x| such units. With d = x - t ln 2, which is small and
    known to many digits, e^x = 2^t e^d = 2^t (1 + d). Beyond 88.72 there are 0, ∞ and NaN, as 2^t has them.
    """
    t = x * 1.4426950408889634
    y = tl.exp2(t)
    d = fma(t, -0.693147182464599609375, x)  # ln 2 in float32
    d = fma(t, 1.904654299957768e-09, d)  # and what that is too large by
    return tl.where(tl.abs(x) < 88.72, fma(y, d, y), y)
