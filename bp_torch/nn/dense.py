"""Dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional._common import activation_arguments, check_probability
from ._leaf import Leaf

__all__ = ["Dense", "Linear"]


class Linear(torch.nn.Linear, Leaf):
    """y = x Wᵀ + b. Arguments, initialization and state_dict of :class:`torch.nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class Dense(torch.nn.Linear, Leaf):
    """y = dropout(f(x Wᵀ + b)) + residual, in one Function.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`torch.nn.Linear`, whose initialization and state_dict
            it has.
        activation: f, a key of the activation table; None is the identity.
        dropout: the probability p that dropout sets an element to zero in training.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.

    Shapes: input (..., in_features); residual, if given, and output (..., out_features).

    Raises:
        ValueError: an unknown activation or parameter, or p outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        dropout: float = 0.0,
        activation_parameters: Mapping[str, float] | None = None,
    ) -> None:
        activation_arguments("Dense", activation, activation_parameters)
        check_probability("Dense", dropout, "dropout")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.dropout = dropout
        self.activation_parameters = dict(activation_parameters or {})

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.dense(
            input,
            self.weight,
            self.bias,
            residual,
            activation=self.activation,
            activation_parameters=self.activation_parameters,
            p=self.dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, activation={self.activation!r}, dropout={self.dropout}"
        return text + (f", activation_parameters={self.activation_parameters}" if self.activation_parameters else "")
