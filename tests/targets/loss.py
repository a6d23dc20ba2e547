"""The kernels of the elementwise losses and of the sums that reduce them."""

from __future__ import annotations

from bp_torch.triton_kernels import loss as kernels

from . import Target, target

__all__ = ["TARGETS"]

TYPES = {
    **dict.fromkeys(("X", "T", "W", "PI", "DLOSS", "DX", "DT", "DW", "LOSS"), "*{dtype}"),
    **dict.fromkeys(("n", "w_count", "pi_count"), "i32"),
    **dict.fromkeys(("a", "divisor"), "fp32"),
    "PART": "*fp64",
    "TOTAL": "*fp32",
}


def both(key: str, w_mode: int = 0, pi_mode: int = 0, none: bool = False, by_total: bool = False) -> list[Target]:
    """Forward and backward."""
    modes = {"KEY": key, "W_MODE": w_mode, "PI_MODE": pi_mode, "NONE": none, "BLOCK": kernels.BLOCK, "WIDE": False}
    sums = {"W_SUM": by_total, "STEPS": 1 if none else 4}
    needs = {"BY_TOTAL": by_total, "NEED_X": True, "NEED_T": True, "NEED_W": w_mode == 1}
    options = f"{key}{' weight' if w_mode else ''}{' none' if none else ''}"
    wide = w_mode < 2 and pi_mode < 2
    backward_types = {**TYPES, "LOSS": "*fp32"}  # the loss of a weighted mean is float32 here
    return [
        target(f"loss.forward {options}", kernels._forward, TYPES, {**modes, **sums}, kernels.WARPS, wide),
        target(f"loss.backward {options}", kernels._backward, backward_types, {**modes, **needs}, kernels.WARPS, wide),
    ]


TARGETS = [
    *(made for key in ("mse", "l1", "smooth_l1", "huber") for made in both(key)),
    *both("mse", w_mode=1, by_total=True),
    *both("mse", none=True),
    *both("bce"),
    *both("bce", w_mode=2, pi_mode=2, none=True),
    target(
        "loss.fold",
        kernels._fold,
        {"PART": "*fp64", "OUT": "*fp64", "count": "i32"},
        {"CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK},
        2 * kernels.WARPS,
        wide=False,
    ),
    target(
        "loss.finish",
        kernels._finish,
        {"PART": "*fp64", "LOSS": "*{dtype}", "TOTAL": "*fp32", "count": "i32", "divisor": "fp32"},
        {"HAS_LOSS": True, "HAS_TOTAL": True, "BY_TOTAL": True, "BLOCK": kernels.BLOCK},
        kernels.WARPS,
        wide=False,
    ),
]
