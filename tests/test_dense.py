"""Linear and Dense against torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import torch_activation, widest, within, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.dense import LinearFunction
from bp_torch.functions.dropout import draw_mask
from bp_torch.functions.function import call

SMOOTH = ["identity", "relu", "leaky_relu", "tanh", "gelu", "softplus", "sigmoid", "sin"]


def gradients(f, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    given = [t for t in inputs if t is not None]
    y = f(*inputs)
    return (y, *torch.autograd.grad(y, given, torch.cos(torch.arange(y.numel()).to(y)).reshape(y.shape)))


def make(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=widest(), requires_grad=True)


@settings(max_examples=25)
@given(
    batch=st.lists(st.integers(0, 4), max_size=3),
    widths=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_linear_equals_torch_for_any_shape_and_stride(
    batch: list[int], widths: tuple[int, int], bias: bool, transposed: bool
) -> None:
    inner, outer = widths
    x, b = make(*batch, inner), make(outer) if bias else None
    W = make(inner, outer).detach().mT.requires_grad_() if transposed else make(outer, inner)
    torch.testing.assert_close(gradients(bpF.linear, x, W, b), gradients(F.linear, x, W, b))


@settings(max_examples=25)
@given(
    key=st.sampled_from(SMOOTH),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    residual=st.booleans(),
    bias=st.booleans(),
    training=st.booleans(),
)
def test_dense_equals_its_parts(key: str, p: float, residual: bool, bias: bool, training: bool) -> None:
    x, W = make(4, 3), make(5, 3)
    b, r = make(5) if bias else None, make(4, 5) if residual else None
    torch.manual_seed(5)
    mask = written_out(draw_mask(torch.empty(4, 5), p), (4, 5), p) if training and p else None

    def parts(x, W, b, r):
        a = torch_activation(key)(F.linear(x, W, b), *ACTIVATIONS[key].parameters.values())
        if mask is not None:
            a = a * mask / (1 - p) if p < 1 else a * 0
        return a if r is None else a + r

    def fused(x, W, b, r):
        torch.manual_seed(5)
        return bpF.dense(x, W, b, r, activation=key, p=p, training=training)

    torch.testing.assert_close(gradients(fused, x, W, b, r), gradients(parts, x, W, b, r))


def test_weight_gradient_of_a_first_layer_whose_input_needs_none() -> None:
    x = torch.randn(4, 3)
    ours, theirs = nn.Dense(3, 2, activation="gelu"), torch.nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, False):
        ours.train(training).zero_grad()
        theirs.zero_grad()
        ours(x).sum().backward()
        F.gelu(theirs(x)).sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_transposed_upstream_gradient_after_an_activation() -> None:
    x, W, b = make(4, 4), make(4, 4), make(4)
    dy = torch.randn(4, 4, dtype=widest()).mT
    ours = torch.autograd.grad(bpF.dense(x, W, b, activation="silu"), (x, W, b), dy)
    theirs = torch.autograd.grad(F.silu(F.linear(x, W, b)), (x, W, b), dy)
    torch.testing.assert_close(ours, theirs)


def test_gradient_penalty_keeps_every_term() -> None:
    """The second derivative through a hidden layer, in which the activation's f″ counts."""
    x = make(4, 3)

    def penalty(layer) -> tuple[Tensor, ...]:
        W, b = (t.to(widest()).requires_grad_() for t in (torch.ones(5, 3) / 3, torch.ones(5) / 7))
        (dx,) = torch.autograd.grad(layer(x, W, b).sin().sum(), x, create_graph=True)
        return torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), (W, b))

    ours = penalty(lambda x, W, b: bpF.dense(x, W, b, activation="tanh"))
    torch.testing.assert_close(ours, penalty(lambda x, W, b: torch.tanh(F.linear(x, W, b))))


def saved(f) -> list[tuple[int, ...]]:
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        f()
    return sorted(shapes)


def test_relu_and_dropout_save_the_output_alone() -> None:
    layer = nn.Dense(8, 16, activation="relu", dropout=0.5)
    x = torch.randn(4, 8, requires_grad=True)
    assert saved(lambda: layer(x)) == sorted([(4, 8), (16, 8), (4, 16)])


def test_a_frozen_weight_saves_no_input() -> None:
    layer = nn.Linear(8, 16).requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    assert saved(lambda: layer(x)) == [(16, 8)]
    layer.bias.requires_grad_(True)
    assert saved(lambda: layer(x.detach())) == []


def test_residual_of_another_dtype_promotes_as_torch_does() -> None:
    x, W = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    r = torch.randn(2, 4, requires_grad=True)
    y = bpF.dense(x, W, residual=r, activation="relu")
    y.sum().backward()
    assert y.dtype == torch.float32
    assert W.grad is not None
    assert W.grad.dtype == torch.bfloat16
    assert r.grad is not None
    assert r.grad.dtype == torch.float32


@pytest.mark.contract("randomness", function="DenseFunction")
def test_checkpointing_draws_the_same_mask() -> None:
    layer = nn.Dense(16, 64, activation="relu", dropout=0.5)
    x = torch.randn(64, 16, requires_grad=True)
    for reentrant in (False, True):
        torch.manual_seed(1)
        expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
        torch.manual_seed(1)
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


@pytest.mark.contract("randomness", function="DenseFunction")
def test_generator_decides_the_mask() -> None:
    x, W = torch.ones(64, 8), torch.ones(32, 8)

    def draw(seed: int) -> Tensor:
        return bpF.dense(x, W, p=0.5, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    torch.testing.assert_close(draw(1), draw(1), rtol=0, atol=0)
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = ours(x), theirs(x)
        assert nn.Dense(4, 3, activation="gelu")(x).dtype == dtype
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert ours.weight.grad.dtype == torch.float32
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_autocast_around_backward_too() -> None:
    layer = nn.Dense(4, 3, activation="tanh")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), "'input': expected a last dimension of 5"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"'bias': expected shape \(4,\), got \(3,\)"),
        ((torch.ones(2, 3), torch.ones(4, 3).double()), "'weight': expected the dtype of 'input', torch.float32"),
        ((torch.ones(()), torch.ones(4, 3)), "'input': expected a last dimension of 3"),
    ],
)
def test_what_does_not_fit_is_refused_as_torch_refuses_it(arguments, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        bpF.linear(*arguments)
    with pytest.raises(RuntimeError):
        F.linear(*arguments)


def test_errors_of_dense_name_the_argument() -> None:
    x, W = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"'residual': expected shape \(2, 4\), got \(4,\)"):
        bpF.dense(x, W, residual=torch.ones(4))
    with pytest.raises(ValueError, match=r"'p': expected a probability between 0 and 1, got 1\.5"):
        bpF.dense(x, W, p=1.5)
    with pytest.raises(ValueError, match="'dropout': expected a probability"):
        nn.Dense(3, 4, dropout=-0.1)
    with pytest.raises(ValueError, match="'activation'"):
        nn.Dense(3, 4, activation="rleu")
    with pytest.raises(TypeError, match="'input': expected a Tensor, got list"):
        bpF.linear([1.0], W)  # type: ignore[arg-type]


def test_weight_is_stored_as_torch_stores_it_and_initialized() -> None:
    torch.manual_seed(3)
    ours = nn.Dense(4, 4, activation="relu")
    torch.manual_seed(3)
    theirs = torch.nn.Linear(4, 4)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_a_jit_trace_can_be_saved_and_loaded(tmp_path: Path) -> None:
    layer = nn.Dense(3, 4, activation="gelu")
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of the shape checks
        torch.jit.trace(layer, x).save(tmp_path / "layer.pt")
        loaded = torch.jit.load(tmp_path / "layer.pt")
        torch.testing.assert_close(loaded(x), layer(x))


@pytest.mark.parametrize("transformed", [False, True])
def test_autocast_is_off_inside_a_function(transformed: bool) -> None:
    """Who calls one has cast what must be cast, as the functional forms have."""
    x, W = torch.randn(3, 4), torch.randn(5, 4)

    def f(x: Tensor) -> Tensor:
        return call(LinearFunction, x, W, None)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.func.vjp(f, x)[0] if transformed else f(x)
    torch.testing.assert_close(found, f(x))


@pytest.mark.parametrize("first", [True, False])
def test_tensors_that_escaped_from_a_transform(first: bool) -> None:
    """What is left of one when its transform has ended is a tensor as any other, in whichever place."""
    inner, other = (torch.randn(3, 4, dtype=widest()).requires_grad_() for _ in range(2))
    escaped: list[Tensor] = []
    torch.func.grad(lambda x: (escaped.append(x), x.sum())[1])(inner)
    given = (escaped[0], other) if first else (other, escaped[0])
    found, right = (f(*given) for f in (bpF.linear, F.linear))
    torch.testing.assert_close(found, right)
    pulled, expected = (torch.autograd.grad(y.sum(), (inner, other)) for y in (found, right))
    torch.testing.assert_close(pulled, expected)


@pytest.mark.parametrize(
    ("key", "parameters"),
    [(key, p) for key, row in ACTIVATIONS.items() for p in (tuple(row.parameters.values()), *row.examples)],
    ids=str,
)
def test_every_activation_with_every_kind_of_parameters(key: str, parameters: tuple[float, ...]) -> None:
    """A fused layer keeps its output where that tells f′: whether it does may depend on the parameters."""
    x, W, b = (torch.randn(shape, dtype=widest()).requires_grad_() for shape in [(9, 4), (5, 4), (5,)])
    found = bpF.dense(
        x, W, b, activation=key, activation_parameters=dict(zip(ACTIVATIONS[key].parameters, parameters, strict=True))
    )
    right = torch_activation(key)(F.linear(x, W, b), *parameters)
    torch.testing.assert_close(found, right, **within(1e-6, 1e-7))  # torch's celu holds 1/α in float32
    dy = torch.randn_like(right)
    pulled, expected = (torch.autograd.grad(y, (x, W, b), dy) for y in (found, right))
    torch.testing.assert_close(pulled, expected, **within(1e-6, 1e-7))
