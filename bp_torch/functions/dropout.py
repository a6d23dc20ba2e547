"""Dropout.

    forward    y = m ⊙ x / (1 - p),   m = 1 with probability 1 - p, else 0
    backward   dx = m ⊙ dy / (1 - p)

Alpha dropout, which puts α′ = -λα of SELU where dropout puts 0, and keeps mean 0 and variance 1:

    forward    y = a (m ⊙ x + α′ (1 - m)) + b,   a = 1/√((1 - p)(1 + p α′²)),   b = -a p α′
    backward   dx = a m ⊙ dy

The mask m is drawn by :func:`draw_mask` before the call and is an input of the Function. A mask with one element per
channel broadcasts: that is the channel form of either.

Sources: Srivastava et al. 2014, JMLR 15; Tompson et al. 2015, arXiv:1411.4280 (channels); Klambauer et al. 2017,
arXiv:1706.02515 (alpha).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .function import Function, is_plain

__all__ = ["AlphaDropoutFunction", "DropoutFunction", "draw_mask", "drop", "dropout_scale"]

ALPHA = -1.7580993408473766  # -λα of SELU: what SELU tends to on the left


def draw_mask(
    x: Tensor, p: float, generator: torch.Generator | None = None, shape: Sequence[int] | None = None
) -> Tensor:
    """A boolean mask of x's shape (or of ``shape``), True with probability 1 - p, from torch's generator of x's device.

    The CPU's masks are exact to 2⁻³², the others' to 2⁻²⁴.
    """
    size = tuple(x.shape if shape is None else shape)
    if p >= 1:
        return x.new_zeros(size, dtype=torch.bool)
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # Compilers and tensor subclasses know rand_like, and vmap's ``randomness`` governs it.
        return torch.rand_like(x.new_empty(size, dtype=torch.float32), generator=generator) >= p
    if x.device.type != "cpu":
        return torch.rand(size, generator=generator, device=x.device) >= p
    # 32 random bits an element, two elements a draw: several times faster than bernoulli_ or rand.
    count = math.prod(size)
    bits = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    mask = bits.view(torch.int32)[:count] >= min(round(p * 2**32), 2**32 - 1) - 2**31
    if shape is None and not x.is_contiguous():
        return mask.as_strided(size, torch.empty_like(x, device="meta").stride())  # channels_last stays so
    return mask.view(size)


def dropout_scale(p: float) -> float:
    """1 / (1 - p), and 0 for p = 1, where nothing is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def drop(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """m ⊙ x / (1 - p); x itself where there is no mask. p = 1 gives zeros."""
    if mask is None:
        return x
    scale = dropout_scale(p)
    if x.device.type == "cpu" and mask.shape == x.shape and is_plain(x, mask) and mask.stride() == x.stride():
        # The same product, in place in one new tensor; ATen converts bytes faster than booleans.
        return mask.view(torch.uint8).to(x.dtype).mul_(x).mul_(scale)
    return x * mask * scale


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


def _affine(p: float) -> tuple[float, float]:
    """a and b of alpha dropout; p = 1 gives zeros."""
    a = 1 / math.sqrt((1 - p) * (1 + p * ALPHA**2)) if p < 1 else 0.0
    return a, -a * p * ALPHA


class AlphaDropoutFunction(Function):
    """y = a (m ⊙ x + α′ (1 - m)) + b.

    Backward: dx = a m ⊙ dy. Shapes: m broadcasts to x; y has x's shape.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, p: float) -> Tensor:
        a, b = _affine(p)
        # In the mask's shape, which is small for whole channels.
        shift = torch.where(mask, torch.full_like(mask, b, dtype=x.dtype), a * ALPHA + b)
        return x * mask * a + shift

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.p = inputs
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return dy * mask * _affine(ctx.p)[0], None, None

    @staticmethod
    def jvp_rule(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return dx * mask * _affine(ctx.p)[0]
