"""Functional forms of the residual connection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from ..functions.activation import ACTIVATIONS
from ..functions.dropout import draw_mask
from ..functions.epilogue import Epilogue
from ..functions.function import call
from ..functions.residual import ResidualFunction
from . import activation as activations
from . import dropout as dropouts
from ._common import check_tensor, epilogue_of, hand_over

__all__ = ["dropout_add", "residual"]


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
    if has_torch_function_variadic(branch, residual):
        return hand_over(
            globals()["residual"], _in_parts, branch, residual, activation=activation,
            activation_parameters=activation_parameters, p=p, training=training, generator=generator,
        )  # fmt: skip
    e = epilogue_of("residual", activation, activation_parameters, p)
    return _residual("residual", "branch", branch, residual, training, generator, e)


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = dropout(input) + residual, in one Function; arguments and errors as :func:`residual`."""
    if has_torch_function_variadic(input, residual):
        return hand_over(dropout_add, _in_parts, input, residual, p=p, training=training, generator=generator)
    return _residual(
        "dropout_add", "input", input, residual, training, generator, epilogue_of("dropout_add", None, None, p)
    )


def _in_parts(
    branch: Tensor,
    residual: Tensor,
    *,
    activation: str | None = None,
    activation_parameters: Mapping[str, float] | None = None,
    p: float,
    training: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """:func:`residual` as dropout, a sum and an activation, one by one."""
    y = residual + dropouts.dropout(branch, p, training, generator=generator)
    return y if activation is None else activations.activation(y, activation, activation_parameters)


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
        return _in_parts(
            branch, residual, activation=e.name,
            activation_parameters=dict(zip(ACTIVATIONS[e.name].parameters, e.parameters, strict=True)),
            p=e.p, training=training, generator=generator,
        )  # fmt: skip
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
    e = e if training else e.without_dropout
    mask = draw_mask(branch, e.p, generator) if e.p > 0 else None
    output = call(ResidualFunction, branch, residual, mask, e)
    return output[0] if isinstance(output, tuple) else output
