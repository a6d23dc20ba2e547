"""The mask of dropout, written out."""

from __future__ import annotations

from bp_torch.triton_kernels import dropout as kernels

from . import target

__all__ = ["TARGETS"]

TARGETS = [
    target(
        f"dropout.mask, {bits} bits",
        kernels._mask,
        {"OUT": "*i1", "SEED": "*i64", "n": "i32"},
        {"THRESHOLD": 2 ** (bits - 1), "BITS": bits, "BLOCK": 2048},
    )
    for bits in (16, 32)
]
