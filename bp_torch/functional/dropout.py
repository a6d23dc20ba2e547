"""Functional forms of dropout, with torch.nn.functional's names and signatures and an optional ``generator``.

Where dropout does nothing (not training, p = 0, no elements) the input itself is returned, as torch does.
``inplace=True`` overwrites the input with the result and returns it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functions.dropout import AlphaDropoutFunction, DropoutFunction, draw_mask
from ..functions.function import Function, call
from ..mode import is_exported
from ._common import check_bool, check_probability, check_tensor, overridable, warn, without_generator

__all__ = ["alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"]


@overridable(without_generator(F.dropout))
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = m ⊙ x / (1 - p), each element of m drawn by itself.

    Args:
        input: x, any shape, floating.
        p: the probability that an element of m is 0.
        training: y = x unless this is true.
        inplace: overwrite the input.
        generator: draws m; None is torch's default generator of the input's device.

    Raises:
        TypeError: a ``training`` that is no bool.
        ValueError: p outside [0, 1]; NaN is a RuntimeError.
        RuntimeError: an integer input, or a generator of another device.
        NotImplementedError: a complex input.
    """
    _check("dropout", input, p)
    return _dropout(F.dropout, DropoutFunction, input, p, training, inplace, generator, by_kernels=True)


@overridable(without_generator(F.alpha_dropout))
def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = a (m ⊙ x + α′ (1 - m)) + b, for SELU networks: keeps mean 0 and variance 1. Arguments as :func:`dropout`."""
    _check("alpha_dropout", input, p)
    return _dropout(F.alpha_dropout, AlphaDropoutFunction, input, p, training, inplace, generator)


@overridable(without_generator(F.dropout1d))
def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = m ⊙ x / (1 - p), one element of m a channel. input: (N, C, L) or (C, L), else RuntimeError."""
    _check("dropout1d", input, p)
    if input.dim() not in (2, 3):
        raise RuntimeError(f"dropout1d(): 'input': expected 2 or 3 dimensions, got {input.dim()}")
    kept = 2 if input.dim() == 3 else 1
    return _dropout(F.dropout1d, DropoutFunction, input, p, training, inplace, generator, kept)


@overridable(without_generator(F.dropout2d))
def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = m ⊙ x / (1 - p), one element of m a channel. input: (N, C, H, W).

    As torch, takes (N, C, L) and other numbers of dimensions from two up with a warning.
    """
    _check("dropout2d", input, p)
    if input.dim() not in (3, 4):
        _warn_dimensions("dropout2d", "3 or 4", input)
    if input.dim() == 3:
        warn(
            "dropout2d(): 'input' has 3 dimensions and is taken as (N, C, L), as torch takes it; dropout1d says so",
            stacklevel=2,
        )
    return _dropout(F.dropout2d, DropoutFunction, input, p, training, inplace, generator, kept=2)


@overridable(without_generator(F.dropout3d))
def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = m ⊙ x / (1 - p), one element of m a channel. input: (N, C, D, H, W) or (C, D, H, W).

    As torch, takes other numbers of dimensions with a warning, and then as a single sample.
    """
    _check("dropout3d", input, p)
    if input.dim() not in (4, 5):
        _warn_dimensions("dropout3d", "4 or 5", input)
    kept = 2 if input.dim() == 5 else 1
    return _dropout(F.dropout3d, DropoutFunction, input, p, training, inplace, generator, kept)


@overridable(without_generator(F.feature_alpha_dropout))
def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Alpha dropout with one element of m a channel. input: (N, C, ...), else RuntimeError."""
    _check("feature_alpha_dropout", input, p)
    return _dropout(F.feature_alpha_dropout, AlphaDropoutFunction, input, p, training, inplace, generator, kept=2)


def _check(name: str, input: Tensor, p: float) -> None:
    check_tensor(name, input=input)
    if p != p:
        raise RuntimeError(f"{name}(): 'p': expected a probability between 0 and 1, got {p}")
    check_probability(name, p)


def _warn_dimensions(name: str, expected: str, input: Tensor) -> None:
    warn(f"{name}(): 'input': expected {expected} dimensions, got {input.dim()}; torch deprecates this", stacklevel=3)


def _dropout(
    theirs: Callable[..., Tensor],
    function: type[Function],
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    generator: torch.Generator | None,
    kept: int | None = None,
    by_kernels: bool = False,
) -> Tensor:
    """What all forms do.

    Args:
        theirs: torch's own form, for others' graphs and for nested tensors.
        kept: the leading dimensions that the mask has elements along, 2 for one element a channel, (N, C, 1, ...), and
            1 for the channels of a single sample, (C, 1, ...); None for all.
        by_kernels: whether there are kernels that draw this mask.
    """
    if generator is None and is_exported():
        return theirs(input, p, training, inplace)  # one node, which others know and switch off
    name = theirs.__name__
    check_bool(name, "training", training)
    if inplace and kept == 1:
        input.unsqueeze_(0).squeeze_(0)  # marks it as changed whatever p is, as torch does
    if not training or p == 0 or input.numel() == 0:
        return input
    if input.is_nested:
        nested: Tensor = without_generator(theirs)(input, p, training, inplace, generator=generator)
        return nested
    if kept is not None and p < 1 and input.dim() < kept:
        raise RuntimeError(f"{name}(): 'input': expected a channel dimension, got shape {tuple(input.shape)}")
    if not input.is_floating_point() and not (input.is_complex() and p == 1):  # which needs no mask
        error = NotImplementedError if input.is_complex() else RuntimeError
        raise error(f"{name}(): 'input': expected a floating dtype, got {input.dtype}")
    shape = None if kept is None else (*input.shape[:kept], *(1 for _ in input.shape[kept:]))
    output: Tensor = call(function, input, draw_mask(input, p, generator, shape, not by_kernels), p)
    return input.copy_(output) if inplace else output
