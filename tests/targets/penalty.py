"""The kernels of the penalties, for each choice of terms."""

from __future__ import annotations

from typing import Any

from bp_torch.triton_kernels import penalty as kernels

from . import Target, target

__all__ = ["TARGETS"]


def penalty(name: str, kernel: Any, pointers: dict[str, str], l1: bool, l2: bool) -> Target:
    types = {"TABLE": "*i64", **pointers, "first": "i32", "l1": "fp32", "l2": "fp32"}
    constants = {"HAS_L1": l1, "HAS_L2": l2, "ALIGNED": True, "BLOCK": kernels.BLOCK}
    return target(f"penalty.{name} {' '.join(['l1'] * l1 + ['l2'] * l2)}", kernel, types, constants, kernels.WARPS)


TARGETS = [
    made
    for l1, l2 in ((True, False), (False, True), (True, True))
    for made in (
        penalty("forward", kernels._forward, {"PART": "*fp64", "KIND": "*{dtype}"}, l1, l2),
        penalty("backward", kernels._backward, {"DR": "*{dtype}", "DW": "*{dtype}"}, l1, l2),
    )
]
