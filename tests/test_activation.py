"""The activation table: f, f′ and f″ against torch and against each other, at kinks, in tails, in every dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import torch_activation, widest
from exact import assert_as_good_as_torch, cancelled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.backends import current_backend
from bp_torch.functions.activation import ACTIVATIONS, Activation, lookup

KEYS = list(ACTIVATIONS)
every_key = pytest.mark.parametrize("key", KEYS)
FUSED = [False, True]
every_row = pytest.mark.parametrize(
    ("key", "fused"), [(key, fused) for key in KEYS for fused in FUSED if not fused or ACTIVATIONS[key].fused]
)
"""Each row, and beside it that of fused layers where there is one."""
FAR = torch.tensor([0.0, -0.0, 1e-30, 20.0, 20.5, 23.0, 88.0, 100.0, 1e4], dtype=torch.float64)


def values(key: str) -> tuple[float, ...]:
    return tuple(ACTIVATIONS[key].parameters.values())


def representable(x: Tensor) -> Tensor:
    """Without bfloat16's subnormal numbers where Triton's interpreter runs: it reads them as 0, which no GPU does."""
    if x.dtype != torch.bfloat16 or current_backend() != "triton":
        return x
    return x[(x == 0) | (x.abs() >= torch.finfo(x.dtype).tiny)]


def derivative(f, x: Tensor, create_graph: bool = False) -> Tensor:
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x, create_graph=create_graph)[0]


def second_derivative(key: str, fused: bool, x: Tensor) -> Tensor:
    """f″(x) from the row: ddf(x), or ddf(y) df(y) where the output is saved."""
    row, p = lookup(key, values(key), fused), values(key)
    if row.saves == "input":
        return row.ddf(x, *p)
    y = row.f(x, *p)
    return row.ddf(y, *p) * row.df(y, *p)


def test_the_table_has_the_keys_that_the_library_promises() -> None:
    promised = """relu leaky_relu elu selu celu gelu gelu_tanh silu mish sigmoid tanh softplus softsign hardtanh relu6
        hardsigmoid hardswish logsigmoid tanhshrink hardshrink softshrink identity sin"""
    assert set(promised.split()) <= set(KEYS)


@every_row
def test_every_row_is_complete(key: str, fused: bool) -> None:
    row = lookup(key, values(key), fused)
    assert isinstance(row, Activation)
    assert row.saves == "output" if fused else row.saves in ("input", "output")
    assert row.formula
    assert row.derivative
    assert row.source


@every_row
def test_gate_rows_have_a_derivative_that_only_asks_whether_the_output_is_zero(key: str, fused: bool) -> None:
    row, p = lookup(key, values(key), fused), values(key)
    if row.gate:
        assert row.saves == "output"
        y = row.f(torch.linspace(-5, 5, 101), *p)
        torch.testing.assert_close(row.df(y, *p), (y != 0).float())
        torch.testing.assert_close(row.df(y * 3.7, *p), row.df(y, *p))


@every_row
def test_second_derivative_is_the_derivative_of_the_first(key: str, fused: bool) -> None:
    """f″ of the table against a central difference of torch's f′ in float64."""
    x = torch.linspace(-6, 6, 241, dtype=torch.float64) + 0.0137
    h = 1e-5
    f = torch_activation(key)

    def slope(t: Tensor) -> Tensor:
        return derivative(lambda u: f(u, *values(key)), t)

    expected = (slope(x + h) - slope(x - h)) / (2 * h)
    torch.testing.assert_close(second_derivative(key, fused, x), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.one_backend("torch", "float64 is the formulas' alone")
@every_row
def test_formulas_keep_float64(key: str, fused: bool) -> None:
    """A constant that went through float32 would be off by 1e-8."""
    x = torch.linspace(-6, 6, 101, dtype=torch.float64) + 0.0137
    formula = derivative(lambda t: bpF.activation(t, key), x.requires_grad_(), create_graph=True).detach()
    row, p = lookup(key, values(key), fused), values(key)
    exact = derivative(lambda t: torch_activation(key)(t, *p), x.detach())
    torch.testing.assert_close(formula, exact, rtol=1e-12, atol=1e-13)
    s = x.detach() if row.saves == "input" else row.f(x.detach(), *p)
    torch.testing.assert_close(row.df(s, *p) * torch.ones_like(x), exact, rtol=1e-12, atol=1e-13)
    assert row.ddf(s, *p).dtype == torch.float64


@every_key
def test_kinks_are_torchs(key: str) -> None:
    row, p = ACTIVATIONS[key], values(key)
    if not row.kinks(*p):
        pytest.skip("smooth")
    f = row.operator or row.f
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor(row.kinks(*p), dtype=dtype)
        x = representable(torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)]))
        torch.testing.assert_close(bpF.activation(x, key), f(x, *p), rtol=0, atol=0)
        ours = derivative(lambda t: bpF.activation(t, key), x)
        torch.testing.assert_close(ours, derivative(lambda t, f=f: f(t, *p), x))
        formula = derivative(lambda t: bpF.activation(t, key), x.requires_grad_(), create_graph=True)
        torch.testing.assert_close(formula, ours)


@pytest.mark.one_backend("torch", "what the table says of itself")
@every_key
def test_kinks_are_where_the_derivatives_jump(key: str) -> None:
    """f′ or f″ at each, f′ nowhere else: gradcheck and the cases keep away from the points that a row names."""
    row = ACTIVATIONS[key]
    f, h, p = row.operator or row.f, 1e-6, values(key)
    for kink in row.kinks(*p):
        near = derivative(lambda t: f(t, *p), kink + h * torch.tensor([-2.0, -1, 1, 2], dtype=torch.float64))
        left, right = ((near[1::2] - near[::2]) / h).tolist()  # f″
        largest = max(abs(left), abs(right))
        assert (near[2] - near[1]).abs() > 1e-3 or (largest > 1e-9 and abs(right - left) > largest / 2), kink
    for p in (values(key), *row.examples):
        x = torch.linspace(-8, 8, 1601, dtype=torch.float64) + 0.0037
        slopes = derivative(lambda t, p=p: f(t, *p), x)
        jumps = x[:-1][slopes.diff().abs() > 0.1 * max([1.0, *map(abs, p)]) * slopes[1:].abs().clamp(min=1)].tolist()
        assert all(any(start <= kink <= start + 0.01 for kink in row.kinks(*p)) for start in jumps), (p, jumps)


@every_key
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tails_do_not_overflow(key: str, dtype: torch.dtype) -> None:
    x = torch.cat([FAR, -FAR]).to(dtype).requires_grad_()
    y = bpF.activation(x, key)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(first).all()
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        assert torch.isfinite(second).all()
        if second.requires_grad:
            assert torch.isfinite(torch.autograd.grad(second.sum(), x)[0]).all()
    expected = torch_activation(key)(x, *values(key))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(first, derivative(lambda t: torch_activation(key)(t, *values(key)), x.detach()))


@every_key
def test_nan_stays_nan(key: str) -> None:
    assert bpF.activation(torch.tensor([float("nan")]), key).isnan().all()


def test_logsigmoid_of_minus_100_is_minus_100() -> None:
    x = torch.tensor(-100.0, requires_grad=True)
    y = bpF.logsigmoid(x)
    y.backward()
    assert y.item() == -100
    assert x.grad == 1


def test_softplus_of_100_is_100() -> None:
    x = torch.tensor(100.0, requires_grad=True)
    y = bpF.softplus(x)
    y.backward()
    assert y.item() == 100
    assert x.grad == 1


@pytest.mark.parametrize("at", [23.0, 50.0, 100.0, 1000.0])
def test_derivative_of_mish_is_one_far_right(at: float) -> None:
    assert derivative(bpF.mish, torch.tensor([at])).item() == 1


def test_relu_passes_nan_and_has_derivative_zero_at_zero() -> None:
    assert bpF.relu(torch.tensor(float("nan"))).isnan()
    assert derivative(bpF.relu, torch.tensor([0.0])).item() == 0
    x = torch.zeros(1, requires_grad=True)
    assert derivative(bpF.relu, x, create_graph=True).item() == 0


def test_derivative_of_elu_keeps_its_precision_near_saturation() -> None:
    """f′ from the output, y + α, would be off by up to 40 % in bfloat16; e^x from the input is not."""
    x = torch.tensor([-5.0], dtype=torch.bfloat16)
    got = derivative(bpF.elu, x).item()
    assert got == pytest.approx(math.exp(-5), rel=2**-8)


def test_hardtanh_bound_that_bfloat16_cannot_hold() -> None:
    """y = bfloat16(-0.7) does not compare equal to -0.7."""
    x = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.bfloat16)
    got = derivative(lambda t: bpF.hardtanh(t, -0.7, 0.3), x)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0, 0.0], dtype=torch.bfloat16))


@every_key
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_over_all_16_bit_inputs_is_at_most_twice_torchs(key: str, dtype: torch.dtype) -> None:
    """Of f′ at every finite input with |x| ≤ 30, against float64."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = representable(x[x.isfinite() & (x.abs() <= 30)])
    f = torch_activation(key)
    assert_as_good_as_torch(
        lambda x: derivative(lambda t: bpF.activation(t, key), x),
        lambda x: derivative(lambda t: f(t, *values(key)), x),
        lambda: [x],
        slack=lambda x: [cancelled(key, x)],
    )


@settings(max_examples=25)
@given(key=st.sampled_from(KEYS), shape=st.lists(st.integers(0, 5), max_size=4), flip=st.booleans())
def test_any_shape_and_stride(key: str, shape: list[int], flip: bool) -> None:
    x = torch.randn(shape, dtype=widest())
    x = x.permute(tuple(reversed(range(x.dim())))) if flip else x
    f = torch_activation(key)
    torch.testing.assert_close(bpF.activation(x, key), f(x, *values(key)))
    if x.numel():
        torch.testing.assert_close(
            derivative(lambda t: bpF.activation(t, key), x), derivative(lambda t: f(t, *values(key)), x)
        )


@pytest.mark.parametrize("name", [key for key, row in ACTIVATIONS.items() if "inplace" in row.arguments])
def test_inplace_overwrites_its_input_as_torch_does(name: str) -> None:
    x = torch.randn(5, requires_grad=True)
    ours = x * 1
    result = getattr(bpF, name)(ours, inplace=True)
    assert result is ours
    torch.testing.assert_close(result, getattr(F, name)(x))
    with pytest.raises(RuntimeError, match="in-place"):
        getattr(bpF, name)(x, inplace=True)


def test_memory_format_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = bpF.gelu(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_unknown_name_and_parameter_are_named() -> None:
    with pytest.raises(ValueError, match=r"'activation': expected one of .*relu.*, got 'rleu'"):
        bpF.activation(torch.ones(1), "rleu")
    with pytest.raises(ValueError, match="'activation_parameters': leaky_relu takes negative_slope, got 'slope'"):
        bpF.activation(torch.ones(1), "leaky_relu", {"slope": 0.2})
    with pytest.raises(TypeError, match="'input': expected a Tensor, got float"):
        bpF.relu(1.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="'approximate'"):
        bpF.gelu(torch.ones(1), approximate="fast")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: bpF.softshrink(x, -1.0), lambda x: F.softshrink(x, -1.0)),
        (lambda x: bpF.hardtanh(x, 2.0, 1.0), lambda x: F.hardtanh(x, 2.0, 1.0)),
        (lambda x: bpF.celu(x, 0.0), lambda x: F.celu(x, 0.0)),
        (lambda x: bpF.gelu(x.long()), lambda x: F.gelu(x.long())),
    ],
)
def test_what_torch_refuses_is_refused(ours, theirs) -> None:
    x = torch.randn(3)
    try:
        theirs(x)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(x)
    else:
        pytest.fail("torch accepts this")


@pytest.mark.parametrize(
    ("key", "parameters", "error"),
    [
        ("softshrink", {"lambd": -1.0}, RuntimeError),
        ("hardtanh", {"min_val": 2.0, "max_val": 1.0}, ValueError),
        ("softshrink", {"lambd": math.nan}, RuntimeError),
        ("celu", {"alpha": 0.0}, RuntimeError),
        ("elu", {"alpha": "0.5"}, TypeError),
        ("leaky_relu", {"negative_slope": [0.5]}, TypeError),
        ("softplus", {"beta": 1j}, RuntimeError),
    ],
)
def test_fused_activations_refuse_the_same_parameters(key: str, parameters: dict[str, Any], error: type) -> None:
    x, options = torch.randn(2, 3), {"activation": key, "activation_parameters": parameters}
    for call in (
        lambda: bpF.activation(x, key, parameters),
        lambda: bpF.dense(x, torch.ones(4, 3), **options),
        lambda: bpF.residual(x, x, **options),
        lambda: nn.BatchNormAct1d(3, **options)(x),
    ):
        with pytest.raises(error, match=r"expected .*, got"):
            call()


def test_one_graph_for_any_size_holds_every_activation() -> None:
    """Parameters and constants stay numbers where shapes are symbolic."""

    def all_of_them(x: Tensor) -> Tensor:
        return torch.stack([bpF.activation(x, key) for key in KEYS])

    torch._dynamo.reset()
    compiled = torch.compile(all_of_them, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 7):
        x = torch.randn(size, requires_grad=True)
        torch.testing.assert_close(compiled(x), all_of_them(x))
        torch.testing.assert_close(derivative(compiled, x), derivative(all_of_them, x))


def test_sin_module() -> None:
    assert repr(nn.Sin()) == "Sin()"
    torch.testing.assert_close(nn.Sin()(torch.ones(2)), torch.sin(torch.ones(2)))


with_operator = pytest.mark.parametrize("key", [key for key in KEYS if ACTIVATIONS[key].operator is not None])
SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0]


@with_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_and_gradient_at_special_points_are_torchs(key: str, dtype: torch.dtype) -> None:
    """At infinities, NaN, ±0, the largest, smallest and denormal numbers and the kinks.

    One at a time: ATen's vectorized loops on the CPU treat NaN otherwise than the rest of the same tensor and CUDA.
    """
    limits, p = torch.finfo(dtype), values(key)
    f = ACTIVATIONS[key].operator
    points = [*SPECIAL, *ACTIVATIONS[key].kinks(*p)]
    points += [sign * v for sign in (1, -1) for v in (limits.max, limits.tiny, limits.smallest_normal / 4)]
    x = torch.tensor(points, dtype=dtype)
    x = torch.cat([x[~x.isfinite()], representable(x[x.isfinite()])])
    for value in x.unbind():
        for dy in (1.0, -2.0):
            found = []
            for form in (lambda t: bpF.activation(t, key), lambda t: f(t, *p)):
                t = value.reshape(1).clone().requires_grad_()
                y = form(t)
                found.append((y.detach(), *torch.autograd.grad(y, t, torch.full_like(y, dy))))
            ours, theirs = found
            if key.startswith("gelu") and value > 1e30 and current_backend() == "triton":
                continue  # ATen's kernel on the CPU overflows there, and its CUDA kernel does not
            torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda m, v=value: f"at {v.item()}: {m}")
            row = lookup(key, p)  # the formula, that compilers and transforms take
            s = value.reshape(1) if row.saves == "input" else theirs[0]
            wide = s.float() if dtype.itemsize < 4 else s
            formula = row.pull(torch.full_like(wide, dy), wide, *p).to(dtype)
            torch.testing.assert_close(formula, theirs[1], equal_nan=True)


@with_operator
@pytest.mark.parametrize("dy", [math.inf, math.nan])
def test_where_the_slope_is_zero_it_selects_or_multiplies_as_torch_does(key: str, dy: float) -> None:
    """relu sends Inf and NaN from above to 0, tanh far out to NaN."""
    row, p = ACTIVATIONS[key], values(key)
    f = row.operator
    x = torch.tensor([-1e4, -200.0, -3.0, -0.4, 0.0, 0.4, 3.0, 6.0, 200.0, 1e4])
    x = x[derivative(lambda t: f(t, *p), x) == 0].requires_grad_()

    def pulled(form) -> Tensor:
        return torch.autograd.grad(form(x), x, torch.full_like(x, dy))[0]

    theirs = pulled(lambda t: f(t, *p))
    torch.testing.assert_close(pulled(lambda t: bpF.activation(t, key)), theirs, equal_nan=True)
    assert (theirs == 0).all() if row.selects else theirs.isnan().all()
    assert row.fused is None or row.fused.selects == row.selects
    s = x.detach() if row.saves == "input" else f(x.detach(), *p)
    torch.testing.assert_close(row.pull(torch.full_like(s, dy), s, *p), theirs, equal_nan=True)


@pytest.mark.one_backend("torch", "compilers take the formulas")
def test_a_compiled_slope_of_zero_selects_too() -> None:
    keys = [key for key, row in ACTIVATIONS.items() if row.selects]
    x = torch.tensor([-200.0, -0.3, 0.0, 0.3, 200.0], requires_grad=True)

    def stacked(forms) -> Tensor:
        return torch.stack([form(x) for form in forms])

    compiled = torch.compile(
        lambda: stacked([lambda t, key=key: bpF.activation(t, key) for key in keys]),
        backend="aot_eager",
        fullgraph=True,
    )()
    theirs = stacked([lambda t, key=key: ACTIVATIONS[key].operator(t, *values(key)) for key in keys])
    for dy in torch.eye(len(keys)).unbind():
        dys = torch.where(dy == 1, math.inf, 0.0)[:, None].expand_as(theirs)
        ours, expected = (torch.autograd.grad(y, x, dys, retain_graph=True)[0] for y in (compiled, theirs))
        torch.testing.assert_close(ours, expected)
