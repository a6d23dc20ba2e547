"""How kernels are launched: the device, the grid, and the block sizes of each class of shapes.

Block sizes come from :data:`TABLE`, by family of kernels and class of shapes, through :func:`block_for`. Nothing is
tuned at run time unless ``BP_TORCH_AUTOTUNE=1`` asks for it (see tuning.py).

No block, no number of programs and no choice between kernels, here or in the other files, has been measured on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import tuning
from .tuning import INTERPRETED

__all__ = [
    "INTERPRETED",
    "TABLE",
    "Block",
    "block_for",
    "device_of",
    "first_block",
    "grid_of",
    "is_wide",
    "tuned",
    "warps_of",
]

MOST_PROGRAMS = 2**31 - 1
"""What a grid's first dimension holds. The second and third hold 65,535, so kernels count along the first alone."""


@dataclass(frozen=True)
class Block:
    """One row of the table: what one program takes, and with how many warps."""

    columns: int
    """Elements, or columns of a tile."""
    rows: int = 1
    """Rows of a tile."""
    warps: int = 4
    """Warps of 32 threads: see :func:`warps_of`."""
    depth: int = 1
    """Terms of a product that a step adds up."""


@dataclass(frozen=True)
class ShapeClass:
    name: str
    below: float
    """The class holds sizes below this one that no earlier class holds."""
    blocks: tuple[Block, ...]
    """The block that is used, then the others that autotuning tries."""


EVERYTHING = float("inf")

# 8 elements a thread make 16-byte accesses in 16-bit dtypes. Sizes are elements of the tensor.
TABLE: dict[str, tuple[ShapeClass, ...]] = {
    "elementwise": (
        ShapeClass("small", 2**17, (Block(1024), Block(512, warps=2), Block(256, warps=1))),
        ShapeClass("large", EVERYTHING, (Block(1024), Block(2048, warps=8), Block(2048), Block(4096, warps=8))),
    ),
    # Booleans: 16 elements a thread make 16-byte stores.
    "mask": (ShapeClass("any", EVERYTHING, (Block(2048), Block(1024), Block(4096, warps=8))),),
    # A tile is as wide as it is for coalescing; a program takes several below each other.
    "elementwise bias": (
        ShapeClass("any", EVERYTHING, (Block(64, 16), Block(64, 32, 8), Block(128, 8), Block(128, 16, 8))),
    ),
    # From here on the order of a sum, and so its last bits, may depend on the block. So no size counts rows where
    # batch-invariant mode promises a row the same bits in every batch (softmax, cross-entropy, dense, mlp), and a block
    # once chosen stays.
    # 16 elements of each of 128 threads: channels of rows, or points of planes. Sizes are elements of the tensor.
    "batch norm rows": (
        ShapeClass("small", 2**20, (Block(64, 32), Block(64, 16, 2), Block(32, 64), Block(64, 64, 8))),
        ShapeClass("large", EVERYTHING, (Block(64, 32), Block(64, 64, 8), Block(128, 16), Block(128, 32, 8))),
    ),
    "batch norm planes": (
        ShapeClass("small", 2**20, (Block(1024, 2), Block(512, 2, 2), Block(2048, 2, 8))),
        ShapeClass("large", EVERYTHING, (Block(1024, 2), Block(2048, 1), Block(2048, 2, 8), Block(1024, 4, 8))),
    ),
    # Sizes are classes of a row; columns are elements of a tile. A row that fits is read once and stays in registers.
    # The number of warps follows from the tile: 32 elements a thread.
    "softmax": (
        ShapeClass("short row", 4096 + 1, (Block(4096), Block(2048), Block(8192))),
        ShapeClass("whole row", 16384 + 1, (Block(16384, warps=16), Block(4096), Block(8192))),
        ShapeClass("long row", EVERYTHING, (Block(4096), Block(8192), Block(2048))),
    ),
    # Positions next to each other where classes are strided: 64 bytes in 16-bit dtypes.
    "softmax strided": (ShapeClass("any", EVERYTHING, (Block(128, 32), Block(64, 32), Block(64, 64), Block(32, 128))),),
    "cross-entropy": (
        ShapeClass("short row", 4096 + 1, (Block(4096), Block(2048))),
        ShapeClass("long row", EVERYTHING, (Block(4096), Block(2048), Block(8192))),
    ),
    # Two tensors are read: tiles of several rows have half as many elements, because larger ones spill registers.
    "cross-entropy probabilities": (ShapeClass("any", EVERYTHING, (Block(4096), Block(2048))),),
    # One element a row is read: nothing to choose from but the number of programs.
    "nll": (ShapeClass("any", EVERYTHING, (Block(512),)),),
    # Sizes are elements.
    "loss": (
        ShapeClass("small", 2**20, (Block(1024), Block(512, warps=2), Block(2048, warps=8))),
        ShapeClass("large", EVERYTHING, (Block(1024), Block(2048, warps=8), Block(2048))),
    ),
    # Of all tensors together. The table of blocks that the kernel reads is made for this one size, and kept.
    "penalty": (ShapeClass("any", EVERYTHING, (Block(4096),)),),
    # 128 x 128 spills registers with dropout. float32 without TF32 runs outside the tensor cores, from registers.
    # Sizes are elements of the weight.
    "dense 16-bit": (
        ShapeClass(
            "narrow", 2**18, (Block(64, 128, 8, depth=64), Block(64, 64, 4, depth=64), Block(64, 32, 4, depth=64))
        ),
        ShapeClass(
            "wide", EVERYTHING, (Block(64, 128, 8, depth=64), Block(128, 64, 8, depth=64), Block(64, 128, 8, depth=32))
        ),
    ),
    "dense float32": (
        ShapeClass(
            "any", EVERYTHING, (Block(64, 64, 4, depth=32), Block(64, 32, 4, depth=32), Block(32, 64, 4, depth=32))
        ),
    ),
    # Columns are the network's widths, and size the widest.
    "mlp": (ShapeClass("any", EVERYTHING, (Block(64, 32), Block(64, 16), Block(64, 64))),),
}

Result = TypeVar("Result")


def first_block(family: str, shape: str | None = None) -> Block:
    """The block that is used unless another was tuned: what is compiled ahead of time."""
    return next(c.blocks[0] for c in TABLE[family] if shape is None or c.name == shape)


def tuned(family: str, size: int, x: Tensor, run: Callable[[Block], Result], what: str = "") -> Result:
    """``run`` with the block for this family, this size, and x's dtype and device.

    Args:
        run: computes the result with a given block; may be called any number of times. Autotuning needs it.
        what: tells apart kernels of one family that are timed each by itself.
    """
    with device_of(x):
        return run(block_for(family, size, x.device, run, x.dtype, what))


def block_for(
    family: str, size: int, device: torch.device, launch: Callable[[Block], object] | None = None,
    dtype: torch.dtype | None = None, what: str = "",
) -> Block:  # fmt: skip
    """The block for a family and a size.

    Args:
        family: a key of :data:`TABLE`.
        size: what the classes of this family are told apart by.
        device: where the kernel will run.
        launch: runs the kernel with a given block; may be called any number of times. Autotuning needs it.
        dtype, what: of the tensor, and which of the family's kernels: each is timed by itself.
    """
    shapes = next(c for c in TABLE[family] if size < c.below)
    if tuning.ENABLED and launch is not None:
        parts = [
            family,
            shapes.name,
            *([] if dtype is None else [str(dtype).removeprefix("torch.")]),
            *filter(None, [what]),
        ]
        return tuning.best("/".join(parts), shapes.blocks, device, launch)
    return shapes.blocks[0]


def warps_of(block: Block) -> int:
    """As many warps of this machine as make the block's number of threads: AMD's have 64 of them, NVIDIA's 32.

    With as many threads each takes as many elements, so that accesses are 16 bytes wide on both.
    """
    return max(1, block.warps // 2) if torch.version.hip else block.warps


def device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one: Triton launches on the current device, wherever the pointers lead."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def grid_of(count: int, block: int, other: int = 1) -> tuple[int]:
    """One program for each block of ``count`` elements, times ``other``.

    Raises:
        ValueError: more programs than a grid holds.
    """
    programs = (count + block - 1) // block * other
    if programs > MOST_PROGRAMS:
        raise ValueError(f"a kernel over {count} elements needs {programs} programs, a grid holds {MOST_PROGRAMS}")
    return (programs,)


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of these may exceed 31 bits."""
    return any(t is not None and t.numel() >= 2**31 for t in tensors)
