"""How kernels are launched: the device, the grid, and the block sizes of each class of shapes."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "device_of", "grid_of", "is_wide"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors."""


def device_of(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one: Triton launches on the current device, wherever the pointers lead."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def grid_of(count: int, block: int) -> tuple[int]:
    """One program for each block of ``count`` elements."""
    return ((count + block - 1) // block,)


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of these may exceed 31 bits."""
    return any(t is not None and t.numel() >= 2**31 for t in tensors)
