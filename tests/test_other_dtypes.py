"""Complex, integer and boolean tensors: where torch.nn has an answer it is given, and what it refuses is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch
from bp_torch import functional
from bp_torch.functions.activation_table import ACTIVATIONS


def gradients(y: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Of y against a fixed complex tensor."""
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    return list(torch.autograd.grad(y, inputs, torch.complex(dy, 1 - dy * dy), create_graph=create_graph))


def complex_result(form: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...] | type[Exception]:
    """Value, gradient and its gradient, or what is raised."""
    try:
        y = form(x)
        (dx,) = gradients(y, [x], True)
        return y, dx, *(gradients(dx, [x]) if dx.requires_grad else [])
    except RuntimeError as error:  # NotImplementedError among them
        return type(error)


ACCEPTED = {"identity", "tanh", "sigmoid", "sin", "softsign", "tanhshrink"}
"""Those that torch differentiates for complex numbers."""


@pytest.mark.parametrize("key", [key for key, row in ACTIVATIONS.items() if row.operator is not None])
def test_complex_activations(key: str) -> None:
    x = torch.randn(7, dtype=torch.complex128, requires_grad=True)
    row = ACTIVATIONS[key]
    theirs = complex_result(lambda x: row.operator(x, *row.parameters.values()), x)
    assert isinstance(theirs, tuple) == (key in ACCEPTED)
    ours = complex_result(lambda x: functional.activation(x, key), x)
    if key in ACCEPTED:
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours == theirs


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
