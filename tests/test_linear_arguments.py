"""Shapes and arguments of torch.nn.functional.linear beyond those of the module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bp_torch import functional

SHAPES = [((4,), None), ((3, 4), ()), ((3, 4), (1,)), ((1, 4), ())]


@pytest.mark.parametrize(("weight_shape", "bias_shape"), SHAPES)
@pytest.mark.parametrize("shape", [(4,), (5, 4), (0, 4), (2, 5, 4)])
def test_shapes_of_weight_and_bias(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], bias_shape: tuple[int, ...] | None
) -> None:
    inputs = [torch.randn(s, requires_grad=True) for s in (shape, weight_shape, bias_shape) if s is not None]
    ours, theirs = functional.linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(theirs, inputs, dy))


@pytest.mark.parametrize(("weight_shape", "bias_shape"), [((4,), ()), ((3, 4), (4,)), ((3, 5), None), ((), None)])
def test_other_shapes_are_refused(weight_shape: tuple[int, ...], bias_shape: tuple[int, ...] | None) -> None:
    bias = None if bias_shape is None else torch.randn(bias_shape)
    for linear in (F.linear, functional.linear):
        with pytest.raises(RuntimeError):
            linear(torch.randn(2, 4), torch.randn(weight_shape), bias)


@pytest.mark.parametrize(
    "name", ["relu", "gelu", "softplus", "dropout", "log_softmax", "linear", "dense", "batch_norm"]
)
def test_none_is_refused_by_name(name: str) -> None:
    arguments = {"linear": 2, "dense": 2, "batch_norm": 3}.get(name, 1)
    with pytest.raises(TypeError, match=f"{name}.*'input'.*NoneType"):
        getattr(functional, name)(*[None] * arguments)
    if arguments == 2:
        with pytest.raises(TypeError, match=f"{name}.*'weight'.*NoneType"):
            getattr(functional, name)(torch.randn(2, 3), None)
