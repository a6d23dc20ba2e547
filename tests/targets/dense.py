"""The product of a dense layer with what follows it. A tile's shape depends on the dtype, so each is named."""

from __future__ import annotations

import torch

from bp_torch.triton_kernels import dense as kernels
from bp_torch.triton_kernels.launch import first_block

from . import Target, target

__all__ = ["TARGETS"]


def dense(
    name: str, dtype: str, key: str, store: str = "", bits: int = 0, residual: bool = False, precision: str = "ieee"
) -> Target:
    block = first_block(kernels.family(torch.float32 if dtype == "fp32" else torch.bfloat16))
    types = dict.fromkeys(("X", "W", "BIAS", "R", "Y", "S"), f"*{dtype}") | {"SEED": "*i64"}
    types |= dict.fromkeys(("M", "N", "K", "x_row", "w_row"), "i32") | dict.fromkeys(("a", "b", "scale"), "fp32")
    constants = {
        "x_column": 1, "w_column": 1, "KEY": key, "HAS_BIAS": True, "HAS_R": residual, "STORE": store,
        "THRESHOLD": 2 ** (bits - 1) if bits else 0, "BITS": bits, "PRECISION": precision,
        "BLOCK_M": block.rows, "BLOCK_N": block.columns, "BLOCK_K": block.depth, "GROUP": kernels.GROUP, "WIDE": False,
    }  # fmt: skip
    constants |= {pointer: None for pointer, used in (("R", residual), ("S", store), ("SEED", bits)) if not used}
    wide = residual or not bits  # else seed and bias are a large part
    return target(f"dense {name}", kernels._dense, types, constants, block.warps, wide)


TARGETS = [
    made
    for dtype in ("fp32", "bf16", "fp16")
    for made in (
        dense("identity", dtype, "identity"),
        dense("relu dropout", dtype, "relu", bits=16),
        dense("gelu dropout residual", dtype, "gelu", "z", 16, True),
        dense("tanh dropout", dtype, "tanh", "a", 32),
        *([dense("relu tf32", dtype, "relu", precision="tf32")] if dtype == "fp32" else []),
    )
]
