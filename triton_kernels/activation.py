"""The activation table on the GPU: the same keys, f, f′, dy · f′ and the derivative of f′, values in and values out.

The formulas are those of ``bp_torch.functions.activation_table``, in float32. Each function gets the key as a
compile-time constant and the row's parameters as numbers (0 where a row has fewer). ``OUTPUT`` tells ``derivative`` and
``curvature`` whether the saved value s is the output y or the input x, as the row's ``saves`` says.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .arithmetic import exp, fma

__all__ = ["KEYS", "curvature", "derivative", "forward", "pull"]

KEYS = (
    "identity", "relu", "leaky_relu", "elu", "selu", "celu", "gelu", "gelu_tanh", "silu", "mish", "sigmoid", "tanh",
    "softplus", "softsign", "hardtanh", "relu6", "hardsigmoid", "hardswish", "logsigmoid", "tanhshrink", "hardshrink",
    "softshrink", "sin",
)  # fmt: skip

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
PDF_SCALE = tl.constexpr(1 / math.sqrt(2 * math.pi))
GELU_A = tl.constexpr(math.sqrt(2 / math.pi))
GELU_B = tl.constexpr(0.044715)
SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)
SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)


@triton.jit
def tanh(x):
    """Near 0 by a polynomial (Cephes, tanhf), where 1 - 2t/(1 + t) with t = e^-2|x| would lose digits."""
    a = tl.abs(x)
    t = exp(-2 * a)
    q = x * x
    p = (((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q + 1.33314422036e-1) * q
    y = tl.where(a < 0.625, a + a * q * (p - 3.33332819422e-1), 1 - tl.div_rn(2 * t, 1 + t))
    return tl.where(x < 0, -y, y)


@triton.jit
def expm1(x):
    """e^x - 1 to 1.6 units of the last place, where the difference of e^x and 1 would lose digits.

    With n = round(x / ln 2) and r = x - n ln 2, so that |r| ≤ 0.35: 2^n (e^r - 1) + (2^n - 1), e^r - 1 by its series.
    Next to overflow n is 127, and r up to 0.7.
    """
    t = tl.where(x < -30, -30.0, x)
    n = tl.floor(tl.minimum(t, 88.3) * 1.4426950408889634 + 0.5)
    r = fma(n, 1.904654299957768e-09, fma(n, -0.693147182464599609375, t))
    p = 1 + r * (1 / 6) * (1 + r * (1 / 7) * (1 + r * (1 / 8)))
    p = 1 + r * (1 / 3) * (1 + r * (1 / 4) * (1 + r * (1 / 5) * p))
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n, exactly
    y = fma(fma(0.5 * r * r, p, r), power, power - 1)
    return tl.where(x > 88.72, x * 3e38, tl.where(x == 0, x, y))


@triton.jit
def log1p_unit(u):
    """log(1 + u) for 0 ≤ u ≤ 1: 2 artanh(s) = 2s + s R with s = u / (2 + u), where 2s = u - s u and s u = h - s h for
    h = u²/2, so that the largest term is u, which has no error (FDLIBM, e_log.c).
    """
    s = tl.div_rn(u, 2 + u)
    q = s * s
    p = 2 / 11 + q * (2 / 13 + q * (2 / 15 + q * (2 / 17)))
    R = q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * p))))
    h = 0.5 * u * u
    return u - (h - s * (h + R))


@triton.jit
def softplus(t):
    """log(1 + e^t), without overflow."""
    return tl.where(t <= 0, 0.0, t) + log1p_unit(exp(-tl.abs(t)))


@triton.jit
def sigmoid(x):
    """1/(1 + e^-x), from an exponential that cannot overflow."""
    e = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0, e, 1.0), 1 + e)


@triton.jit
def normal_cdf(x):
    return 0.5 * (1 + tl.erf(x * SQRT_HALF))


@triton.jit
def normal_pdf(x):
    return exp(-0.5 * x * x) * PDF_SCALE


@triton.jit
def mish_parts(x):
    """t = tanh(softplus(x)) and 1 - t², from w = 1 + e^x: t = (w² - 1)/(w² + 1); 1 and 0 far right."""
    e = exp(tl.minimum(x, 20.0))
    w2 = (1 + e) * (1 + e)
    r = tl.div_rn(2 * (1 + e), w2 + 1)
    return tl.div_rn(e * (e + 2), w2 + 1), tl.where(x > 20, 0.0, r * r)


@triton.jit
def gelu_tanh_parts(x):
    """t = tanh(u), 1 - t² without cancellation, and du/dx."""
    u = (x + x * x * x * GELU_B) * GELU_A
    e = exp(-2 * tl.abs(u))
    r = tl.div_rn(1.0, 1 + e)
    return tanh(u), 4 * e * r * r, (1 + x * x * (3 * GELU_B)) * GELU_A


@triton.jit
def elu(x, alpha, scale, rate):
    return tl.where(x <= 0, alpha * scale * expm1(rate * tl.where(x <= 0, x, 0.0)), scale * x)


@triton.jit
def elu_exponential(x, alpha, scale, rate):
    return alpha * scale * rate * exp(rate * tl.where(x <= 0, x, 0.0))


@triton.jit
def forward(x, KEY: tl.constexpr, a, b):
    """f(x)."""
    if KEY == "identity":
        return x
    elif KEY == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif KEY == "leaky_relu":
        return tl.where(x > 0, x, a * x)
    elif KEY == "elu":
        return elu(x, a, 1.0, 1.0)
    elif KEY == "selu":
        return elu(x, SELU_ALPHA, SELU_SCALE, 1.0)
    elif KEY == "celu":
        return elu(x, a, 1.0, tl.div_rn(1.0, a))
    elif KEY == "gelu":
        return x * normal_cdf(x)
    elif KEY == "gelu_tanh":
        return 0.5 * x * (1 + tanh((x + x * x * x * GELU_B) * GELU_A))
    elif KEY == "silu":
        return x * sigmoid(x)
    elif KEY == "mish":
        t, _ = mish_parts(x)
        return x * t
    elif KEY == "sigmoid":
        return sigmoid(x)
    elif KEY == "tanh":
        return tanh(x)
    elif KEY == "softplus":
        return tl.where(x * a > b, x, tl.div_rn(softplus(a * x), a))
    elif KEY == "softsign":
        return tl.div_rn(x, 1 + tl.abs(x))
    elif KEY == "hardtanh":
        return tl.where(x < a, a, tl.where(x > b, b, x))
    elif KEY == "relu6":
        return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif KEY == "hardsigmoid":
        return tl.div_rn(tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)), 6.0)
    elif KEY == "hardswish":
        return tl.div_rn(x * tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)), 6.0)
    elif KEY == "logsigmoid":
        return -softplus(-x)
    elif KEY == "tanhshrink":
        return x - tanh(x)
    elif KEY == "hardshrink":
        return tl.where((x >= -a) & (x <= a), 0.0, x)
    elif KEY == "softshrink":
        return tl.where(x > a, x - a, tl.where(x < -a, x + a, x * 0))
    elif KEY == "sin":
        return tl.sin(x)
    else:
        tl.static_assert(False, "unknown activation")


@triton.jit
def derivative(s, KEY: tl.constexpr, OUTPUT: tl.constexpr, a, b):
    """f′ as a function of the saved value s."""
    if KEY == "identity":
        return tl.zeros_like(s) + 1
    elif KEY == "relu":
        return tl.where(s <= 0, 0.0, 1.0)
    elif KEY == "leaky_relu":
        return tl.where(s > 0, 1.0, a)
    elif KEY == "elu":
        return tl.where(s <= 0, elu_exponential(s, a, 1.0, 1.0), 1.0)
    elif KEY == "selu":
        return tl.where(s <= 0, elu_exponential(s, SELU_ALPHA, SELU_SCALE, 1.0), SELU_SCALE)
    elif KEY == "celu":
        return tl.where(s <= 0, elu_exponential(s, a, 1.0, tl.div_rn(1.0, a)), 1.0)
    elif KEY == "gelu":
        return normal_cdf(s) + s * normal_pdf(s)
    elif KEY == "gelu_tanh":
        t, d, du = gelu_tanh_parts(s)
        return 0.5 * (1 + t) + 0.5 * s * d * du
    elif KEY == "silu":
        q = sigmoid(s)
        return q * (1 + s * (1 - q))
    elif KEY == "mish":
        t, d = mish_parts(s)
        return t + s * sigmoid(s) * d
    elif KEY == "sigmoid":
        return s * (1 - s)
    elif KEY == "tanh":
        return (1 - s) * (1 + s)  # without the rounding of s², which 1 - s² would keep
    elif KEY == "softplus":
        if OUTPUT:
            return tl.where(s * a > b, 1.0, -expm1(-a * s))
        else:
            return tl.where(s * a > b, 1.0, sigmoid(a * s))
    elif KEY == "softsign":
        c = 1 + tl.abs(s)
        d = tl.div_rn(1.0, c)
        return d * d * (c * d)
    elif KEY == "hardtanh":
        return tl.where((s <= a) | (s >= b), 0.0, 1.0)
    elif KEY == "relu6":
        return tl.where((s <= 0) | (s >= 6), 0.0, 1.0)
    elif KEY == "hardsigmoid":
        return tl.where((s > -3) & (s < 3), 1 / 6, 0.0)
    elif KEY == "hardswish":
        return tl.where(s <= -3, 0.0, tl.where(s < 3, s * (1 / 3) + 0.5, 1.0))
    elif KEY == "logsigmoid":
        if OUTPUT:
            return -expm1(s)
        else:
            return sigmoid(-s)
    elif KEY == "tanhshrink":
        t = tanh(s)
        return t * t
    elif KEY == "hardshrink" or KEY == "softshrink":
        if OUTPUT:
            return tl.where(s == 0, 0.0, 1.0)
        else:
            return tl.where((s >= -a) & (s <= a), 0.0, 1.0)
    elif KEY == "sin":
        return tl.cos(s)
    else:
        tl.static_assert(False, "unknown activation")


@triton.jit
def pull(dy, s, KEY: tl.constexpr, OUTPUT: tl.constexpr, a, b):
    """dy · f′. Where f′ selects (the row's ``selects``), f′ = 0 gives 0 whatever dy is, Inf and NaN included."""
    d = derivative(s, KEY, OUTPUT, a, b)
    clipping: tl.constexpr = KEY == "relu" or KEY == "relu6" or KEY == "hardtanh" or KEY == "hardsigmoid"
    selects: tl.constexpr = clipping or KEY == "hardshrink" or KEY == "softshrink" or KEY == "hardswish"
    if selects:
        return tl.where(d == 0, 0.0, dy * d)
    else:
        return dy * d


@triton.jit
def curvature(s, KEY: tl.constexpr, OUTPUT: tl.constexpr, a, b):
    """The derivative of ``derivative`` with respect to the saved value s."""
    if KEY == "elu":
        return tl.where(s <= 0, elu_exponential(s, a, 1.0, 1.0), 0.0)
    elif KEY == "selu":
        return tl.where(s <= 0, elu_exponential(s, SELU_ALPHA, SELU_SCALE, 1.0), 0.0)
    elif KEY == "celu":
        return tl.where(s <= 0, tl.div_rn(elu_exponential(s, a, 1.0, tl.div_rn(1.0, a)), a), 0.0)
    elif KEY == "gelu":
        return normal_pdf(s) * (2 - s * s)
    elif KEY == "gelu_tanh":
        t, d, du = gelu_tanh_parts(s)
        return d * (du + 0.5 * s * (s * (6 * GELU_B * GELU_A) - 2 * t * du * du))
    elif KEY == "silu":
        q = sigmoid(s)
        return q * (1 - q) * (2 + s * (1 - 2 * q))
    elif KEY == "mish":
        t, d = mish_parts(s)
        q = sigmoid(s)
        return q * d * (2 + s * (1 - q) - 2 * s * q * t)
    elif KEY == "sigmoid":
        return 1 - 2 * s
    elif KEY == "tanh":
        return -2 * s
    elif KEY == "softplus":
        if OUTPUT:
            return tl.where(s * a > b, 0.0, a * exp(-a * s))
        else:
            q = sigmoid(a * s)
            return tl.where(s * a > b, 0.0, a * q * (1 - q))
    elif KEY == "softsign":
        d = 1 + tl.abs(s)
        return tl.where(s < 0, 2.0, tl.where(s > 0, -2.0, 0.0)) / (d * d * d)
    elif KEY == "hardswish":
        return tl.where((s > -3) & (s < 3), 1 / 3, 0.0)
    elif KEY == "logsigmoid":
        if OUTPUT:
            return -exp(s)
        else:
            q = sigmoid(s)
            return q * (q - 1)
    elif KEY == "tanhshrink":
        t = tanh(s)
        return 2 * t * (1 - t * t)
    elif KEY == "sin":
        return -tl.sin(s)
    elif (
        KEY == "identity" or KEY == "relu" or KEY == "leaky_relu" or KEY == "hardtanh" or KEY == "relu6"
        or KEY == "hardsigmoid" or KEY == "hardshrink" or KEY == "softshrink"
    ):  # fmt: skip  # piecewise linear
        return tl.zeros_like(s)
    else:
        tl.static_assert(False, "unknown activation")
