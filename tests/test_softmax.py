"""Softmax and log-softmax against torch, beyond the contracts that every case passes."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import widest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.softmax import LogSoftmaxFunction, SoftmaxFunction

NAMES = ("softmax", "log_softmax", "softmin")
INF = float("inf")


def both(name: str, x: Tensor, *args: Any, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """(y, dx) by bp_torch and by torch."""
    results = []
    for module in (bpF, F):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = getattr(module, name)(leaf, *args, **options)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append((y, torch.autograd.grad(y, leaf, dy)[0]))
    return results


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(shape=st.lists(st.integers(0, 5), min_size=0, max_size=4), data=st.data())
def test_any_shape_and_dimension(name: str, shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1))
    order = data.draw(st.permutations(range(len(shape))))
    x = 3 * torch.randn([shape[i] for i in order], dtype=widest())
    x = x.permute([order.index(i) for i in range(len(shape))])
    ours, theirs = both(name, x, dim)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "row",
    [[-INF, 0.0, 1.0], [-INF] * 3, [INF, 0.0, 1.0], [float("nan"), 0.0, 1.0], [1e4, -1e4, 0.0], [3e38, -3e38, 0.0]],
)
def test_tails(name: str, row: list[float]) -> None:
    ours, theirs = both(name, torch.tensor([row, [1.0, 2.0, 3.0]]), 1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_dtype_argument_casts_the_input_first(name: str, dtype: torch.dtype) -> None:
    x = torch.arange(6).reshape(2, 3).to(dtype)
    y, expected = getattr(bpF, name)(x, 1, dtype=torch.float32), getattr(F, name)(x, 1, dtype=torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2), (2, 3, 2, 2)])
def test_implicit_dimension_warns_and_is_torchs(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
        y = getattr(bpF, name)(x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(y, getattr(F, name)(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("x", "dim"), [(torch.ones(2, 3), 2), (torch.ones(2, 3, dtype=torch.long), 1), ("x", 1), (torch.ones(2), "a")]
)
def test_misuse_raises_what_torch_raises(name: str, x: Any, dim: Any) -> None:
    with pytest.raises(Exception) as theirs:
        getattr(F, name)(x, dim) if isinstance(x, Tensor) else torch.softmax(x, dim)
    with pytest.raises(type(theirs.value), match=rf"{name}\(\)"):
        getattr(bpF, name)(x, dim)


@pytest.mark.one_backend("torch", "about the formulas' fast path; the kernels have test_triton_softmax.py")
@pytest.mark.parametrize("function", [SoftmaxFunction, LogSoftmaxFunction])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_aten_kernel_equals_the_formula(function: type, dtype: torch.dtype) -> None:
    x = 3 * torch.randn(5, 7, dtype=dtype, requires_grad=True)
    dy = torch.randn(5, 7, dtype=dtype)
    y = function.with_jvp.apply(x, 1)
    (fused,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (formula,) = torch.autograd.grad(y, x, dy, create_graph=True)
    torch.testing.assert_close(fused, formula)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax", "Softmin", "Softmax2d"])
def test_modules(name: str) -> None:
    args = () if name == "Softmax2d" else (1,)
    ours, theirs = getattr(nn, name)(*args), getattr(torch.nn, name)(*args)
    x = torch.randn(2, 3, 4, 5)
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(x), theirs(x))
    if name == "Softmax2d":
        torch.testing.assert_close(ours(x[0]), theirs(x[0]))
        with pytest.raises(ValueError, match="Softmax2d"):
            ours(x[0, 0])
