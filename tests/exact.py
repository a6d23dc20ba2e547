"""How near a result must be to the exact one: at most twice as far as torch's own, and the rounding of the result.

Exact is what was computed in more digits than what is judged: in float64 for narrower dtypes, in numpy's longdouble for
float64. How far off a single number is, or nine of them, is luck, and another processor's kernels have other luck.
So the bound is on the errors of many numbers: inputs are drawn again where a result has few, and again many times where
the bound is exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

MANY = 64
"""Numbers in a result of which one draw is enough to begin with."""
DRAWS = (1, 4, 64)
"""After so many draws it is judged; the last time for good."""


Exact = Tensor | np.ndarray[Any, Any]


class Result(NamedTuple):
    ours: Tensor
    theirs: Tensor
    exact: Exact
    slack: Tensor | float = 0.0
    """What is allowed beside the rounding, element by element; a test that gives one says why."""


def wide(t: Tensor) -> np.ndarray[Any, Any]:
    """t as a longdouble array, to compute with what float64 results are compared to."""
    if np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        pytest.skip("numpy's longdouble is float64 on this platform: nothing here is exacter than float64")
    return t.detach().cpu().double().numpy().astype(np.longdouble)


def distance(t: Tensor, exact: Exact) -> Tensor:
    """|t - exact|, computed in the wider of the two, in float64."""
    if isinstance(exact, np.ndarray):
        return torch.from_numpy(abs(wide(t) - exact).astype(np.float64))
    return (t.detach().double() - exact.detach()).abs()


def assert_as_good_as_torch(draw: Callable[[], Iterable[Result]]) -> int:
    """``draw`` gives the results for new inputs, in the same order each time. Returns how often it was called.

    With unit u = eps / 2 of the result's dtype, for each result and over all draws:

        each element:        |ours - exact| ≤ 2 max |torch's - exact| + one unit in the last place of the exact
        root mean squares:   |ours - exact| ≤ 2 |torch's - exact| + u |exact|

    The last term is what rounding may cost where torch is spared it: its sums may be wider, or its luck good.
    """
    measured: list[list[dict[str, float]]] = []
    for draws in DRAWS:
        measured += [[_measure(*result) for result in draw()] for _ in range(draws - len(measured))]
        if draws == 1 and min(m["count"] for m in measured[0]) < MANY:
            continue
        failures = [_failure(of_one) for of_one in zip(*measured, strict=True)]
        if not any(failures):
            return draws
    told = "; ".join(f"result {index}: {failure}" for index, failure in enumerate(failures) if failure)
    pytest.fail(f"in {draws} draws {told}")


def _measure(ours: Tensor, theirs: Tensor, exact: Exact, slack: Tensor | float) -> dict[str, float]:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    info = torch.finfo(ours.dtype)
    errors, torchs = distance(ours, exact), distance(theirs, exact)
    size = distance(torch.zeros_like(ours), exact).clamp(min=info.tiny)
    rounding, last = info.eps / 2 * size + slack, info.eps / 2 * 2.0 ** torch.frexp(size).exponent.double() + slack
    squares = {"ours": errors, "torch's": torchs, "rounding": rounding}
    return {name: t.square().mean().item() for name, t in squares.items()} | {
        "count": errors.numel(),
        "largest": (errors - last).max().item(),
        "torch's largest": torchs.max().item(),
    }


def _failure(measured: tuple[dict[str, float], ...]) -> str | None:
    """What one result, in all its draws, exceeds; or None."""
    largest, torchs_largest = (max(m[name] for m in measured) for name in ("largest", "torch's largest"))
    if not largest <= 2 * torchs_largest:
        return f"the largest error is {largest:.3g} beyond its last place, torch's {torchs_largest:.3g}"
    ours, torchs, rounding = (
        math.sqrt(sum(m[name] for m in measured) / len(measured)) for name in ("ours", "torch's", "rounding")
    )
    if not ours <= 2 * torchs + rounding:
        return f"the root mean square error is {ours:.3g}, torch's {torchs:.3g}, that of rounding {rounding:.3g}"
    return None
