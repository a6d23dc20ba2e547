"""The kernels of the negative log-likelihood: cross-entropy's types and rows."""

from __future__ import annotations

from bp_torch.triton_kernels import nll_loss as kernels
from bp_torch.triton_kernels.softmax import tile_warps

from . import target
from .cross_entropy import SHAPES, TYPES

__all__ = ["TARGETS"]

TARGETS = [
    *(
        target(
            f"nll_loss.forward{' weight' if weight else ''}",
            kernels._forward,
            TYPES,
            {"HAS_W": weight, "NONE": weight, "BLOCK": kernels.NLL_BLOCK},
            wide=False,
        )
        for weight in (False, True)
    ),
    *(
        target(
            f"nll_loss.backward {shape}",
            kernels._backward,
            TYPES,
            {"HAS_W": True, "NONE": False, "MEAN": True, **tile},
            tile_warps(tile["P"], tile["BLOCK"]),
            wide=shape == "rows",
        )
        for shape, tile in SHAPES.items()
    ),
]
