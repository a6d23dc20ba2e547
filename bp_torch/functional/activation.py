"""Functional forms of the activations, with torch.nn.functional's names and signatures.

``inplace=True`` is torch's own in-place operator, which overwrites its input and whose backward is torch's. So is
every activation of complex numbers, for which the table's derivatives do not hold, and of nested tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary

from ..functions.activation import ACTIVATIONS, ActivationFunction
from ..functions.epilogue import epilogue
from ..functions.function import call
from ._common import activation_arguments, check_activation, check_tensor, hand_over, to_float32

__all__ = [
    "activation",
    "celu",
    "elu",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
]


def activation(input: Tensor, activation: str, activation_parameters: Mapping[str, float] | None = None) -> Tensor:
    """y = f(x), with f a row of the activation table.

    Args:
        input: x, any shape, floating.
        activation: a key of the table.
        activation_parameters: f's parameters that differ from the default.

    Raises:
        ValueError: an unknown activation or parameter.
    """
    name, parameters = activation_arguments("activation", activation, activation_parameters)
    return _call(name, input, *parameters)


def _call(name: str, input: Tensor, *parameters: float) -> Tensor:
    if has_torch_function_unary(input):
        given = dict(zip(ACTIVATIONS[name].parameters, parameters, strict=True))
        return hand_over(activation, lambda *_: _by_torch(name, input, *parameters), input, name, given)
    check_tensor(name, input=input)
    if parameters:
        check_activation(name, name, parameters)
    if input.is_complex() or input.is_nested:
        return _by_torch(name, input, *parameters)
    if name == "softplus":
        (input,) = to_float32(input, cpu=False)
    return call(ActivationFunction, input, epilogue(name, tuple(map(float, parameters)), fused=False))


def _by_torch(name: str, input: Tensor, *parameters: float) -> Tensor:
    if name == "identity":
        return input.clone()
    if name == "gelu_tanh":
        return F.gelu(input, approximate="tanh")
    native = getattr(torch, name) if name == "sin" else getattr(F, name)
    return native(input, *parameters)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = max(x, 0); relu′(0) = 0."""
    return F.relu(input, inplace=True) if inplace else _call("relu", input)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """y = x if x > 0 else negative_slope · x."""
    return F.leaky_relu(input, negative_slope, True) if inplace else _call("leaky_relu", input, negative_slope)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """y = x if x > 0 else α (eˣ - 1)."""
    return F.elu(input, alpha, True) if inplace else _call("elu", input, alpha)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = λ elu(x, α), with λ and α of arXiv:1706.02515."""
    return F.selu(input, True) if inplace else _call("selu", input)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """y = x if x > 0 else α (exp(x/α) - 1)."""
    return F.celu(input, alpha, True) if inplace else _call("celu", input, alpha)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """y = x Φ(x), or its tanh approximation with ``approximate="tanh"``."""
    if approximate not in ("none", "tanh"):
        if not isinstance(approximate, str):
            raise TypeError(f"gelu(): 'approximate': expected a text, got {type(approximate).__name__}")
        raise RuntimeError(f"gelu(): 'approximate': expected 'none' or 'tanh', got {approximate!r}")
    return _call("gelu" if approximate == "none" else "gelu_tanh", input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x σ(x)."""
    return F.silu(input, inplace=True) if inplace else _call("silu", input)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x tanh(softplus(x))."""
    return F.mish(input, inplace=True) if inplace else _call("mish", input)


def sigmoid(input: Tensor) -> Tensor:
    """y = 1/(1 + e⁻ˣ)."""
    return _call("sigmoid", input)


def tanh(input: Tensor) -> Tensor:
    """y = tanh(x)."""
    return _call("tanh", input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """y = log(1 + exp(β x))/β, and x where β x > threshold."""
    return _call("softplus", input, beta, threshold)


def softsign(input: Tensor) -> Tensor:
    """y = x/(1 + |x|)."""
    return _call("softsign", input)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """y = min(max(x, min_val), max_val)."""
    return F.hardtanh(input, min_val, max_val, True) if inplace else _call("hardtanh", input, min_val, max_val)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """y = min(max(x, 0), 6)."""
    return F.relu6(input, True) if inplace else _call("relu6", input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """y = min(max(x + 3, 0), 6)/6."""
    return F.hardsigmoid(input, True) if inplace else _call("hardsigmoid", input)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """y = x min(max(x + 3, 0), 6)/6."""
    return F.hardswish(input, True) if inplace else _call("hardswish", input)


def logsigmoid(input: Tensor) -> Tensor:
    """y = log σ(x)."""
    return _call("logsigmoid", input)


def tanhshrink(input: Tensor) -> Tensor:
    """y = x - tanh(x)."""
    return _call("tanhshrink", input)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = x if |x| > λ else 0."""
    return _call("hardshrink", input, lambd)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """y = sign(x) max(|x| - λ, 0)."""
    return _call("softshrink", input, lambd)


def sin(input: Tensor) -> Tensor:
    """y = sin(x), for implicit and physics-informed networks (arXiv:2006.09661)."""
    return _call("sin", input)
