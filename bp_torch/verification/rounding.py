"""Checks of float32, bfloat16, float16 and autocast: errors beside a reference's, or what is unavoidable."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .context import Context
from .registry import Failed, NotApplicable, check, line
from .subject import Point, Subject, differentiable, is_float, upstream

DIGITS = (
    "losses and gradients carry fewer digits than the dtype has: training stalls or diverges where torch's would not"
)


BOUND = 4.0
"""How many times the unavoidable error is allowed without a reference. The most that was found in torch.nn and in this
library is 1.3; in bfloat16 it is 0.4 % and more, so that a function that is off by 10 % is found."""


def _low(dtype: torch.dtype) -> Callable[[Context], str | None]:
    def run(c: Context) -> str | None:
        if c.double_refused is not None:
            raise NotApplicable(f"there is no float64 to compare with: {line(c.double_refused)}")
        s, generator = c.subject, torch.Generator().manual_seed(7)

        def moved() -> Point:
            return c.exact.map(lambda t: (t * (1 + 0.003 * torch.randn(t.shape, generator=generator).to(t))).to(dtype))

        if dtype == torch.bfloat16 and any(t.is_complex() for t in c.given.tensors):
            raise NotApplicable("torch has no complex numbers of bfloat16")
        s.run(c.given.to(dtype))
        if c.reference is not None:
            return _beside(c, s, c.reference, dtype, moved)
        judge(c, s, [moved() for _ in range(7)], str(dtype).removeprefix("torch."))
        return None

    return run


def judge(
    c: Context,
    s: Subject,
    points: list[Point],
    where: str,
    ofs: tuple[str, ...] = (),
    autocast: torch.dtype | None = None,
) -> None:
    """Raise Failed if at more than half of the points a result's error exceeds its bound.

    The bound is :data:`BOUND` times what cannot be avoided at this precision: the root of the sum of squares of one
    rounding of the result and of the change that one rounding of every input, parameter and upstream gradient makes in
    float64. A function that is badly conditioned thus has a wider bound, by its own condition and not by choice. Half
    of the points may exceed it, because a rounding can carry a value over a kink.
    """
    excesses: dict[str, list[tuple[float, float, float]]] = {}
    for seed, point in enumerate(points):
        for name, values in errors_of(s, point, seed, autocast=autocast).items():
            excesses.setdefault(name, []).append(values)
    for name, found in excesses.items():
        if ofs and not name.startswith(ofs):
            continue
        over = [row for row in found if not row[0] <= row[1]]
        if 2 * len(over) > len(found):
            error, bound, size = max(over, key=lambda row: row[0] if row[0] == row[0] else float("inf"))
            if c.random and other_numbers(s, points[0], autocast):
                raise NotApplicable("random numbers differ from dtype to dtype")
            raise Failed(
                f"{where}: {name} is off by {error:.2g} (root mean square, of {size:.2g}) from float64;"
                f" {bound / BOUND:.1g} cannot be avoided",
                c.example(points[0]),
            )


def errors_of(
    s: Subject, point: Point, seed: int, size_at_least: float = 0.0, autocast: torch.dtype | None = None
) -> dict[str, tuple[float, float, float]]:
    """For each output and gradient: root mean squares of the error, its bound, and the value."""
    low = autocast or point.floats[0].dtype
    unit = torch.finfo(low).eps / 2
    exact, dys = _exact(s, point, low)
    got, expected = _named(s, _run(s, point, dys, autocast)), _named(s, s.run(exact, dys))
    nudged = _nudge(low, seed)
    near = [_named(s, s.run(exact.map(nudged), [nudged(dy) for dy in dys])) for _ in range(3)]
    gradients = [g for name, g in expected.items() if name.startswith("the gradient")]
    overall = max((float(g.abs().nan_to_num(0, 0, 0).max()) for g in gradients), default=0.0)
    found = {}
    for name, b in expected.items():
        a, ok = got[name], _known(b, got[name].dtype)
        if not ok.any():
            continue
        error = (a.double() - b)[ok].square().mean().sqrt()
        size = b[ok].square().mean().sqrt()
        change = torch.stack([(one[name] - b)[ok].square().nan_to_num(0).mean() for one in near]).mean()
        rounding = unit * float(size) + torch.finfo(a.dtype).tiny * torch.finfo(a.dtype).eps
        # A gradient that is zero but for rounding is as exact as the terms that cancel in it.
        rounding = max(rounding, unit * overall if name.startswith("the gradient") else 0.0, unit * size_at_least)
        found[name] = (float(error), BOUND * float((change + rounding**2).sqrt()), float(size))
    return found


def _exact(s: Subject, point: Point, low: torch.dtype) -> tuple[Point, list[Tensor]]:
    """The point in float64, and upstream gradients that a lower precision has as well."""
    exact = point.to(torch.float64)
    return exact, [dy.to(low).double() for dy in upstream(differentiable(s(s.leaves(exact)[0])))]


def _nudge(low: torch.dtype, seed: int) -> Callable[[Tensor], Tensor]:
    """One rounding of each entry, from float64 to a lower precision, as normal numbers."""
    generator, unit = torch.Generator().manual_seed(seed), torch.finfo(low).eps / 2
    return lambda t: t * (1 + unit * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t))


def _run(
    s: Subject, point: Point, dys: list[Tensor], autocast: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, forward under torch.autocast if it has a dtype."""
    at, leaves = s.leaves(point)
    ys = _under(autocast, s, at)
    live = [dy.to(y.dtype) for dy, y in zip(dys, differentiable(ys), strict=True)]
    return [y.detach() for y in ys], s.pull(ys, leaves, live)


def _under(autocast: torch.dtype | None, s: Subject, point: Point) -> tuple[Tensor, ...]:
    with torch.autocast(point.floats[0].device.type, autocast, enabled=autocast is not None):
        return s(point)


def _named(s: Subject, results: tuple[list[Tensor], list[Tensor]]) -> dict[str, Tensor]:
    """Floating-point outputs and the gradients by name."""
    ys, gs = results
    named = {f"output {i}" if len(ys) > 1 else "the output": y for i, y in enumerate(ys)}
    named |= {f"the gradient of {s.names[i]}": g for i, g in zip(s.wanted, gs, strict=True)}
    return {name: t for name, t in named.items() if is_float(t) and t.numel()}


def _known(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a result of this dtype can be near to float64's: where that is finite in both."""
    return exact.isfinite() & (exact.abs() < 0.9 * torch.finfo(dtype).max)


def other_numbers(s: Subject, point: Point, autocast: torch.dtype | None = None) -> bool:
    """Whether random numbers are others than float64's: results are then as far from it as those of another seed."""
    exact, squares = point.to(torch.float64), [0.0, 0.0]
    with torch.no_grad():
        for k in range(4):
            one, another = copy.copy(s), copy.copy(s)
            one.seed, another.seed = s.seed + k, s.seed + k + 1
            right = one(exact)
            for i, ys in enumerate((_under(autocast, one, point), another(exact))):
                squares[i] += sum(float((y - b).double().square().sum()) for y, b in zip(ys, right, strict=True))
    return squares[1] / 4 <= squares[0] <= 4 * squares[1]


def _beside(
    c: Context,
    s: Subject,
    reference: Subject,
    dtype: torch.dtype,
    moved: Callable[[], Point],
    autocast: torch.dtype | None = None,
) -> str | None:
    """Raise Failed unless errors are at most twice the reference's; more draws decide where 4 exceed that.

    With unit u = eps / 2, errors as root mean squares over the draws (that of one is luck), and c the change that one
    rounding of every input, parameter and upstream gradient makes in float64:

        each element:        error ≤ 2 reference's + √((u exact)² + c²)
        root mean squares:   error ≤ 2 reference's + u exact
    """
    sums: dict[str, Tensor] = {}
    unit = torch.finfo(dtype).eps / 2
    nudged = _nudge(dtype, 0)
    for count, more in ((4, 4), (16, 12), (64, 48)):
        for _ in range(more):
            point = moved()
            exact, dys = _exact(s, point, dtype)
            ours, theirs = (_named(of, _run(of, point, dys, autocast)) for of in (s, reference))
            near = _named(s, s.run(exact.map(nudged), [nudged(dy) for dy in dys]))
            for name, b in _named(s, s.run(exact, dys)).items():
                off = torch.stack(
                    [ours[name].double() - b, theirs[name].double() - b, (near[name] - b).nan_to_num(0.0), b]
                )
                sums[name] = sums.get(name, 0.0) + torch.where(_known(b, ours[name].dtype), off, 0.0).square()
        found = {name: total / count for name, total in sums.items()}
        over = [told for name, squares in found.items() if (told := _exceeding(name, squares, unit))]
        if not over:
            return _largest(found)
    where = "under autocast" if autocast else str(dtype).removeprefix("torch.")
    raise Failed(f"{where}: {over[0]}", c.example(moved()))


def _exceeding(name: str, squares: Tensor, unit: float) -> str | None:
    """What exceeds the bounds of :func:`_beside`: ``squares`` are of our errors, the reference's, c and the values."""
    ours, theirs, change, size = squares.sqrt()
    off, its, _, of = squares.reshape(4, -1).mean(1).sqrt().tolist()
    if off <= 2 * its + unit * of:
        bad = ~(ours <= 2 * theirs + torch.hypot(unit * size, change))
        if not bad.any():
            return None
        at = tuple(bad.nonzero()[0].tolist())
        name = f"{name}{list(at) if at else ''}"
        off, its, of = (float(t[at]) for t in (ours, theirs, size))
    return f"{name} is off by {off:.2g} from float64, the reference by {its:.2g} (of {of:.2g})"


def _largest(found: dict[str, Tensor]) -> str | None:
    told = []
    for name, squares in found.items():
        a, b = squares[:2].reshape(2, -1).mean(1).sqrt().tolist()
        told.append((a / b if b else float(a > 0), f"{name} {a:.2g}, the reference {b:.2g}"))
    return f"largest against the reference: {max(told)[1]}" if told else None


for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    _name = str(_dtype).removeprefix("torch.")
    check(
        _name,
        f"{_name} results and gradients are as near to float64 as {_name} allows: error at most twice the reference's,"
        f" or {BOUND:.0f} times what cannot be avoided",
        DIGITS,
        shrinks=False,
    )(_low(_dtype))


@check(
    "autocast",
    "under torch.autocast(bfloat16) gradients have their tensors' dtypes, and results are as near to float64 as"
    f" bfloat16 allows: error at most twice the reference's, or {BOUND:.0f} times what cannot be avoided",
    "mixed-precision training crashes or is wrong",
)
def autocast(c: Context) -> str | None:
    s, generator, low = c.subject, torch.Generator().manual_seed(7), torch.bfloat16

    def rounded(t: Tensor) -> Tensor:
        return t.to(low).to(torch.float32)

    def moved() -> Point:  # rounded, so that a cast to the dtype changes nothing
        return c.exact.map(lambda t: rounded(t * (1 + 0.003 * torch.randn(t.shape, generator=generator).to(t))))

    at, leaves = s.leaves(c.given.map(rounded))
    ys = _under(low, s, at)
    for k, g in zip(s.wanted, s.pull(ys, leaves), strict=True):
        if g.dtype != torch.float32:
            raise Failed(f"the gradient of {s.names[k]} is {g.dtype}, its tensor float32".replace("torch.", ""))
    if c.double_refused is not None:
        return f"runs; there is no float64 to compare with: {line(c.double_refused)}"
    if c.reference is not None:
        return _beside(c, s, c.reference, low, moved, low)
    try:
        judge(c, s, [moved() for _ in range(7)], "under autocast", autocast=low)
    except NotApplicable as reason:
        return f"runs; {reason}: not compared"
    return None
