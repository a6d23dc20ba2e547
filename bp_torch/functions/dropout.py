"""Dropout.

    forward    y = m ⊙ x / (1 - p),   m = 1 with probability 1 - p, else 0
    backward   dx = m ⊙ dy / (1 - p)

The mask m is drawn by :func:`draw_mask` before the call and is an input of the Function
(Srivastava et al. 2014, JMLR 15).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .function import Function

__all__ = ["DropoutFunction", "draw_mask", "drop", "dropout_scale"]


def draw_mask(
    x: Tensor, p: float, generator: torch.Generator | None = None, shape: Sequence[int] | None = None
) -> Tensor:
    """A boolean mask of x's shape (or of ``shape``), True with probability 1 - p, from torch's generator of its device."""
    shape = tuple(x.shape if shape is None else shape)
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # Compilers know rand_like, and vmap's ``randomness`` governs it.
        return torch.rand_like(x.new_empty(shape, dtype=torch.float32)) >= p
    if x.device.type != "cpu":
        return torch.rand(shape, generator=generator, device=x.device) >= p
    # 32 random bits an element, two elements a draw: several times faster than bernoulli_ or rand.
    count = math.prod(shape)
    bits = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return bits.view(torch.int32)[:count].view(shape) >= round(p * 2**32) - 2**31


def dropout_scale(p: float) -> float:
    """1 / (1 - p), and 0 for p = 1, where nothing is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def drop(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """m ⊙ x / (1 - p); x itself where there is no mask. p = 1 gives zeros."""
    if mask is None:
        return x
    return x * mask * dropout_scale(p)


class DropoutFunction(Function):
    """y = m ⊙ x / (1 - p).

    Backward: dx = m ⊙ dy / (1 - p). Shapes: m broadcasts to x; y has x's shape.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, p: float) -> Tensor:
        return drop(x, mask, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.p = inputs
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return drop(dy, mask, ctx.p), None, None

    @staticmethod
    def jvp_rule(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return drop(dx, mask, ctx.p)
