"""Batch normalization against torch.nn: values, gradients, layouts, modes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import widest, within
from exact import assert_as_good_as_torch, carried
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import seeded
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.batch_norm import BatchNormFunction, NormalizeFunction
from bp_torch.functions.epilogue import Epilogue
from bp_torch.functions.function import call

SHAPES = {"1d": [(6, 3), (5, 3, 4)], "2d": [(3, 3, 4, 5)], "3d": [(2, 3, 2, 3, 2)]}
RANKED = [(rank, shape) for rank, shapes in SHAPES.items() for shape in shapes]
ranked = pytest.mark.parametrize(("rank", "shape"), RANKED, ids=str)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def pair(rank: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's, in the widest dtype, with the same random parameters."""
    theirs = getattr(torch.nn, f"BatchNorm{rank}")(3, *args, dtype=widest(), **options)
    ours = getattr(nn, f"BatchNorm{rank}")(3, *args, dtype=widest(), **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def step(module: Any, x: Tensor, dy: Tensor) -> tuple[Any, ...]:
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for p in module.parameters()], dict(module.named_buffers())


@ranked
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 1.0},
        {"momentum": 0.0},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.3},
        {"bias": False},
    ],
    ids=str,
)
def test_training_then_evaluation_equals_torch(rank: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    ours, theirs = pair(rank, **options)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    for i in range(4):
        if i == 3:
            ours.eval()
            theirs.eval()
        x, dy = 3 + 2 * torch.randn(shape).to(widest()), torch.randn(shape).to(widest())
        torch.testing.assert_close(step(ours, x, dy), step(theirs, x, dy), **within(**EXACT))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_and_residual_equal_the_steps_apart(activation: str, training: bool, fused: bool) -> None:
    """By ATen's kernels, and by the formulas, which serve while a graph is recorded."""
    bn = nn.BatchNormAct2d(3, activation=activation, dtype=widest()).train(training)
    plain = torch.nn.BatchNorm2d(3, dtype=widest()).train(training)
    torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
    plain.load_state_dict(bn.state_dict())
    x, r = (torch.randn(4, 3, 2, 2, dtype=widest(), requires_grad=True) for _ in range(2))
    y = bn(x, r)
    expected = bpF.activation(plain(x) + r, activation)
    torch.testing.assert_close(y, expected, **within(**EXACT))
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, r, *bn.parameters()), dy, create_graph=not fused)
    theirs = torch.autograd.grad(expected, (x, r, *plain.parameters()), dy)
    torch.testing.assert_close(ours, theirs, **within(**EXACT))
    torch.testing.assert_close(dict(bn.named_buffers()), dict(plain.named_buffers()), **within(**EXACT))


def test_gradients_reach_mean_and_variance() -> None:
    """The statistics that the Function returns are outputs like y, alone or together."""
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return call(BatchNormFunction, x, gamma, beta, None, None, 1e-3, Epilogue("silu"))

    check = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(f, (x, gamma, beta), check_undefined_grad=True, **check)
    assert gradgradcheck(f, (x, gamma, beta), check_fwd_over_rev=True)
    for chosen in itertools.product([False, True], repeat=3):
        if any(chosen):
            outputs = [y for y, keep in zip(f(x, gamma, beta), chosen, strict=True) if keep]
            dims = [0, 2]
            z = F.batch_norm(x, None, None, gamma, beta, True, eps=1e-3)
            torch_outputs = F.silu(z), x.mean(dims), x.var(dims, correction=0)
            expected = [y for y, keep in zip(torch_outputs, chosen, strict=True) if keep]
            dys = [torch.randn_like(y) for y in outputs]
            ours = torch.autograd.grad(outputs, (x, gamma, beta), dys, allow_unused=True, materialize_grads=True)
            theirs = torch.autograd.grad(expected, (x, gamma, beta), dys, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_each_choice_of_frozen_inputs(activation: str, training: bool, affine: bool, residual: bool) -> None:
    x, r = torch.randn(4, 3, 2).to(widest()), torch.randn(4, 3, 2).to(widest()) if residual else None
    gamma, beta = (torch.rand(3).to(widest()), torch.randn(3).to(widest())) if affine else (None, None)
    mean, var = torch.randn(3).to(widest()), torch.rand(3).to(widest())
    function, statistics = (BatchNormFunction, ()) if training else (NormalizeFunction, (mean, var))
    inputs = (x, gamma, beta, r, *statistics)
    dy = torch.randn(4, 3, 2).to(widest())

    def gradients(chosen: list[int], create_graph: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(i in chosen) if t is not None else None for i, t in enumerate(inputs)]
        y = call(function, *leaves, None, 1e-3, Epilogue(activation))
        wanted = [leaf for i in chosen if (leaf := leaves[i]) is not None]
        return list(torch.autograd.grad(y[0] if training else y, wanted, dy, create_graph=create_graph))

    given = [i for i, t in enumerate(inputs) if t is not None]
    full = dict(zip(given, gradients(given, True), strict=True))
    # On the kernels, whose interpreter is slow, each alone and all but each.
    counts = range(1, len(given)) if widest() == torch.float64 else {1, len(given) - 1} - {0, len(given)}
    for count in counts:
        for chosen in itertools.combinations(given, count):
            for create_graph in (False, True):
                expected = [full[i] for i in chosen]
                torch.testing.assert_close(gradients(list(chosen), create_graph), expected, **within(**EXACT))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    rows=st.integers(2, 6),
    channels=st.integers(1, 5),
    order=st.randoms(use_true_random=False),
    step_size=st.integers(1, 2),
    training=st.booleans(),
    affine=st.booleans(),
    activation=st.sampled_from(["identity", "relu", "tanh", "gelu"]),
    expanded=st.booleans(),
)
def test_any_shape_and_strides(shape, rows, channels, order, step_size, training, affine, activation, expanded) -> None:
    size = (rows, channels, *shape)
    permutation = list(range(len(size)))
    order.shuffle(permutation)
    generator = seeded(rows)

    def awkward(expand: bool = False) -> Tensor:
        stored = torch.full([size[d] * step_size for d in permutation], float("nan"), dtype=widest())
        view = stored[tuple(slice(None, None, step_size) for _ in permutation)]
        inverse = [permutation.index(d) for d in range(len(size))]
        view = view.permute(inverse)
        view.copy_(torch.randn(size, generator=generator, dtype=widest()))
        return view[:1].expand(size) if expand else view

    x, dy = awkward(), awkward(expanded)
    gamma, beta = (
        (torch.randn(channels, generator=generator).to(widest()) for _ in range(2)) if affine else (None, None)
    )
    mean, var = torch.randn(channels).to(widest()), torch.rand(channels).to(widest()) + 0.1
    results = []
    for ours in (True, False):
        leaf, running = x.detach().requires_grad_(), (mean.clone(), var.clone())
        if ours:
            y = bpF.batch_norm_act(leaf, *running, gamma, beta, training=training, activation=activation)
        else:
            y = bpF.activation(F.batch_norm(leaf, *running, gamma, beta, training), activation)
        results.append((y, *torch.autograd.grad(y, leaf, dy), *running))
    torch.testing.assert_close(*results, **within(1e-8, 1e-8))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_channels_last_gradient_is_right(activation: str | None, training: bool, fused: bool) -> None:
    """Whatever the layouts of x and of the upstream gradient are, which may differ."""
    shape, formats = (3, 4, 5, 2), (torch.contiguous_format, torch.channels_last)
    for x_format, dy_format in itertools.product(formats, formats):
        ours = nn.BatchNormAct2d(4, activation=activation).to(widest()).train(training)
        theirs = torch.nn.BatchNorm2d(4).to(widest()).train(training)
        x = torch.randn(shape).to(widest()).contiguous(memory_format=x_format).requires_grad_()
        dy = torch.randn(shape).to(widest()).contiguous(memory_format=dy_format)
        y, expected = ours(x), bpF.activation(theirs(x), activation or "identity")
        assert y.is_contiguous(memory_format=x_format)
        torch.testing.assert_close(y, expected, **within(**EXACT))
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=not fused)
        torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0], **within(**EXACT))
        if activation is None:
            assert y.stride() == expected.stride()


def test_channels_last_3d_stays() -> None:
    x = torch.randn(2, 3, 4, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    for training in (True, False):
        y = nn.BatchNormAct3d(3, activation="relu").train(training)(x)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_evaluation_gradient_uses_the_running_statistics(activation: str | None) -> None:
    """And not the batch's, which evaluation does not compute."""
    ours = nn.BatchNormAct1d(3, activation=activation).double()
    ours(5 + 3 * torch.randn(20, 3).double())
    ours.eval()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(ours, (x,), check_forward_ad=True)
    assert gradgradcheck(ours, (x,))
    z = (x - ours.running_mean) / (ours.running_var + ours.eps).sqrt() * ours.weight + ours.bias
    expected = torch.autograd.grad(bpF.activation(z, activation or "identity").sum(), (x, ours.weight, ours.bias))
    torch.testing.assert_close(torch.autograd.grad(ours(x).sum(), (x, ours.weight, ours.bias)), expected, **EXACT)


def test_evaluation_gradient_outlives_a_training_step() -> None:
    """The buffers move between forward and backward, as when a critic is evaluated and then trained."""
    bn = nn.BatchNorm1d(3).to(widest()).eval()
    x = torch.randn(4, 3, dtype=widest(), requires_grad=True)
    y = bn(x)
    slope = (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().clone()
    bn.train()(10 * torch.randn(8, 3).to(widest()))
    y.sum().backward()
    torch.testing.assert_close(x.grad, slope.expand(4, 3), **within(**EXACT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["low", "float32", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_dtypes_of_16_bit_inputs_are_torchs(dtype: torch.dtype, parameters: str, training: bool) -> None:
    """And values, gradients and running statistics are as good."""

    def by(module: Any) -> Callable[[Tensor, Tensor], list[Tensor]]:
        def f(x: Tensor, dy: Tensor) -> list[Tensor]:
            bn = module.BatchNorm1d(3, affine=parameters != "none")
            bn = bn.to(dtype if parameters == "low" else torch.float32) if x.dtype == dtype else bn.double()
            *results, batches = torch.utils._pytree.tree_leaves(step(bn.train(training), x, dy))
            assert batches == training
            return results

        return f

    def slack(*given: Tensor) -> list[Tensor | float]:
        """The kernels sum in float32, torch on the CPU in float64. Partial sums of k terms grow as √k, and each is
        rounded: added up one by one, as the interpreter adds, n terms lose u √(n/6) √Σ terms² in the root mean square.
        Three and a half of those are allowed, 2 u √(n/2) √Σ terms².
        """
        in_float32 = [widest() == t.dtype == torch.float32 for t in by(nn)(*given)]
        sums, n = carried(by(torch.nn), given), given[0].numel() / 3
        lost = torch.finfo(torch.float32).eps * math.sqrt(n / 2)
        return [lost * s if is_sum else 0.0 for s, is_sum in zip(sums, in_float32, strict=True)]

    assert_as_good_as_torch(by(nn), by(torch.nn), lambda: torch.randn(2, 8, 3, 4).to(dtype), slack=slack)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_empty_batch_leaves_the_buffers(shape: tuple[int, ...], training: bool, activation: str) -> None:
    results = []
    for f in (bpF.batch_norm, F.batch_norm):
        mean, var, gamma = torch.full((3,), 2.0), torch.full((3,), 3.0), torch.ones(3, requires_grad=True)
        x = torch.zeros(shape, requires_grad=True)
        if f is bpF.batch_norm:
            y = bpF.batch_norm_act(x, mean, var, gamma, None, training=training, activation=activation)
        else:
            y = bpF.activation(f(x, mean, var, gamma, None, training), activation)
        y.sum().backward()
        results.append((y, mean, var, x.grad, gamma.grad))
    torch.testing.assert_close(*results)


def test_wider_residual_widens_the_result() -> None:
    x, r = torch.randn(4, 3).bfloat16().requires_grad_(), torch.randn(4, 3, requires_grad=True)
    ones = torch.ones(3)
    for training in (True, False):
        y = bpF.batch_norm_act(x, ones, ones, None, None, r, training, activation="relu")
        y.sum().backward()
        assert y.dtype == (F.batch_norm(x, ones, ones, training=training) + r).dtype
        assert (x.grad.dtype, r.grad.dtype) == (torch.bfloat16, torch.float32)


def test_saves_the_input_and_never_the_pre_activation() -> None:
    for activation, extra in (("gelu", 0), ("relu", 1)):
        x = torch.randn(64, 32, requires_grad=True)
        large: set[int] = set()

        def pack(t: Tensor, large: set[int] = large) -> Tensor:
            large.update([t.untyped_storage().data_ptr()] if t.numel() == 64 * 32 else [])
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = bpF.batch_norm_act(x, None, None, torch.ones(32), training=True, activation=activation)
        expected = {x.untyped_storage().data_ptr()} | ({y.untyped_storage().data_ptr()} if extra else set())
        assert large == expected


def test_transforms_do_as_torch_with_buffers() -> None:
    """A buffer that is not batched cannot take a batched update; without buffers everything works."""
    x = torch.randn(2, 5, 3)
    for bn in (torch.nn.BatchNorm1d(3), nn.BatchNorm1d(3)):
        with pytest.raises(RuntimeError):
            torch.func.vmap(bn)(x)
    ours, theirs = (cls(3, track_running_stats=False) for cls in (nn.BatchNorm1d, torch.nn.BatchNorm1d))
    torch.testing.assert_close(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))
    gradient = torch.func.grad(lambda x: nn.BatchNorm1d(3).eval()(x).square().sum())(x[0])
    expected = torch.func.grad(lambda x: torch.nn.BatchNorm1d(3).eval()(x).square().sum())(x[0])
    torch.testing.assert_close(gradient, expected)


def test_third_derivative_equals_the_composed_formula() -> None:
    """torch's own batch norm is wrong there (off by tens for these inputs), without saying so."""

    def composed(x: Tensor) -> Tensor:
        x_hat = (x - x.mean(0)) * torch.rsqrt(x.var(0, correction=0) + 1e-3)
        return torch.tanh(x_hat).square()

    def ours(x: Tensor) -> Tensor:
        return bpF.batch_norm_act(x, None, None, training=True, eps=1e-3, activation="tanh").square()

    def third(f: Any) -> Tensor:
        x = torch.randn(6, 3, generator=seeded()).double().requires_grad_()
        g = f(x)
        weights = torch.arange(18, dtype=torch.float64).reshape(6, 3)
        for power in (1, 2, 3):
            (g,) = torch.autograd.grad((g * weights**power / 18**power).sum(), x, create_graph=True)
        return g

    torch.testing.assert_close(third(ours), third(composed), rtol=1e-9, atol=1e-9)


def test_buffers_may_move_between_two_calls_in_a_checkpoint() -> None:
    """Given as arguments: torch's kernels move them without a change that autograd sees."""
    mean, var = torch.zeros(3, dtype=widest()), torch.ones(3, dtype=widest())

    def twice(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = bpF.batch_norm(x, mean, var, training=True)
        return bpF.batch_norm(y * x, mean, var, training=True)

    x = torch.randn(4, 3, dtype=widest(), requires_grad=True)
    (expected,) = torch.autograd.grad(twice(x, mean, var).square().sum(), x)
    before = mean.clone()
    y = checkpoint(twice, x, mean, var, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)
    assert not torch.equal(mean, before)
    assert mean._version == 0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_empty_inputs_that_torch_accepts(shape: tuple[int, ...], training: bool, affine: bool) -> None:
    channels = shape[1] if len(shape) > 1 else 0
    if channels == 0 and affine:
        pytest.skip("torch reads an element of an empty weight")
    found = []
    for form in (bpF.batch_norm, F.batch_norm):
        x = torch.empty(shape, requires_grad=True)
        parameters = [torch.ones(channels, requires_grad=True) for _ in range(2)] if affine else []
        y = form(x, None, None, *parameters, training=training)
        found.append((y, torch.autograd.grad(y.sum(), [x, *parameters])))
    torch.testing.assert_close(found[0], found[1])
