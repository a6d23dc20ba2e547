"""Functional forms of the penalties."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ..functions.function import call
from ..functions.penalty import PenaltyFunction
from ._common import check_probability, hand_over, to_float32

__all__ = ["elastic_net_penalty", "l1_penalty", "l2_penalty"]


def l1_penalty(parameters: Iterable[Tensor], weight: float) -> Tensor:
    """R = weight · Σ |w|, over all elements of all parameters.

    Args:
        parameters: tensors of any shapes and floating dtypes, such as ``model.parameters()``, or one tensor. A tensor
            that comes twice counts once. One that is frozen counts in the value and gets no gradient.
        weight: λ ≥ 0.

    Returns:
        A tensor without dimensions, of the widest dtype among the parameters; summed in float32 or wider. Zero where
        there are no parameters.

    Raises:
        TypeError: a parameter that is not a tensor, or a weight that is not a number.
        ValueError: a negative weight.
        RuntimeError: a dtype that is not floating, or parameters on several devices.
    """
    tensors = _tensors("l1_penalty", parameters)
    if has_torch_function(tensors):
        return hand_over(l1_penalty, lambda ws, weight: _in_parts(ws, weight, 1.0), tensors, weight)
    return _penalty("l1_penalty", tensors, weight, 1.0)


def l2_penalty(parameters: Iterable[Tensor], weight: float) -> Tensor:
    """R = weight · Σ w², without a ½; arguments as :func:`l1_penalty`."""
    tensors = _tensors("l2_penalty", parameters)
    if has_torch_function(tensors):
        return hand_over(l2_penalty, lambda ws, weight: _in_parts(ws, weight, 0.0), tensors, weight)
    return _penalty("l2_penalty", tensors, weight, 0.0)


def elastic_net_penalty(parameters: Iterable[Tensor], weight: float, l1_ratio: float = 0.5) -> Tensor:
    """R = weight · (l1_ratio · Σ |w| + (1 - l1_ratio) · Σ w²).

    Arguments as :func:`l1_penalty`, and ``l1_ratio`` in [0, 1], else ValueError. ``weight`` and ``l1_ratio`` are
    scikit-learn's ``alpha`` and ``l1_ratio``, but its ElasticNet has a further ½ before Σ w².
    """
    tensors = _tensors("elastic_net_penalty", parameters)
    if has_torch_function(tensors):
        return hand_over(elastic_net_penalty, _in_parts, tensors, weight, l1_ratio)
    check_probability("elastic_net_penalty", l1_ratio, "l1_ratio")
    return _penalty("elastic_net_penalty", tensors, weight, l1_ratio)


def check_weight(function: str, weight: Any) -> None:
    """TypeError unless it is a number, ValueError unless it is ≥ 0."""
    if not isinstance(weight, numbers.Real):
        raise TypeError(f"{function}(): 'weight': expected a number, got {type(weight).__name__}")
    if not float(weight) >= 0:
        raise ValueError(f"{function}(): 'weight': expected a number ≥ 0, got {weight}")


def _tensors(function: str, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    tensors = (parameters,) if isinstance(parameters, Tensor) else tuple(parameters)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) and not has_torch_function((tensor,)):
            raise TypeError(f"{function}(): 'parameters': expected Tensors, got {type(tensor).__name__} at {index}")
    return tuple({id(tensor): tensor for tensor in tensors}.values())


def _in_parts(tensors: tuple[Tensor, ...], weight: float, l1_ratio: float) -> Tensor:
    """The penalty by torch's operators on each tensor."""
    total = sum(w.abs().sum() * (weight * l1_ratio) + w.square().sum() * (weight * (1 - l1_ratio)) for w in tensors)
    assert isinstance(total, Tensor)
    return total


def _penalty(function: str, tensors: tuple[Tensor, ...], weight: float, l1_ratio: float) -> Tensor:
    check_weight(function, weight)
    if not tensors:
        return torch.zeros(())
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise RuntimeError(f"{function}(): 'parameters': expected floating dtypes, got {tensor.dtype}")
        if tensor.device != tensors[0].device:
            raise RuntimeError(
                f"{function}(): 'parameters': expected one device, got {tensors[0].device} and {tensor.device}"
            )
    tensors = to_float32(*tensors, cpu=False)
    return call(PenaltyFunction, float(weight * l1_ratio), float(weight * (1 - l1_ratio)), *tensors)
