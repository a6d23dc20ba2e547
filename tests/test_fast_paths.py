"""The fast paths on the CPU that call ATen's kernels, held to the formulas that they stand for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exact import assert_as_good_as_torch
from torch import Tensor

import bp_torch
import bp_torch.functional as bpF
from bp_torch.functions.aten import batch_norm as batch_norm_cpu
from bp_torch.functions.aten import loss as loss_cpu
from bp_torch.functions.batch_norm import BatchNormFunction
from bp_torch.functions.epilogue import Epilogue
from bp_torch.functions.function import call


@pytest.fixture(autouse=True)
def _formulas() -> object:
    with bp_torch.backend("torch"):
        yield


def both_ways(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients, by the fast path and by the formula, which a recorded backward selects."""
    found = []
    for create_graph in (False, True):
        given = [t.detach().clone().requires_grad_() for t in inputs]
        y = f(*given)
        numbers = torch.linspace(-1, 1, max(y.numel(), 2), dtype=y.dtype)[: y.numel()].reshape(y.shape) + 0.5
        dy = torch.empty_like(y).copy_(numbers)  # y's layout
        found.append([y.detach(), *torch.autograd.grad(y, given, dy, create_graph=create_graph)])
    return found[0], [t.detach() for t in found[1]]


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((9, 5), None), ((4, 3, 5), None), ((3, 4, 2, 5), None), ((3, 4, 2, 5), torch.channels_last)],
    ids=str,
)
def test_batch_norm_writes_dx_into_dz(
    shape: tuple[int, ...],
    memory_format: torch.memory_format | None,
    affine: bool,
    activation: str,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = in_steps(monkeypatch, chunk)
    x = (3 + 2 * torch.randn(shape)).double()
    x = x if memory_format is None else x.contiguous(memory_format=memory_format)
    parameters = [torch.randn(shape[1]).double() for _ in range(2)] if affine else []

    def f(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        return bpF.batch_norm_act(x, None, None, gamma, beta, training=True, activation=activation)

    fast, formula = both_ways(f, x, *parameters)
    torch.testing.assert_close(fast, formula, rtol=1e-10, atol=1e-10)
    assert set(steps) == {x.stride(1) == 1}


def in_steps(monkeypatch: pytest.MonkeyPatch, chunk: int) -> list[bool]:
    """Batch norm's backward takes the steps of large tensors for small ones; what each call decided."""
    decide, decided = batch_norm_cpu._in_steps, []

    def noted(*tensors: Tensor) -> bool:
        decided.append(decide(*tensors))
        return decided[-1]

    monkeypatch.setattr(batch_norm_cpu, "CHUNK", chunk)
    monkeypatch.setattr(batch_norm_cpu, "FRESH", 0)
    monkeypatch.setattr(batch_norm_cpu, "_in_steps", noted)
    return decided


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_batch_norm_in_chunks_is_right_at_a_large_mean(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = in_steps(monkeypatch, 64)

    def gradient(f: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x, dy)[0]

    def ours(x: Tensor) -> Tensor:
        return bpF.batch_norm_act(x, None, None, training=True, activation="tanh")

    def theirs(x: Tensor) -> Tensor:
        return torch.tanh(F.batch_norm(x, None, None, training=True))

    assert_as_good_as_torch(
        functools.partial(gradient, ours),
        functools.partial(gradient, theirs),
        lambda: (mean + torch.randn(512, 8), torch.randn(512, 8)),
    )
    assert set(steps) == {True}


def test_large_batch_norm_leaves_the_gradient_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = in_steps(monkeypatch, 4)
    for activation in (None, "identity", "relu"):
        x, dy = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
        kept = dy.clone()
        bpF.batch_norm_act(x, None, None, training=True, activation=activation).backward(dy)
        assert torch.equal(dy, kept)
    assert steps == [True]  # after relu: without an activation dz is the caller's


@pytest.mark.parametrize("n", [2, 64, 5000])
def test_statistics_are_taken_again_only_where_rounding_tells(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    again = batch_norm_cpu._accurate_forward

    def counted(*args: Any) -> Any:
        taken.append(1)
        return again(*args)

    monkeypatch.setattr(batch_norm_cpu, "_accurate_forward", counted)
    for k, expected in ((0.0, 0), (1e4, 1)):
        x = k + torch.randn(n, 4)
        _, mean, var = call(BatchNormFunction, x, None, None, None, None, 1e-5, Epilogue())
        assert len(taken) == expected
        exact = x.double()
        assert (mean - exact.mean(0)).abs().max() <= 2**-23 * max(k, 1)
        torch.testing.assert_close(var.double(), exact.var(0, correction=0), rtol=4e-5, atol=1e-12)
    x = torch.tensor([[1e4], [1e4 + 101 / 1024]])  # half-way between them lies no float32
    _, _, var = call(BatchNormFunction, x, None, None, None, None, 1e-5, Epilogue())
    torch.testing.assert_close(var.double(), x.double().var(0, correction=0), rtol=1e-6, atol=0)
    taken.pop()
    x = torch.zeros(n, 4)  # dead units have no deviation, and an exact mean
    assert math.isfinite(call(BatchNormFunction, x, None, None, None, None, 1e-5, Epilogue())[0].sum())
    assert len(taken) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("transposed", [False, True])
def test_small_cross_entropy_equals_its_formula(dtype: torch.dtype, reduction: str, transposed: bool) -> None:
    x, t = 4 * torch.randn(7, 5), torch.tensor([0, 1, 4, -100, 2, 2, 3])
    x = (x.T.contiguous().T if transposed else x).to(dtype)
    for weight in (None, torch.rand(5).to(dtype)):

        def results(way: int, x: Tensor, weight: Tensor | None = weight) -> list[Tensor]:
            w = None if weight is None else weight.to(x.dtype)
            return both_ways(lambda x: bpF.cross_entropy(x, t, w, reduction=reduction), x)[way]

        fast, formula = (functools.partial(results, way) for way in (0, 1))
        if dtype == torch.float64:
            torch.testing.assert_close(fast(x), formula(x), rtol=1e-12, atol=1e-14)
        else:
            assert_as_good_as_torch(fast, formula, lambda x=x: [x * (1 + 0.1 * torch.randn_like(x))])


def test_small_cross_entropy_twice_and_along_tangents() -> None:
    """What was kept by the fast forward serves no backward that is itself recorded, nor one with tangents."""
    x, t = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda x: bpF.cross_entropy(x, t), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: bpF.cross_entropy(x, t), x, check_fwd_over_rev=True)
    loss = bpF.cross_entropy(x, t)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, t), x, create_graph=True)
    v = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(dx, x, v), torch.autograd.grad(expected, x, v))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_relu_in_place_leaves_what_was_given(shape: tuple[int, ...]) -> None:
    x, W, b = torch.randn(shape), torch.randn(3, 5), torch.randn(3)
    kept = [t.clone() for t in (x, W, b)]
    fast, formula = both_ways(lambda *given: bpF.dense(*given, activation="relu"), x, W, b)
    torch.testing.assert_close(fast, formula)
    assert all(torch.equal(t, k) for t, k in zip((x, W, b), kept, strict=True))
    torch.testing.assert_close(fast[0], F.relu(F.linear(x, W, b)))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_large_losses_of_two_dtypes(
    name: str, reduction: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_cpu, "CHUNK", 8)
    x, t = (torch.randn(5, 7).to(dtype).requires_grad_() for dtype in dtypes)
    found = getattr(bpF, name)(x, t, reduction=reduction)
    wide = [given.detach().double().requires_grad_() for given in (x, t)]
    right = getattr(F, name)(*wide, reduction=reduction)  # whose backward refuses two dtypes in huber_loss
    assert found.dtype == getattr(F, name)(x, t).dtype
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=0)
    pulled = torch.autograd.grad(found, (x, t))
    assert [g.dtype for g in pulled] == list(dtypes)
    for got, expected in zip(pulled, torch.autograd.grad(right, wide), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)
