"""The kernels of cross-entropy, with and without all options, for each way that rows lie."""

from __future__ import annotations

from typing import Any

from bp_torch.triton_kernels import cross_entropy as kernels
from bp_torch.triton_kernels.softmax import NEIGHBOURS, TILE

from . import Target, target

__all__ = ["SHAPES", "TARGETS", "TYPES"]

TYPES = {
    **dict.fromkeys(("X", "Q", "W", "LOSS", "DLOSS", "DX", "DQ"), "*{dtype}"),
    **dict.fromkeys(("M", "R", "TOTAL", "W_SUM"), "*fp32"),
    "PART": "*fp64",
    **dict.fromkeys(("positions", "K", "inner", "ignored"), "i32"),
    **dict.fromkeys(("keep", "share", "divisor"), "fp32"),
    "T": "*i64",
}
SHAPES = {
    "rows": {"P": 1, "BLOCK": TILE, "STRIDED": False},
    "short rows": {"P": 256, "BLOCK": 16, "STRIDED": False},
    "strided": {"P": NEIGHBOURS, "BLOCK": TILE // NEIGHBOURS, "STRIDED": True},
}
SHAPES_OF_TWO = {
    **SHAPES,
    "short rows": {"P": 128, "BLOCK": 16, "STRIDED": False},
    "strided": {"P": NEIGHBOURS, "BLOCK": TILE // 2 // NEIGHBOURS, "STRIDED": True},
}
KERNELS = {
    "forward": (kernels._forward, {}),
    "backward": (kernels._backward, {"MEAN": True}),
    "probabilities_forward": (kernels._probabilities_forward, {}),
    "probabilities_backward": (kernels._probabilities_backward, {"NEED_X": True, "NEED_Q": True}),
}


def warps_of(name: str, tile: dict[str, Any], options: bool) -> int:
    if name == "probabilities_forward":
        return kernels._more_warps(tile["P"], tile["BLOCK"], tile["STRIDED"])
    return kernels._forward_warps(tile["P"], tile["BLOCK"], options and name == "forward")


# In the forward pass a thread's part of a block, all of it 16 bytes at a time, weighs as much as the row's few numbers
# beside it.
TARGETS: list[Target] = [
    target(
        f"cross_entropy.{name} {shape}{' all options' if options else ''}",
        kernel,
        TYPES,
        {"HAS_W": options, "SMOOTH": options, "NONE": options, **more, **tile},
        warps_of(name, tile, options),
        wide=shape == "rows" and name != "forward",
    )
    for name, (kernel, more) in KERNELS.items()
    for shape, tile in (SHAPES_OF_TWO if "probabilities" in name else SHAPES).items()
    for options in (False, True)
]
