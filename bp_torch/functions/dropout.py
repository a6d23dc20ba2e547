"""Dropout.

    forward    y = m ⊙ x / (1 - p),   m = 1 with probability 1 - p, else 0
    backward   dx = m ⊙ dy / (1 - p)

Alpha dropout, which puts α′ = -λα of SELU where dropout puts 0, and keeps mean 0 and variance 1:

    forward    y = a (m ⊙ x + α′ (1 - m)) + b,   a = 1/√((1 - p)(1 + p α′²)),   b = -a p α′
    backward   dx = a m ⊙ dy

The mask m is drawn by :func:`draw_mask` before the call and is an input of the Function. A mask with one element per
channel broadcasts: that is the channel form of either. Where the Triton kernels run, m is not a mask but a seed, one
64-bit integer from which each kernel draws the mask of the elements that it works on, in forward as in backward.

Sources: Srivastava et al. 2014, JMLR 15; Tompson et al. 2015, arXiv:1411.4280 (channels); Klambauer et al. 2017,
arXiv:1706.02515 (alpha).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import settings
from .._torch import are_transforms_active, is_tracing
from ..backends import kernels, mask_of
from ..mode import PLAIN
from .function import Function

__all__ = [
    "AlphaDropoutFunction",
    "DropoutFunction",
    "Mask",
    "Seed",
    "affine",
    "draw_mask",
    "drop",
    "dropout_scale",
    "mask_from",
    "masked",
    "may_draw",
]


def draw_mask(
    x: Tensor,
    p: float,
    generator: torch.Generator | None = None,
    shape: Sequence[int] | None = None,
    broadcasts: bool = False,
) -> Tensor:
    """A boolean mask of x's shape (or of ``shape``), True with probability 1 - p, from torch's generator of x's device.

    On the CPU p is exact to 2⁻³². Large masks take 16 random bits an element: their threshold is then one of the two
    multiples of 2⁻¹⁶ next to p, drawn at each call so that the mean is p. On other devices p is exact to 2⁻²⁴.

    Where the Triton kernels run for x, a seed instead, unless the mask ``broadcasts`` or drops everything.
    """
    size = tuple(x.shape if shape is None else shape)
    if p >= 1:
        return x.new_zeros(size, dtype=torch.bool)
    if type(x) not in PLAIN or torch.compiler.is_compiling() or is_tracing():
        like = x.new_empty(size, dtype=torch.float32)  # so that a subclass shards the mask as it shards x
        return (torch.rand_like(like) if generator is None else torch.rand_like(like, generator=generator)) >= p
    triton = None if broadcasts or (x.is_cpu and not settings.triton_was_asked_for) else kernels(x)
    if triton is not None:
        return triton.dropout.new_seed(x.device, generator)
    if x.device.type != "cpu" or are_transforms_active():
        return torch.rand(size, generator=generator, device=x.device) >= p  # vmap's ``randomness`` governs it
    # Several times faster than bernoulli_ or rand: each 64-bit draw serves two or four elements.
    count = math.prod(size)
    if count < 2**16 and size and size[-1] % 2 == 0 and (shape is not None or x.is_contiguous()):
        # As below, in the fewest operators.
        whole = torch.empty((*size[:-1], size[-1] // 2), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return whole.view(torch.int32) >= min(round(p * 2**32), 2**32 - 1) - 2**31
    dtype = torch.int16 if count >= 2**16 and 2**-8 <= p <= 1 - 2**-8 else torch.int32
    draws = torch.empty(-(-count * dtype.itemsize // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    threshold: Tensor | int
    if dtype == torch.int32:
        threshold = min(round(p * 2**32), 2**32 - 1) - 2**31
    else:
        threshold = torch.rand((), dtype=torch.float64, generator=generator).add_(p * 2**16 - 2**15).floor_().to(dtype)
    mask = draws.view(dtype)[:count] >= threshold
    if shape is None and not x.is_contiguous():
        return mask.as_strided(size, torch.empty_like(x, device="meta").stride())  # channels_last stays so
    return mask.view(size)


def dropout_scale(p: float) -> float:
    """1 / (1 - p), or 0 where everything is dropped."""
    return 1 / (1 - p) if p < 1 else 0.0


def drop(x: Tensor, mask: Tensor | None, p: float, add: Tensor | None = None) -> Tensor:
    """m ⊙ x / (1 - p), plus ``add`` if given; without a mask m is 1. p = 1 gives zeros."""
    if mask is None:
        y = x if p == 0 else x * dropout_scale(p)
    else:
        y = masked(x, mask_from(mask).over(x.shape, p), dropout_scale(p))
    return y if add is None else add + y


def masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale · m ⊙ x; a mask that broadcasts is scaled first, because it is small."""
    return x * mask * scale if mask.shape == x.shape else x * (mask.to(x.dtype) * scale)


@dataclass(frozen=True)
class Mask:
    """m, as a boolean tensor."""

    tensor: Tensor

    def over(self, shape: Sequence[int], p: float) -> Tensor:
        """m for a tensor of this shape."""
        return self.tensor


@dataclass(frozen=True)
class Seed:
    """What kernels draw m from: one 64-bit integer in a tensor."""

    tensor: Tensor

    def over(self, shape: Sequence[int], p: float) -> Tensor:
        """m for a tensor of this shape, written out."""
        return mask_of(self.tensor, shape, p)


def mask_from(tensor: Tensor) -> Mask | Seed:
    """Which of the two a Function was given: what autograd carries, saves and hands to hooks is a tensor."""
    return Seed(tensor) if tensor.dtype == torch.int64 else Mask(tensor)


def may_draw(mask: Tensor | None) -> bool:
    """Whether a kernel has what it takes: no mask, or the seed of one."""
    return mask is None or isinstance(mask_from(mask), Seed)


class _Masked:
    """Keeps the mask and p."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.p = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(inputs[1])


class DropoutFunction(_Masked, Function):
    """y = m ⊙ x / (1 - p).

    Backward: dx = m ⊙ dy / (1 - p). Shapes: m broadcasts to x; y has x's shape.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, p: float) -> Tensor:
        return drop(x, mask, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return drop(dy, mask, ctx.p), None, None

    @staticmethod
    def jvp_rule(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return drop(dx, mask, ctx.p)


def affine(p: float) -> tuple[float, float, float]:
    """a, b and α′ of alpha dropout; p = 1 gives a = b = 0."""
    alpha = -1.7580993408473766  # -λα of SELU; here, because Dynamo takes a module's floats for inputs
    # A power: where p is symbolic, as with dynamic shapes, a square root would make it a number.
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5 if p < 1 else 0.0
    return a, -a * p * alpha, alpha


class AlphaDropoutFunction(_Masked, Function):
    """y = a (m ⊙ x + α′ (1 - m)) + b.

    Backward: dx = a m ⊙ dy. Shapes: m broadcasts to x; y has x's shape.
    """

    @staticmethod
    def forward(x: Tensor, mask: Tensor, p: float) -> Tensor:
        a, b, alpha = affine(p)
        # In the mask's shape, which is small for whole channels.
        return (~mask).to(x.dtype) * (a * alpha) + b + masked(x, mask, a)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return masked(dy, mask, affine(ctx.p)[0]), None, None

    @staticmethod
    def jvp_rule(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return masked(dx, mask, affine(ctx.p)[0])
