"""The activation table: f, f′, f″ and all else that is particular to an activation.

A row says what its derivative is computed from, ``saves``: the input x or the output y, whichever torch keeps, so that
the other may be changed in place as there. ``df`` is f′ as a function of the saved tensor s, and ``ddf`` is the
derivative of ``df`` with respect to that same s, so that f″(x) = ddf(x) if s = x, and f″(x) = ddf(y) · df(y) if s = y.

A layer that is fused with its activation would have to keep x for it alone, while the next layer keeps y anyway. It
takes the row ``fused``, which saves y where that loses no accuracy. elu, selu, celu and softsign have none although y
determines f′: near saturation f′ = y + α (or (1 - |y|)²) is a difference of nearly equal numbers, and in bfloat16 it is
off by up to 40 %.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mode import is_plain
from .activation_row import Activation, Requirement

__all__ = ["ACTIVATIONS", "Activation", "lookup"]

aten = torch.ops.aten


# gelu's constants stand in the code as numbers: under ``dynamic=True`` Dynamo takes a module's float for an input, and
# fails when a second Function's backward uses it.


def _gelu_tanh_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(u) and du/dx, with u = √(2/π) (x + 0.044715 x³): Hendrycks & Gimpel 2016, arXiv:1606.08415."""
    a = 0.7978845608028654  # √(2/π)
    return torch.tanh(a * (x + 0.044715 * x**3)), a * (1 + 3 * 0.044715 * x**2)


def _gelu_tanh_df(x: Tensor) -> Tensor:
    t, du = _gelu_tanh_parts(x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du


def _gelu_tanh_ddf(x: Tensor) -> Tensor:
    t, du = _gelu_tanh_parts(x)
    d2u = 0.7978845608028654 * 6 * 0.044715 * x
    return (1 - t**2) * (du + 0.5 * x * (d2u - 2 * t * du**2))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / 1.4142135623730951)


def _normal_pdf(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x**2) / 2.5066282746310002


def _silu_df(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_ddf(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _mish_df(x: Tensor) -> Tensor:
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    return t + x * s * (1 - t**2)


def _mish_ddf(x: Tensor) -> Tensor:
    t, s = torch.tanh(F.softplus(x)), torch.sigmoid(x)
    return s * (1 - t**2) * (2 + x * (1 - s) - 2 * x * s * t)


def _exp_left(x: Tensor) -> Tensor:
    """eˣ for x ≤ 0, and 1 to the right, where it is not used and must not overflow."""
    return torch.exp(x.clamp(max=0))


def _selu_constants() -> tuple[float, float]:
    """α and λ. Numbers in the code, because Dynamo takes a module's floats for inputs of a dynamic graph."""
    return 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _selu_df(x: Tensor) -> Tensor:
    alpha, scale = _selu_constants()
    return torch.where(x <= 0, scale * alpha * _exp_left(x), scale)


def _selu_ddf(x: Tensor) -> Tensor:
    alpha, scale = _selu_constants()
    return torch.where(x <= 0, scale * alpha * _exp_left(x), 0.0)


def _selu_backward(dy: Tensor, x: Tensor) -> Tensor:
    alpha, scale = _selu_constants()
    return aten.elu_backward.default(dy, alpha, scale, 1, False, x)


def _softplus_df(x: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(beta * x))


def _softplus_ddf(x: Tensor, beta: float, threshold: float) -> Tensor:
    s = torch.sigmoid(beta * x)
    return torch.where(x * beta > threshold, 0.0, beta * s * (1 - s))


def _softplus_df_output(y: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(y * beta > threshold, 1.0, -torch.expm1(-beta * y))


def _softplus_ddf_output(y: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(y * beta > threshold, 0.0, beta * torch.exp(-beta * y))


def _softsign_df(x: Tensor) -> Tensor:
    """1/(1 + |x|)², and NaN at an infinity, as torch has it: there the factor (1 + |x|)/(1 + |x|) is no 1."""
    c = 1 + x.abs()
    d = 1 / c
    return d * d * (c * d)


def _logsigmoid_df(x: Tensor) -> Tensor:
    return torch.sigmoid(-x)


def _logsigmoid_ddf(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return -s * (1 - s)


def _hardsigmoid(x: Tensor) -> Tensor:
    """torch's operator has no second derivative in forward mode, which nested transforms ask for."""
    return F.hardsigmoid(x) if is_plain(x) or torch.compiler.is_exporting() else F.relu6(x + 3) / 6


def _hardsigmoid_backward(dy: Tensor, x: Tensor) -> Tensor:
    """ATen's kernel holds 1/6 in float32, whatever the dtype."""
    if dy.dtype == torch.float64:
        return torch.where((x > -3) & (x < 3), dy / 6, 0.0)
    return aten.hardsigmoid_backward.default(dy, x)


def _hardswish_df(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0))


def _hardswish_ddf(x: Tensor) -> Tensor:
    return ((x > -3) & (x < 3)).to(x.dtype) / 3


def _leaky_relu_df(s: Tensor, slope: float) -> Tensor:
    return torch.where(s > 0, torch.ones_like(s), slope)


def _clipped(s: Tensor, low: float, high: float) -> Tensor:
    return 1 - ((s <= low) | (s >= high)).to(s.dtype)


def _exact_in_16_bits(value: float) -> bool:
    """Multiples of 1/16 up to 8 have 8 significant bits: bfloat16 and float16 hold them exactly."""
    return -8 <= value <= 8 and (16 * value) % 1 == 0


def _hardtanh_backward(dy: Tensor, s: Tensor, low: float, high: float) -> Tensor:
    return aten.hardtanh_backward.default(dy, s, low, high)


def _outside(x: Tensor, lambd: float) -> Tensor:
    return 1 - ((x >= -lambd) & (x <= lambd)).to(x.dtype)


def _zero(s: Tensor, *parameters: float) -> Tensor:
    return torch.zeros_like(s)


def _nonzero(y: Tensor, *parameters: float) -> Tensor:
    return (y != 0).to(y.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        operator=Tensor.clone,
        f=lambda x: x.clone(), df=torch.ones_like, ddf=_zero, saves="input",
        formula="x", derivative="1", source="torch.nn.Identity",
    ),
    "relu": Activation(
        module="ReLU", operator=F.relu, selects=True,
        f=torch.relu, df=lambda y: 1 - (y <= 0).to(y.dtype), ddf=_zero, saves="output",
        formula="max(x, 0)", derivative="1 if x > 0 else 0", source="torch.nn.ReLU",
        kinks=lambda: (0.0,), gate=True,
        native=lambda dy, y: aten.threshold_backward.default(dy, y, 0),
    ),
    "leaky_relu": Activation(
        module="LeakyReLU", operator=F.leaky_relu, examples=((-0.3,),),
        f=F.leaky_relu, df=_leaky_relu_df, ddf=_zero, saves="input",
        formula="x if x > 0 else a x", derivative="1 if x > 0 else a", source="torch.nn.LeakyReLU",
        parameters={"negative_slope": 0.01}, kinks=lambda slope: (0.0,),
        native=lambda dy, x, slope: aten.leaky_relu_backward.default(dy, x, slope, False),
        unless=lambda slope: slope < 0,
        fused=Activation(
            f=F.leaky_relu, df=_leaky_relu_df, ddf=_zero, saves="output",
            formula="x if x > 0 else a x", derivative="1 if y > 0 else a", source="torch.nn.LeakyReLU",
            native=lambda dy, y, slope: aten.leaky_relu_backward.default(dy, y, slope, True),
        ),
    ),
    "elu": Activation(
        module="ELU", operator=F.elu, examples=((1.7,), (-0.4,)),
        f=F.elu,
        df=lambda x, alpha: torch.where(x <= 0, alpha * _exp_left(x), 1.0),
        ddf=lambda x, alpha: torch.where(x <= 0, alpha * _exp_left(x), 0.0),
        saves="input",
        formula="x if x > 0 else α (eˣ - 1)", derivative="1 if x > 0 else α eˣ", source="torch.nn.ELU",
        parameters={"alpha": 1.0}, kinks=lambda alpha: (0.0,),
        native=lambda dy, x, alpha: aten.elu_backward.default(dy, alpha, 1, 1, False, x),
    ),
    "selu": Activation(
        module="SELU", operator=F.selu,
        f=F.selu,
        df=_selu_df,
        ddf=_selu_ddf,
        saves="input",
        formula="λ x if x > 0 else λ α (eˣ - 1)", derivative="λ if x > 0 else λ α eˣ",
        source="torch.nn.SELU; arXiv:1706.02515",
        kinks=lambda: (0.0,),
        native=_selu_backward,
    ),
    "celu": Activation(
        module="CELU", operator=F.celu, examples=((0.6,), (-0.5,)),
        requires=(Requirement("alpha", "a number other than 0", lambda alpha: alpha != 0, RuntimeError),),
        f=F.celu,
        df=lambda x, alpha: torch.where(x <= 0, torch.exp(x.clamp(max=0) / alpha), 1.0),
        ddf=lambda x, alpha: torch.where(x <= 0, torch.exp(x.clamp(max=0) / alpha) / alpha, 0.0),
        saves="input",
        formula="x if x > 0 else α (exp(x/α) - 1)", derivative="1 if x > 0 else exp(x/α)", source="torch.nn.CELU",
        parameters={"alpha": 1.0}, kinks=lambda alpha: (0.0,),
        native=lambda dy, x, alpha: aten.elu_backward.default(dy, alpha, 1, 1 / alpha, False, x),
    ),
    "gelu": Activation(
        module="GELU", operator=F.gelu, choice=("approximate", {"none": "gelu", "tanh": "gelu_tanh"}),
        f=F.gelu,
        df=lambda x: _normal_cdf(x) + x * _normal_pdf(x),
        ddf=lambda x: _normal_pdf(x) * (2 - x**2),
        saves="input",
        formula="x Φ(x)", derivative="Φ(x) + x φ(x)", source="torch.nn.GELU; arXiv:1606.08415",
        native=lambda dy, x: aten.gelu_backward.default(dy, x),
    ),
    "gelu_tanh": Activation(
        operator=partial(F.gelu, approximate="tanh"),
        f=lambda x: F.gelu(x, approximate="tanh"), df=_gelu_tanh_df, ddf=_gelu_tanh_ddf, saves="input",
        formula="x/2 (1 + tanh(u)), u = √(2/π) (x + 0.044715 x³)",
        derivative="(1 + tanh(u))/2 + x/2 (1 - tanh(u)²) u′, u′ = √(2/π) (1 + 0.134145 x²)",
        source="torch.nn.GELU; arXiv:1606.08415",
        native=lambda dy, x: aten.gelu_backward.default(dy, x, approximate="tanh"),
    ),
    "silu": Activation(
        module="SiLU", operator=F.silu,
        f=F.silu, df=_silu_df, ddf=_silu_ddf, saves="input",
        formula="x σ(x)", derivative="σ(x) (1 + x (1 - σ(x)))", source="torch.nn.SiLU",
        native=lambda dy, x: aten.silu_backward.default(dy, x),
    ),
    "mish": Activation(
        module="Mish", operator=F.mish,
        f=F.mish, df=_mish_df, ddf=_mish_ddf, saves="input",
        formula="x t, t = tanh(softplus(x))", derivative="t + x σ(x) (1 - t²)",
        source="torch.nn.Mish; arXiv:1908.08681",
        native=lambda dy, x: aten.mish_backward.default(dy, x),
    ),
    "sigmoid": Activation(
        module="Sigmoid", operator=torch.sigmoid,
        f=torch.sigmoid, df=lambda y: y * (1 - y), ddf=lambda y: 1 - 2 * y, saves="output",
        formula="1/(1 + e⁻ˣ)", derivative="y (1 - y)", source="torch.nn.Sigmoid",
        native=lambda dy, y: aten.sigmoid_backward.default(dy, y),
    ),
    "tanh": Activation(
        module="Tanh", operator=torch.tanh,
        f=torch.tanh, df=lambda y: 1 - y * y, ddf=lambda y: -2 * y, saves="output",
        formula="tanh(x)", derivative="1 - y²", source="torch.nn.Tanh",
        native=lambda dy, y: aten.tanh_backward.default(dy, y),
    ),
    "softplus": Activation(
        module="Softplus", operator=F.softplus, float32=True, examples=((2.0, 30.0), (1.5, 1.0)),
        f=F.softplus, df=_softplus_df, ddf=_softplus_ddf, saves="input",
        formula="x if β x > threshold else log(1 + exp(β x))/β",
        derivative="1 if β x > threshold else σ(β x)", source="torch.nn.Softplus",
        parameters={"beta": 1.0, "threshold": 20.0},
        kinks=lambda beta, threshold: (threshold / beta,),
        native=lambda dy, x, beta, threshold: aten.softplus_backward.default(dy, x, beta, threshold),
        # Where log(1 + e^t) and t differ visibly at t = threshold, an output there belongs to two inputs.
        unless=lambda beta, threshold: threshold < 20,
        fused=Activation(
            f=F.softplus, df=_softplus_df_output, ddf=_softplus_ddf_output, saves="output",
            formula="x if β x > threshold else log(1 + exp(β x))/β",
            derivative="1 if β y > threshold else 1 - exp(-β y)", source="torch.nn.Softplus",
        ),
    ),
    "softsign": Activation(
        module="Softsign", operator=F.softsign,
        f=F.softsign,
        df=_softsign_df,
        ddf=lambda x: -2 * torch.sign(x) / (1 + x.abs()) ** 3,
        saves="input",
        formula="x/(1 + |x|)", derivative="1/(1 + |x|)²", source="torch.nn.Softsign",
    ),
    "hardtanh": Activation(
        module="Hardtanh", operator=F.hardtanh, selects=True, examples=((-0.7, 0.3),),
        requires=(
            Requirement("min_val", "at most 'max_val', {max_val}", lambda low, high: not low > high, ValueError),
        ),
        f=F.hardtanh, df=_clipped, ddf=_zero, saves="input",
        formula="min(max(x, low), high)", derivative="1 if low < x < high else 0", source="torch.nn.Hardtanh",
        parameters={"min_val": -1.0, "max_val": 1.0}, kinks=lambda low, high: (low, high),
        native=_hardtanh_backward,
        # A bound that is rounded in y no longer compares equal to itself.
        unless=lambda low, high: not (_exact_in_16_bits(low) and _exact_in_16_bits(high)),
        fused=Activation(
            f=F.hardtanh, df=_clipped, ddf=_zero, saves="output",
            formula="min(max(x, low), high)", derivative="1 if low < y < high else 0", source="torch.nn.Hardtanh",
            selects=True, native=_hardtanh_backward,
        ),
    ),
    "relu6": Activation(
        module="ReLU6", operator=F.relu6, selects=True,
        f=F.relu6, df=lambda x: _clipped(x, 0.0, 6.0), ddf=_zero, saves="input",
        formula="min(max(x, 0), 6)", derivative="1 if 0 < x < 6 else 0", source="torch.nn.ReLU6",
        kinks=lambda: (0.0, 6.0),
        native=lambda dy, x: _hardtanh_backward(dy, x, 0.0, 6.0),
        fused=Activation(
            f=F.relu6, df=lambda y: _clipped(y, 0.0, 6.0), ddf=_zero, saves="output",
            formula="min(max(x, 0), 6)", derivative="1 if 0 < y < 6 else 0", source="torch.nn.ReLU6", selects=True,
            native=lambda dy, y: _hardtanh_backward(dy, y, 0.0, 6.0),
        ),
    ),
    "hardsigmoid": Activation(
        module="Hardsigmoid", operator=F.hardsigmoid, selects=True,
        f=_hardsigmoid,
        df=lambda x: ((x > -3) & (x < 3)).to(x.dtype) / 6,
        ddf=_zero, saves="input",
        formula="min(max(x + 3, 0), 6)/6", derivative="1/6 if -3 < x < 3 else 0", source="torch.nn.Hardsigmoid",
        kinks=lambda: (-3.0, 3.0),
        native=_hardsigmoid_backward,
    ),
    "hardswish": Activation(
        module="Hardswish", operator=F.hardswish, selects=True,
        f=F.hardswish, df=_hardswish_df, ddf=_hardswish_ddf, saves="input",
        formula="x min(max(x + 3, 0), 6)/6", derivative="0 if x ≤ -3 else 1 if x ≥ 3 else x/3 + 1/2",
        source="torch.nn.Hardswish", kinks=lambda: (-3.0, 3.0),
        native=lambda dy, x: aten.hardswish_backward.default(dy, x),
    ),
    "logsigmoid": Activation(
        module="LogSigmoid", operator=F.logsigmoid,
        f=F.logsigmoid, df=_logsigmoid_df, ddf=_logsigmoid_ddf, saves="input",
        formula="log(σ(x))", derivative="σ(-x)", source="torch.nn.LogSigmoid",
        fused=Activation(
            f=F.logsigmoid, df=lambda y: -torch.expm1(y), ddf=lambda y: -torch.exp(y), saves="output",
            formula="log(σ(x))", derivative="1 - eʸ", source="torch.nn.LogSigmoid",
        ),
    ),
    "tanhshrink": Activation(
        module="Tanhshrink", operator=F.tanhshrink,
        f=F.tanhshrink,
        df=lambda x: torch.tanh(x) ** 2,
        ddf=lambda x: 2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2),
        saves="input",
        formula="x - tanh(x)", derivative="tanh(x)²", source="torch.nn.Tanhshrink",
    ),
    "hardshrink": Activation(
        module="Hardshrink", operator=F.hardshrink, selects=True, examples=((0.9,), (-0.2,)),
        f=F.hardshrink, df=_outside, ddf=_zero, saves="input",
        formula="x if |x| > λ else 0", derivative="1 if |x| > λ else 0", source="torch.nn.Hardshrink",
        parameters={"lambd": 0.5}, kinks=lambda lambd: (-lambd, lambd),
        native=lambda dy, x, lambd: aten.hardshrink_backward.default(dy, x, lambd),
        unless=lambda lambd: lambd < 0,  # then y = x
        fused=Activation(
            f=F.hardshrink, df=_nonzero, ddf=_zero, saves="output",
            formula="x if |x| > λ else 0", derivative="1 if y ≠ 0 else 0", source="torch.nn.Hardshrink",
            gate=True, selects=True,
            native=lambda dy, y, lambd: aten.hardshrink_backward.default(dy, y, 0.0),
        ),
    ),
    "softshrink": Activation(
        module="Softshrink", operator=F.softshrink, selects=True, examples=((0.2,),),
        requires=(Requirement("lambd", "a number ≥ 0", lambda lambd: lambd >= 0, RuntimeError),),
        f=F.softshrink, df=_outside, ddf=_zero, saves="input",
        formula="sign(x) max(|x| - λ, 0)", derivative="1 if |x| > λ else 0", source="torch.nn.Softshrink",
        parameters={"lambd": 0.5}, kinks=lambda lambd: (-lambd, lambd),
        native=lambda dy, x, lambd: aten.softshrink_backward.default(dy, x, lambd),
        fused=Activation(
            f=F.softshrink, df=_nonzero, ddf=_zero, saves="output",
            formula="sign(x) max(|x| - λ, 0)", derivative="1 if y ≠ 0 else 0", source="torch.nn.Softshrink",
            gate=True, selects=True,
            native=lambda dy, y, lambd: aten.hardshrink_backward.default(dy, y, 0.0),
        ),
    ),
    "sin": Activation(
        module="Sin", operator=torch.sin,
        f=torch.sin, df=torch.cos, ddf=lambda x: -torch.sin(x), saves="input",
        formula="sin(x)", derivative="cos(x)", source="Sitzmann et al. 2020, arXiv:2006.09661",
    ),
}  # fmt: skip


def lookup(name: str, parameters: tuple[float, ...] = (), fused: bool = False) -> Activation:
    """The row of ``name``, or where a ``fused`` layer asks, the one that serves it with these ``parameters``."""
    row = ACTIVATIONS[name]
    return row.fused if fused and row.fused is not None and not row.unless(*parameters) else row
