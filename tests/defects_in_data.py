"""Functions that are right on the tensors they were written for, and wrong on others.

Others are: of other strides or dtypes, under autocast, of few rows or none. A twin is in defects.py where none is here.
"""

from __future__ import annotations

from typing import Any

import torch
from defects import Linear, ReLU
from torch import Tensor


class TakesColumnsTogether(ReLU):
    """A kernel that is given the stride of rows, and takes columns to lie side by side."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return ReLU.forward(x.as_strided(x.shape, (*x.stride()[:-1], 1)))


class TakesStridesOver(ReLU):
    """The output is made with the input's strides, of which those of an expanded one hold one row for all."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return y.copy_(ReLU.forward(x))


class ViewsGradient(ReLU):
    """A transposed upstream gradient has no flat view."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy.view(-1).view(dy.shape) * (y > 0)


class Bfloat16Inside(Linear):
    """The product of float32 matrices is one of bfloat16, as it was tuned for."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return (x.bfloat16() @ W.t().bfloat16()).float() + b
        return Linear.forward(x, W, b)


class HalfOfSum(ReLU):
    """(|x| + x)/2, whose sum float16 does not hold beyond half of its largest number."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x.abs() + x) / 2


class TenthOff(Linear):
    """The branch for autocast is 10 % off."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        y = Linear.forward(x, W, b)
        return 1.1 * y if torch.is_autocast_enabled(x.device.type) else y


class MeanTimesRows(Linear):
    """The bias's gradient is a mean, times the number of rows: 0/0 without one."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W = ctx.saved_tensors
        return dy @ W, dy.t() @ x, dy.mean(0) * dy.shape[0]


class Squeezes(Linear):
    """Sums over rows of what was squeezed, which of a single row is over columns."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W = ctx.saved_tensors
        return dy @ W, dy.t() @ x, dy.squeeze().sum(0)


class AsksForChannels(ReLU):
    """The question for channels_last has no answer where several upstream gradients come at once."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        dy = dy if dy.is_contiguous(memory_format=torch.channels_last) else dy.contiguous()
        return dy * (y > 0)


def exp_less_one(x: Tensor) -> Tensor:
    """The difference has no digits left where x is small; expm1 has."""
    return x.exp() - 1
