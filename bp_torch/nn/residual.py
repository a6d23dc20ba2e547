"""Residual connections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import functional
from ..functional._common import activation_arguments, check_probability
from ._leaf import Leaf

__all__ = ["DropoutAdd", "Residual"]


class DropoutAdd(Leaf):
    """y = dropout(input) + residual, in one Function.

    Args:
        p: the probability that dropout sets an element of the input to zero in training.

    Shapes: input, residual and output all equal. Raises ValueError for p outside [0, 1].
    """

    def __init__(self, p: float = 0.5) -> None:
        check_probability("DropoutAdd", p)
        super().__init__()
        self.p = p

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return functional.dropout_add(input, residual, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Residual(Leaf):
    """y = f(x + dropout(branch(x))), all after the branch in one Function.

    Args:
        branch: a module whose output has its input's shape.
        activation: f, a key of the activation table; None is the identity.
        dropout: the probability p that dropout sets an element of the branch's output to zero in training.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.

    Raises:
        ValueError: an unknown activation or parameter, or p outside [0, 1].
        RuntimeError: in forward, a branch that changes the shape.
    """

    def __init__(
        self,
        branch: torch.nn.Module,
        activation: str | None = None,
        dropout: float = 0.0,
        *,
        activation_parameters: Mapping[str, float] | None = None,
    ) -> None:
        activation_arguments("Residual", activation, activation_parameters)
        check_probability("Residual", dropout, "dropout")
        super().__init__()
        self.branch = branch
        self.activation = activation
        self.dropout = dropout
        self.activation_parameters = dict(activation_parameters or {})

    def forward(self, input: Tensor) -> Tensor:
        return functional.residual(
            self.branch(input),
            input,
            activation=self.activation,
            activation_parameters=self.activation_parameters,
            p=self.dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        text = f"activation={self.activation!r}, dropout={self.dropout}"
        return text + (f", activation_parameters={self.activation_parameters}" if self.activation_parameters else "")
