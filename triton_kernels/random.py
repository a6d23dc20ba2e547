"""The bits of dropout masks, from a seed and an element's index, so that no mask is ever stored.

Philox4x32-10 (Salmon et al. 2011) of (seed, index // lanes) gives 128 random bits, which serve 8 elements with 16 bits
each, or 4 with 32 bits. An element is kept where its bits, as an unsigned number, are at least p · 2^bits. The mask
depends on nothing else: not on the block size, not on the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bits_for", "keep", "keep_contiguous", "threshold"]


def bits_for(p: float) -> int:
    """16 where 65536 p is a whole number to one part in a thousand of p and of 1 - p, else 32."""
    return 16 if abs(round(p * 2**16) / 2**16 - p) <= 1e-3 * min(p, 1 - p) else 32


def threshold(p: float) -> int:
    """p · 2^bits, at most the largest unsigned number."""
    bits = bits_for(p)
    return min(round(p * 2**bits), 2**bits - 1)


@triton.jit
def _words(seed, group):
    """Four words for each group, in order along a new last dimension."""
    low = group.to(tl.uint32)
    high = (group.to(tl.uint64) >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def keep_contiguous(seed, start, THRESHOLD: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of the elements start ... start + BLOCK - 1; start is a multiple of 8."""
    LANES: tl.constexpr = 128 // BITS
    GROUPS: tl.constexpr = BLOCK // LANES
    words = tl.reshape(_words(seed, start // LANES + tl.arange(0, GROUPS)), (GROUPS, 4))
    if BITS == 16:
        halves = tl.join(words & 0xFFFF, words >> 16)
        return tl.reshape(halves, (BLOCK,)) >= THRESHOLD
    else:
        return tl.reshape(words, (BLOCK,)) >= THRESHOLD


@triton.jit
def keep(seed, index, THRESHOLD: tl.constexpr, BITS: tl.constexpr):
    """The mask of any elements: one Philox call each."""
    LANES: tl.constexpr = 128 // BITS
    group = index // LANES
    lane = (index % LANES).to(tl.int32)
    low = group.to(tl.uint32)
    high = (group.to(tl.uint64) >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    word = lane * 4 // LANES
    w = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    if BITS == 16:
        w = tl.where(lane % 2 == 0, w & 0xFFFF, w >> 16)
    return w >= THRESHOLD
