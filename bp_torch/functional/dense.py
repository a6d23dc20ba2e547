"""Functional forms of the dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .._torch import is_autocast_enabled
from ..functions.dense import DenseFunction, LinearFunction
from ..functions.dropout import draw_mask
from ..functions.function import call
from . import activation as activations
from . import dropout as dropouts
from ._common import USUAL, check_same, check_tensor, epilogue_of, lower_precision, overridable

__all__ = ["dense", "linear"]


@overridable(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b, as :func:`torch.nn.functional.linear`.

    Args:
        input: x, (..., in_features).
        weight: W, (out_features, in_features); or (in_features) without a bias, then y is (...).
        bias: b, (out_features), or one number for all of them, or None.

    Raises:
        RuntimeError: shapes that do not fit, or different dtypes or devices.

    Complex numbers and nested tensors have torch's own operator, here and in :func:`dense`.
    """
    x, W, b = lower_precision(input, weight, bias) if is_autocast_enabled() else (input, weight, bias)
    if not _fits(x, W, b):
        check_tensor("linear", input=input, weight=weight, bias=bias)
        if x.is_nested:
            return F.linear(x, W, b)
        if W is not None and W.dim() == 1 and b is None:
            return linear(x, W.unsqueeze(0)).squeeze(-1)
        if W is not None and W.dim() == 2 and b is not None and b.shape in ((), (1,)):
            b = b.expand(W.shape[0])
        _check_shapes("linear", x, W, b)
        if x.is_complex():
            return F.linear(x, W, b)
    return call(LinearFunction, x, W, b)


def _in_parts(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    activation_parameters: Mapping[str, float] | None,
    p: float,
    training: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """:func:`dense` as torch's linear and what follows it, one by one."""
    y = F.linear(input, weight, bias)
    if activation is not None:
        y = activations.activation(y, activation, activation_parameters)
    y = dropouts.dropout(y, p, training, generator=generator)
    return y if residual is None else y + residual


@overridable(_in_parts)
def dense(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_parameters: Mapping[str, float] | None = None,
    p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = dropout(f(x Wᵀ + b)) + residual, in one Function.

    Args:
        input: x, (..., in_features).
        weight: W, (out_features, in_features).
        bias: b, (out_features), or None.
        residual: added last, (..., out_features), or None.
        activation: f, a key of the activation table; None is the identity.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.
        p: the probability that dropout sets an element to zero.
        training: dropout acts only where this is true.
        generator: draws the dropout mask; None is torch's default generator.

    Raises:
        RuntimeError: shapes that do not fit, or different dtypes or devices.
        ValueError: an unknown activation or parameter, or p outside [0, 1].
    """
    e = None
    if not activation_parameters and (activation is None or type(activation) is str) and not is_compiling():
        e = USUAL.get((activation, p, training))
    if e is None:
        e = epilogue_of("dense", activation, activation_parameters, p, training)
    x, W, b = lower_precision(input, weight, bias) if is_autocast_enabled() else (input, weight, bias)
    if not (_fits(x, W, b) and (residual is None or isinstance(residual, Tensor))):
        check_tensor("dense", input=input, weight=weight, bias=bias, residual=residual)
        if x.is_nested:
            return _in_parts(x, W, b, residual, activation, activation_parameters, p, training, generator)
        _check_shapes("dense", x, W, b)
    shape = (*x.shape[:-1], W.shape[0])
    if residual is not None and residual.shape != shape:
        raise RuntimeError(f"dense(): 'residual': expected shape {shape}, got {tuple(residual.shape)}")
    if x.is_complex():
        return _in_parts(x, W, b, residual, activation, activation_parameters, p, training, generator)
    mask = draw_mask(x, p, generator, shape) if e.p > 0 else None
    output = call(DenseFunction, x, W, b, residual, mask, e)
    return output[0] if isinstance(output, tuple) else output


def _fits(x: Any, W: Any, b: Any) -> bool:
    """Whether all is as it should be, W a matrix and the numbers real: the usual case, in as little time as can be."""
    if not (isinstance(x, Tensor) and isinstance(W, Tensor) and x.dim() > 0) or x.is_nested:
        return False
    dtype, device, shape = W.dtype, W.device, W.shape
    if len(shape) != 2 or x.size(-1) != shape[1] or x.dtype is not dtype or x.device != device or dtype.is_complex:
        return False
    return b is None or (isinstance(b, Tensor) and b.shape == shape[:1] and b.dtype is dtype and b.device == device)


def _check_shapes(function: str, x: Tensor, W: Tensor | None, b: Tensor | None) -> None:
    if W is None:
        raise TypeError(f"{function}(): argument 'weight': expected a Tensor, got NoneType")
    check_same(function, input=x, weight=W, bias=b)
    if W.dim() != 2:
        raise RuntimeError(f"{function}(): 'weight': expected shape (out_features, in_features), got {tuple(W.shape)}")
    if x.dim() == 0 or x.shape[-1] != W.shape[1]:
        raise RuntimeError(
            f"{function}(): 'input': expected a last dimension of {W.shape[1]} to match 'weight' of shape "
            f"{tuple(W.shape)}, got shape {tuple(x.shape)}"
        )
    if b is not None and b.shape != W.shape[:1]:
        raise RuntimeError(f"{function}(): 'bias': expected shape ({W.shape[0]},), got {tuple(b.shape)}")
