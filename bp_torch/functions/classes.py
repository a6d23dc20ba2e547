"""Class indices t as a target: what the losses of class scores share."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import are_transforms_active
from ..mode import wide

__all__ = ["check_classes", "check_range", "class_dim", "counted", "one_hot", "weight_of"]


def class_dim(shape: torch.Size) -> int:
    """Which dimension counts classes: (C) or (N, C, ...)."""
    return 0 if len(shape) == 1 else 1


def one_hot(x_shape: torch.Size, c: int, index: Tensor) -> Tensor:
    """[c = t], boolean, of x's shape; index is (N, 1, ...)."""
    K = x_shape[c]
    if type(index) is not Tensor:  # a subclass, such as DTensor, takes operands of its own kind alone
        return torch.ones_like(index).expand(x_shape).cumsum(c) - 1 == index
    classes = torch.arange(K, device=index.device).reshape(K, *(1,) * (len(x_shape) - 1 - c))
    return classes == index


def counted(t: Tensor, ignore_index: int, c: int) -> tuple[Tensor, Tensor]:
    """Which positions count, and their class as an index of size 1 in the class dimension (0 where ignored)."""
    counts = t != ignore_index
    return counts, torch.where(counts, t, 0).unsqueeze(c)


def check_range(index: Tensor, K: int) -> None:
    """IndexError for a class outside [0, K), as torch on the CPU; elsewhere looking would wait for the device."""
    eager = not torch.compiler.is_compiling() and not are_transforms_active()
    if eager and type(index) is Tensor and index.device.type == "cpu" and index.numel() > 0:
        low, high = index.aminmax()
        if low < 0 or high >= K:
            bad = int(low) if low < 0 else int(high)
            raise IndexError(f"'target': expected classes from 0 to {K - 1} or 'ignore_index', got {bad}")


def check_classes(t: Tensor, ignore_index: int, K: int) -> None:
    """As :func:`check_range`, for classes of which some may be ignored."""
    if t.device.type == "cpu":
        check_range(torch.where(t != ignore_index, t, 0), K)


def weight_of(w: Tensor | None, counts: Tensor, index: Tensor, c: int, dtype: torch.dtype) -> Tensor:
    """w_t where the position counts, else 0."""
    if w is None:
        return counts.to(dtype)
    # Indexed before it is squeezed: an index without dimensions is a number, which traced tensors do not have.
    return torch.where(counts, wide(w)[index].squeeze(c), 0.0)
