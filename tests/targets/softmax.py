"""Softmax and its logarithm, for each way that rows lie and are walked through."""

from __future__ import annotations

from typing import Any

from bp_torch.triton_kernels import softmax as kernels
from bp_torch.triton_kernels.launch import first_block
from bp_torch.triton_kernels.softmax import NEIGHBOURS, TILE

from . import target

__all__ = ["TARGETS"]

SIZES = {"positions": "i32", "K": "i32", "inner": "i32"}
SHAPES: dict[str, dict[str, Any]] = {
    "row": {"ONE": True, "P": 1, "BLOCK": first_block("softmax", "whole row").columns, "STRIDED": False},
    "short rows": {"ONE": True, "P": 256, "BLOCK": 16, "STRIDED": False},
    "long rows": {"ONE": False, "P": 1, "BLOCK": TILE, "STRIDED": False},
    "strided": {"ONE": True, "P": NEIGHBOURS, "BLOCK": TILE // NEIGHBOURS, "STRIDED": True},
    "strided long": {"ONE": False, "P": NEIGHBOURS, "BLOCK": TILE // NEIGHBOURS, "STRIDED": True},
}
KERNELS = {"forward": (kernels._forward, ("X", "Y")), "backward": (kernels._backward, ("DY", "Y", "DX"))}
TARGETS = [
    target(
        f"softmax.{name}{' log' if log else ''} {shape}",
        kernel,
        {**dict.fromkeys(tensors, "*{dtype}"), **SIZES},
        {"LOG": log, **constants},
        kernels.tile_warps(constants["P"], constants["BLOCK"]),
        wide=not constants["STRIDED"] and shape != "short rows",
    )
    for name, (kernel, tensors) in KERNELS.items()
    for log in (False, True)
    for shape, constants in SHAPES.items()
]
