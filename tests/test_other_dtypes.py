"""Complex, integer and boolean tensors: where torch.nn has an answer it is given, and what it refuses is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch
from bp_torch import functional

COMPLEX_ACTIVATIONS = ["tanh", "sigmoid", "sin", "softsign", "tanhshrink"]
"""Those that torch differentiates for complex numbers."""


def gradients(y: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Of y against a fixed complex tensor."""
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    return list(torch.autograd.grad(y, inputs, torch.complex(dy, 1 - dy * dy), create_graph=create_graph))


@pytest.mark.parametrize("name", COMPLEX_ACTIVATIONS)
def test_complex_activations(name: str) -> None:
    x = torch.randn(7, dtype=torch.complex128, requires_grad=True)
    native = getattr(torch, name) if hasattr(torch, name) else getattr(F, name)
    for f in (getattr(functional, name), lambda x: functional.activation(x, name)):
        torch.testing.assert_close(f(x), native(x))
        (dx,), (expected,) = gradients(f(x), [x], True), gradients(native(x), [x], True)
        torch.testing.assert_close(dx, expected)
        torch.testing.assert_close(gradients(dx, [x]), gradients(expected, [x]))


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "softplus", "mish"])
def test_complex_activations_without_meaning(name: str) -> None:
    with pytest.raises(RuntimeError):  # torch's NotImplementedError among them
        functional.activation(torch.randn(3, dtype=torch.complex64), name)


def test_complex_dense() -> None:
    x = torch.randn(5, 4, dtype=torch.complex128, requires_grad=True)
    layer = torch.nn.Linear(4, 3, dtype=torch.complex128)
    residual = torch.randn(5, 3, dtype=torch.complex128, requires_grad=True)
    inputs = [x, layer.weight, layer.bias]
    expected = gradients(layer(x), inputs)
    torch.testing.assert_close(gradients(functional.linear(*inputs), inputs), expected)
    y = functional.dense(*inputs, residual, activation="tanh", p=0.5, training=False)
    torch.testing.assert_close(
        gradients(y, [*inputs, residual]), gradients(layer(x).tanh() + residual, [*inputs, residual])
    )


def test_complex_model_converted() -> None:
    linear = [torch.nn.Linear(4, 4, dtype=torch.complex64) for _ in range(2)]
    model = torch.nn.Sequential(linear[0], torch.nn.Tanh(), torch.nn.Dropout(0.0), linear[1])
    x = torch.randn(5, 4, dtype=torch.complex64)

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).abs().sum(), list(model.parameters())))

    expected = step()
    bp_torch.convert(model)
    torch.testing.assert_close(step(), expected)


@pytest.mark.parametrize("name", ["mse_loss", "smooth_l1_loss"])
def test_bool_target(name: str) -> None:
    x, t = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3) > 0.5
    ours, theirs = getattr(functional, name)(x, t), getattr(F, name)(x, t)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))
    torch.testing.assert_close(getattr(functional, name)(t, x), getattr(F, name)(t, x))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weighted_errors_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    x, t, w = (torch.randn(4, 3) * 3).to(dtype), (torch.randn(4, 3) * 3).to(dtype), torch.rand(4, 3)
    torch.testing.assert_close(getattr(functional, name)(x, t, weight=w), getattr(F, name)(x, t, weight=w))


def test_huber_refuses_integers() -> None:
    for loss in (F.huber_loss, functional.huber_loss):
        with pytest.raises(RuntimeError):
            loss(torch.arange(3), torch.randn(3))
