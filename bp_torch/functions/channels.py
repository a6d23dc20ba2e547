"""A batch's channels, dimension 1 of x: what batch norm's Functions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..mode import wide

__all__ = ["channel", "count_of", "dims_of", "statistics_of"]


def dims_of(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def count_of(x: Tensor) -> int:
    """n, the number of values a channel, and 1 where there is none, so that sums may be divided by it."""
    return max(x.shape[0] * math.prod(x.shape[2:]), 1)


def channel(t: Tensor, x: Tensor) -> Tensor:
    """(C) → (1, C, 1, ...), which broadcasts to x."""
    return t.reshape(1, x.shape[1], *[1] * (x.dim() - 2))


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and biased var, in one pass by Welford's method; zeros for an empty batch."""
    x = wide(x)
    if x.numel() == 0:
        return x.sum(dims_of(x)), x.square().sum(dims_of(x))
    var, mean = torch.var_mean(x, dims_of(x), correction=0)
    return mean, var
