"""Functional forms of softmax, with torch.nn.functional's names and signatures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functions.function import Function, call
from ..functions.softmax import LogSoftmaxFunction, SoftmaxFunction
from ._common import check_tensor, overridable, to_float32, warn

__all__ = ["log_softmax", "softmax", "softmin"]


@overridable(F.softmax)
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """y = exp(x)/Σ exp(x) along ``dim``, as :func:`torch.nn.functional.softmax`.

    Args:
        input: x, any shape.
        dim: the dimension that sums to 1. None picks 0 for 0, 1 or 3 dimensions, else 1, and warns, as torch does.
        dtype: the dtype that x is cast to first.

    Raises:
        IndexError: a ``dim`` that x does not have.
        NotImplementedError: an integer x without ``dtype``.
    """
    check_tensor("softmax", input=input)
    return _along("softmax", SoftmaxFunction, input, dim, _stacklevel, dtype)


@overridable(F.log_softmax)
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """y = x - log Σ exp(x) along ``dim``; arguments and errors of :func:`softmax`."""
    check_tensor("log_softmax", input=input)
    return _along("log_softmax", LogSoftmaxFunction, input, dim, _stacklevel, dtype)


@overridable(F.softmin)
def softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """y = exp(-x)/Σ exp(-x) along ``dim``; arguments and errors of :func:`softmax`."""
    check_tensor("softmin", input=input)
    return _along("softmin", SoftmaxFunction, -input, dim, _stacklevel, dtype)


def _along(
    name: str, function: type[Function], x: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None
) -> Tensor:
    if x.is_nested:
        return (F.log_softmax if name == "log_softmax" else F.softmax)(x, dim, stacklevel, dtype)
    if dim is None:
        warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=stacklevel,
        )
        dim = 0 if x.dim() in (0, 1, 3) else 1
    if type(dim) is bool or not isinstance(dim, (int, torch.SymInt)):
        raise TypeError(f"{name}(): 'dim': expected an int or None, got {type(dim).__name__}")
    last = max(x.dim() - 1, 0)
    if not -last - 1 <= dim <= last:
        raise IndexError(f"{name}(): 'dim': expected a number from {-last - 1} to {last}, got {dim}")
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name}(): 'dtype': expected a torch.dtype or None, got {type(dtype).__name__}")
        x = x.to(dtype)
    else:
        (x,) = to_float32(x, cpu=False)
    if not x.is_floating_point():
        raise NotImplementedError(f"{name}(): 'input': expected a floating dtype, got {x.dtype}; give 'dtype'")
    return call(function, x, dim)
