"""How near a result must be to the exact one: at most twice as far as torch's own, and the rounding of the result.

Exact is what was computed in more digits than what is judged: in float64 for narrower dtypes, in numpy's longdouble for
float64. Each element is held to torch's error at that element, lest what is wrong with small ones pass beside large
ones. How far off a single number is is luck, and another processor's kernels have other luck. So where twice torch's
error is exceeded it is looked for at neighbouring inputs too, where the element has about the same size and what
cancels in it cancels as it does here, but what is rounded on the way is rounded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

MANY = 64
"""Numbers in a result of which one draw is enough to begin with."""
DRAWS = (1, 4, 64)
"""After so many draws it is judged; the last time for good."""
NEIGHBOURS = 64
"""At how many of them torch's error is looked for."""
STEPS = (2.0**-19, 2.0**-14, 2.0**-9)
"""How far off, relatively, their numbers are, in turn: little, lest what cancels changes, and more, lest a small term
of a large sum is too small to change how it is rounded. At least two units of the dtype."""


Exact = Tensor | np.ndarray[Any, Any]
Function = Callable[..., Any]


def wide(t: Tensor) -> np.ndarray[Any, Any]:
    """t as a longdouble array, to compute with what float64 results are compared to."""
    if np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        pytest.skip("numpy's longdouble is float64 on this platform: nothing here is exacter than float64")
    return t.detach().cpu().double().numpy().astype(np.longdouble)


def double(t: Any) -> Any:
    """t in float64, if it is a tensor of a floating dtype."""
    return t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t


def distance(t: Tensor, exact: Exact) -> Tensor:
    """|t - exact|, computed in the wider of the two, in float64."""
    if isinstance(exact, np.ndarray):
        return torch.from_numpy(abs(wide(t) - exact).astype(np.float64))
    return (t.detach().double() - exact.detach()).abs()


def near(t: Any, step: float, generator: torch.Generator) -> Any:
    """t, if it is of a floating dtype, with each number off at random by up to ``step`` of it."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return t
    step = max(2 * torch.finfo(t.dtype).eps, step)
    factor = 1 + step * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1)
    return (t.detach().double() * factor.to(t.device)).to(t.dtype)


def carried(f: Function, inputs: Sequence[Any], probes: int = 8) -> list[Tensor]:
    """What relative errors of the inputs carry into each element of f's results, per unit: of a sum, √Σ terms².

    The root mean square of (f(x (1 + δ ξ)) - f(x)) / δ over signs ξ = ±1 drawn at random.
    """
    generator = torch.Generator().manual_seed(0)
    given, delta = [double(t) for t in inputs], 2.0**-26

    def signs(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t * (1 + delta * (2 * torch.randint(2, t.shape, generator=generator) - 1).to(t))

    start = _tensors(f(*given))
    moves = [_tensors(f(*map(signs, given))) for _ in range(probes)]
    squares = [[((a - b).detach() / delta).square() for a, b in zip(move, start, strict=True)] for move in moves]
    return [torch.stack(of_one).mean(0).sqrt() for of_one in zip(*squares, strict=True)]


def cancelled(key: str, x: Tensor) -> Tensor:
    """What is left of 1 - tanh² in a derivative of this activation: its last place in float64, times powers of x."""
    return (2**-52 if key in ("gelu_tanh", "mish", "tanhshrink") else 0.0) * (1 + x.double().clamp(-12, 12) ** 2) ** 2


def assert_as_good_as_torch(
    ours: Function,
    theirs: Function,
    draw: Callable[[], Sequence[Any]],
    exact: Function | None = None,
    slack: Function | None = None,
    once: bool = False,
) -> int:
    """``ours`` and ``theirs`` take what ``draw`` gives, new inputs each time. Returns how often it was called.

    With unit u = eps / 2 of the result's dtype, for each result:

        each element i:      |ours - exact|ᵢ ≤ 2 z σᵢ + one unit in the last place of the exact
        root mean squares:   |ours - exact| ≤ 2 |torch's - exact| + u |exact|

    where σᵢ is the root mean square of torch's errors at that element, over neighbours of the inputs, and z the largest
    of torch's errors at any element in units of its σ: among many elements ours may have as bad luck as torch's. The
    last term is what rounding may cost where torch is spared it: its sums may be wider, or its luck good. The means are
    over all draws, in units of what is rounded and erred in that draw: one draw of large numbers outweighs no others.

    Args:
        exact: the same in more digits; else it is ``theirs`` in float64.
        slack: what is allowed beside the rounding, element by element, as many tensors or numbers as there are results;
            a test that gives it says why.
        once: judge the elements of one draw, and no means over draws: where what is drawn is one of many examples.
    """

    def reference(*inputs: Any) -> list[Exact]:
        return _tensors(theirs(*map(double, inputs)) if exact is None else exact(*inputs))

    measured: list[list[_Measured]] = []
    for draws in DRAWS:
        for _ in range(draws - len(measured)):
            inputs = draw()
            slacks = None if slack is None else slack(*inputs)
            measured.append(_measure(_tensors(ours(*inputs)), theirs, reference, inputs, slacks))
        if once:
            return draws
        if draws == 1 and min(m.count for m in measured[0]) < MANY:
            continue
        failures = [_failure(of_one) for of_one in zip(*measured, strict=True)]
        if not any(failures):
            return draws
    told = "; ".join(f"result {index}: {failure}" for index, failure in enumerate(failures) if failure)
    pytest.fail(f"in {draws} draws {told}")


class _Measured(NamedTuple):
    """Of one result in one draw: how many numbers, and mean squares."""

    count: int
    ours: float
    torchs: float
    rounding: float


def _tensors(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple | list) else [results]


def _measure(
    found: list[Tensor], theirs: Function, reference: Function, inputs: Sequence[Any], slacks: Sequence[Any] | None
) -> list[_Measured]:
    """Fails where an element is too far off."""
    torchs, right = _tensors(theirs(*inputs)), reference(*inputs)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in torchs]
    errors, of_torch = (list(map(distance, results, right)) for results in (found, torchs))
    measured, rounded = [], []
    for t, exact, error, torchs_error, slack in zip(
        found, right, errors, of_torch, slacks or [0.0] * len(found), strict=True
    ):
        info = torch.finfo(t.dtype)
        size = distance(torch.zeros_like(t), exact).clamp(min=info.tiny)
        rounding = info.eps / 2 * size + slack
        squares = (s.square().mean().item() for s in (error, torchs_error, rounding))
        measured.append(_Measured(error.numel(), *squares))
        rounded.append(info.eps / 2 * 2.0 ** torch.frexp(size).exponent.double() + slack)
    generator = torch.Generator().manual_seed(0)
    largest, squares = of_torch, [t.square() for t in of_torch]
    for count in range(1, NEIGHBOURS + 1):
        sigmas = [(square / count).sqrt() for square in squares]
        luck = [
            (t / sigma).nan_to_num(1, 1).amax() if t.numel() else 1 for t, sigma in zip(largest, sigmas, strict=True)
        ]
        allowed = [2 * z * sigma + last for z, sigma, last in zip(luck, sigmas, rounded, strict=True)]
        beyond = [~(error <= most) for error, most in zip(errors, allowed, strict=True)]
        if not any(b.any() for b in beyond):
            return measured
        moved = [near(t, STEPS[count % len(STEPS)], generator) for t in inputs]
        of_torch = list(map(distance, _tensors(theirs(*moved)), reference(*moved)))
        largest = [torch.fmax(t, here) for t, here in zip(largest, of_torch, strict=True)]
        squares = [square + here.square().nan_to_num(0) for square, here in zip(squares, of_torch, strict=True)]
    told = "; ".join(
        f"result {index}: {b.sum()} of {b.numel()}, such as {exact[b][0]:.3g}, "
        f"by {error[b][0]:.3g}, torch's by {sigma[b][0]:.3g}"
        for index, (b, error, sigma, exact) in enumerate(zip(beyond, errors, sigmas, right, strict=True))
        if b.any()
    )
    pytest.fail(f"elements are too far off, of {told}")


def _largest(ratios: Tensor) -> float:
    """At least 1, which it is of none, of 0 / 0 and of errors whose squares are 0."""
    return ratios.nan_to_num(1, 1).amax().item() if ratios.numel() else 1.0


def _failure(measured: tuple[_Measured, ...]) -> str | None:
    """What one result, in all its draws, exceeds; or None."""
    shares = [_shares(m) for m in measured]
    ours, torchs, rounding = (math.sqrt(sum(of_all) / len(shares)) for of_all in zip(*shares, strict=True))
    if not ours <= 2 * torchs + rounding:
        return f"of all errors ours are {ours:.3g}, torch's {torchs:.3g}, those of rounding {rounding:.3g}"
    return None


def _shares(m: _Measured) -> tuple[float, float, float]:
    """Of all that is wrong in one draw, how much is ours, torch's, and rounding's. Where torch's is infinite or NaN
    (an overflow, say) ours may be what it is, and the other way round nothing excuses it.
    """
    if not math.isfinite(m.torchs):
        return 0.0, 1.0, 0.0
    if not math.isfinite(m.ours):
        return 1.0, 0.0, 0.0
    unit = m.ours + m.torchs + m.rounding
    return (m.ours / unit, m.torchs / unit, m.rounding / unit) if unit else (0.0, 0.0, 0.0)
