"""Functional forms of the residual connection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..functions.activation import ACTIVATIONS
from ..functions.dropout import draw_mask
from ..functions.epilogue import Epilogue
from ..functions.function import call
from ..functions.residual import ResidualFunction
from . import activation as activations
from . import dropout as dropouts
from ._common import check_tensor, epilogue_of, overridable

__all__ = ["dropout_add", "residual"]


def _in_parts(
    branch: Tensor,
    residual: Tensor,
    p: float,
    training: bool,
    generator: torch.Generator | None,
    activation: str | None = None,
    activation_parameters: Mapping[str, float] | None = None,
) -> Tensor:
    """:func:`residual` as dropout, a sum and an activation, one by one."""
    y = residual + dropouts.dropout(branch, p, training, generator=generator)
    return y if activation is None else activations.activation(y, activation, activation_parameters)


@overridable(_in_parts)
def residual(
    branch: Tensor,
    residual: Tensor,
    *,
    activation: str | None = None,
    activation_parameters: Mapping[str, float] | None = None,
    p: float = 0.0,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = f(residual + dropout(branch)), in one Function.

    Args:
        branch: h, any shape, floating.
        residual: r, of the branch's shape.
        activation: f, a key of the activation table; None is the identity.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.
        p: the probability that dropout sets an element of the branch to zero.
        training: dropout acts only where this is true.
        generator: draws the dropout mask; None is torch's default generator.

    The result has the dtype that the sum has in torch.

    Raises:
        RuntimeError: different shapes or devices, or an integer dtype.
        ValueError: an unknown activation or parameter, or p outside [0, 1].
    """
    e = epilogue_of("residual", activation, activation_parameters, p, training)
    return _residual("residual", "branch", branch, residual, training, generator, e)


@overridable(_in_parts)
def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = dropout(input) + residual, in one Function; arguments and errors as :func:`residual`."""
    e = epilogue_of("dropout_add", None, None, p, training)
    return _residual("dropout_add", "input", input, residual, training, generator, e)


def _residual(
    function: str,
    branch_name: str,
    branch: Tensor,
    residual: Tensor,
    training: bool,
    generator: torch.Generator | None,
    e: Epilogue,
) -> Tensor:
    check_tensor(function, **{branch_name: branch, "residual": residual})
    if branch.is_nested or residual.is_nested:
        given = dict(zip(ACTIVATIONS[e.name].parameters, e.parameters, strict=True))
        return _in_parts(branch, residual, e.p, training, generator, e.name, given)
    if branch.shape != residual.shape:
        raise RuntimeError(
            f"{function}(): 'residual': expected the shape of '{branch_name}', {tuple(branch.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    if branch.device != residual.device:
        raise RuntimeError(
            f"{function}(): 'residual': expected the device of '{branch_name}', {branch.device}, got {residual.device}"
        )
    for name, tensor in ((branch_name, branch), ("residual", residual)):
        if not tensor.is_floating_point():
            raise RuntimeError(f"{function}(): '{name}': expected a floating dtype, got {tensor.dtype}")
    mask = draw_mask(branch, e.p, generator) if e.p > 0 else None
    output = call(ResidualFunction, branch, residual, mask, e)
    return output[0] if isinstance(output, tuple) else output
