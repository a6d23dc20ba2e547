"""The multilayer perceptron."""

from __future__ import annotations

import numbers
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..functional._common import activation_arguments, check_probability
from ._leaf import Leaf
from .batch_norm import BatchNormAct1d
from .dense import Dense, Linear
from .residual import Residual

__all__ = ["MLP"]


class MLP(torch.nn.Sequential):
    """Hidden layers ``hidden1``, ``hidden2``, ... and a linear ``output`` layer.

    A hidden layer, with f the activation:

    - y = dropout(f(x Wᵀ + b)): one :class:`Dense`;
    - with ``norm="batch"``: y = dropout(f(BN(x Wᵀ))); batch norm's β is the bias, the linear layer has none;
    - with ``residual=True``, where the hidden layer before has the same width: y = f(x + dropout(x Wᵀ + b)), or
      y = f(x + dropout(BN(x Wᵀ))).

    Args:
        in_features: the width of the input.
        hidden_features: the widths of the hidden layers, in order; a number is one layer, an empty list none.
        out_features: the width of the output.
        activation: f, a key of the activation table; None is the identity.
        norm: None or ``"batch"``.
        dropout: the probability p that dropout sets an element to zero in training, in every hidden layer.
        residual: whether hidden layers of the width of the one before are residual blocks.
        bias: whether the linear layers have biases (with ``norm``, the output layer alone).
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.
        device, dtype: of the parameters.

    Shapes: input (..., in_features), output (..., out_features); (N, in_features) with ``norm="batch"``.

    Parameters have the same names whatever ``activation`` and ``dropout`` are. A slice, such as ``mlp[:-1]``, is a
    :class:`torch.nn.Sequential` of the same layers.

    Raises:
        TypeError: a width that is not an integer.
        ValueError: a width below 1, an unknown activation, parameter or norm, or p outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int] | int,
        out_features: int,
        *,
        activation: str | None = "relu",
        norm: str | None = None,
        dropout: float = 0.0,
        residual: bool = False,
        bias: bool = True,
        activation_parameters: Mapping[str, float] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        hidden = _widths(in_features, hidden_features, out_features)
        activation_arguments("MLP", activation, activation_parameters)
        check_probability("MLP", dropout, "dropout")
        if norm not in (None, "batch"):
            raise ValueError(f"MLP(): 'norm': expected None or 'batch', got {norm!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        f: dict[str, Any] = {"activation": activation, "activation_parameters": activation_parameters}
        layers: OrderedDict[str, torch.nn.Module] = OrderedDict()
        before = int(in_features)
        for index, width in enumerate(hidden, 1):
            block = residual and index > 1 and width == before
            layer: torch.nn.Module
            if norm == "batch":
                layer = HiddenLayer(before, width, dropout=dropout, residual=block, **f, **factory)
            elif block:
                layer = Residual(Linear(before, width, bias, **factory), dropout=dropout, **f)
            else:
                layer = Dense(before, width, bias, **factory, dropout=dropout, **f)
            layers[f"hidden{index}"] = layer
            before = width
        layers["output"] = Linear(before, int(out_features), bias, **factory)
        super().__init__(layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return torch.nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class HiddenLayer(Leaf):
    """y = dropout(f(BN(x Wᵀ))), or y = f(x + dropout(BN(x Wᵀ))) as a residual block: a hidden layer of :class:`MLP`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str | None,
        activation_parameters: Mapping[str, float] | None,
        dropout: float,
        residual: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.activation_parameters = dict(activation_parameters or {})
        self.residual = residual
        self.linear = Linear(in_features, out_features, False, device, dtype)
        # Where dropout stands between batch norm and the sum, f belongs to the sum.
        alone = residual and dropout > 0
        self.norm = BatchNormAct1d(
            out_features,
            device=device,
            dtype=dtype,
            activation=None if alone else activation,
            activation_parameters=None if alone else activation_parameters,
        )
        self.dropout = dropout

    @property
    def dropout(self) -> float:
        """p; without a residual it is batch norm's own."""
        return self._p if self.residual else self.norm.dropout

    @dropout.setter
    def dropout(self, p: float) -> None:
        if self.residual:
            self._p = p
        else:
            self.norm.dropout = p

    def forward(self, input: Tensor) -> Tensor:
        z = self.linear(input)
        if not self.residual:
            normalized: Tensor = self.norm(z)
            return normalized
        if self.dropout == 0:
            return self.norm(z, input)
        return functional.residual(
            self.norm(z),
            input,
            activation=self.activation,
            activation_parameters=self.activation_parameters,
            p=self.dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, residual={self.residual}"


def _widths(in_features: Any, hidden_features: Any, out_features: Any) -> list[int]:
    """The hidden widths as a list; TypeError or ValueError unless all widths are positive integers."""
    hidden = [hidden_features] if isinstance(hidden_features, numbers.Integral) else hidden_features
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise TypeError(
            f"MLP(): 'hidden_features': expected an integer or a sequence of integers, got {type(hidden).__name__}"
        )
    names = ["in_features", *(f"hidden_features[{i}]" for i in range(len(hidden))), "out_features"]
    for name, width in zip(names, [in_features, *hidden, out_features], strict=True):
        if not isinstance(width, numbers.Integral) or isinstance(width, bool):
            raise TypeError(f"MLP(): '{name}': expected an integer, got {width!r}")
        if width < 1:
            raise ValueError(f"MLP(): '{name}': expected a positive width, got {width}")
    return [int(width) for width in hidden]
