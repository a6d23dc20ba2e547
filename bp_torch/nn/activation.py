"""Activations: torch.nn's classes, with their arguments and repr, over the activation table."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._leaf import Leaf

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Sin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]


class ReLU(torch.nn.ReLU, Leaf):
    """y = max(x, 0)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU, Leaf):
    """y = x if x > 0 else negative_slope · x."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(torch.nn.ELU, Leaf):
    """y = x if x > 0 else α (eˣ - 1)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.elu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU, Leaf):
    """y = λ elu(x, α)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.selu(input, self.inplace)


class CELU(torch.nn.CELU, Leaf):
    """y = x if x > 0 else α (exp(x/α) - 1)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.celu(input, self.alpha, self.inplace)


class GELU(torch.nn.GELU, Leaf):
    """y = x Φ(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU, Leaf):
    """y = x σ(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class Mish(torch.nn.Mish, Leaf):
    """y = x tanh(softplus(x))."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.mish(input, self.inplace)


class Sigmoid(torch.nn.Sigmoid, Leaf):
    """y = 1/(1 + e⁻ˣ)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Tanh(torch.nn.Tanh, Leaf):
    """y = tanh(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


class Softplus(torch.nn.Softplus, Leaf):
    """y = log(1 + exp(β x))/β, and x where β x > threshold."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softplus(input, self.beta, self.threshold)


class Softsign(torch.nn.Softsign, Leaf):
    """y = x/(1 + |x|)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softsign(input)


class Hardtanh(torch.nn.Hardtanh, Leaf):
    """y = min(max(x, min_val), max_val)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(torch.nn.ReLU6, Leaf):
    """y = min(max(x, 0), 6)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid, Leaf):
    """y = min(max(x + 3, 0), 6)/6."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardsigmoid(input, self.inplace)


class Hardswish(torch.nn.Hardswish, Leaf):
    """y = x min(max(x + 3, 0), 6)/6."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input, self.inplace)


class LogSigmoid(torch.nn.LogSigmoid, Leaf):
    """y = log σ(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.logsigmoid(input)


class Tanhshrink(torch.nn.Tanhshrink, Leaf):
    """y = x - tanh(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanhshrink(input)


class Hardshrink(torch.nn.Hardshrink, Leaf):
    """y = x if |x| > λ else 0."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardshrink(input, self.lambd)


class Softshrink(torch.nn.Softshrink, Leaf):
    """y = sign(x) max(|x| - λ, 0)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softshrink(input, self.lambd)


class Sin(Leaf):
    """y = sin(x)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sin(input)
