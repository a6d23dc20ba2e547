"""Checks of numbers: each dtype against float64, large values, large means, NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batches import many
from .context import Context
from .gradients import first_order
from .numeric import difference
from .registry import Failed, NotApplicable, check, describe, line
from .subject import Point, Subject, is_float, upstream

DIGITS = (
    "losses and gradients carry fewer digits than the dtype has: training stalls or diverges where torch's would not"
)


@check(
    "reference",
    "values and gradients equal those of reference=, in float64, for other batch sizes too, NaN and Inf included",
    "results differ from those of the code it replaces",
)
def reference(c: Context) -> str | None:
    if c.reference is None:
        raise NotApplicable("no reference= was given")
    c.compare(c.subject.run(c.exact), c.reference.run(c.exact), "unlike the reference", c.exact, 1e-7)
    for n in (1, 2, 2 * c.rows.count + 1) if c.rows.batched else ():
        point, _ = many(c.exact, c.rows, n)
        try:
            wanted = c.reference.run(point)
        except (RuntimeError, ValueError):
            continue  # the reference refuses so few rows
        c.compare(c.subject.run(point), wanted, f"unlike the reference with {n} rows", point, 1e-7)
    for value in (float("nan"), float("inf"), -float("inf")):
        point = c.exact.map(torch.clone)
        for i in c.need_inputs()[:1]:
            if point.floats[i].numel():
                point.floats[i].view(-1)[0] = value
        try:
            with torch.no_grad():
                expected = c.reference(point)
        except (RuntimeError, ValueError):
            continue  # the reference refuses the value
        with torch.no_grad():
            c.compare((list(c.subject(point)), []), (list(expected), []), f"unlike the reference at {value}", point)
    return None


@check(
    "float64",
    "float64 is float64 throughout: results resolve steps of 1e-7 smoothly, gradients are right to nine digits",
    "gradcheck, and whoever needs float64 (physics-informed losses, small differences), gets float32's digits",
)
def float64(c: Context) -> str | None:
    if c.double_refused is not None:
        raise c.double_refused  # a failure, unless it is a refusal
    s = c.subject
    for y in s(c.exact):
        if y.is_floating_point() and y.dtype != torch.float64:
            raise Failed(f"float64 in gives {y.dtype} out".replace("torch.", ""), c.example(c.exact))
    worst: dict[str, list[float]] = {}
    for seed in (1, 2, 3):
        for name, noise in _noise(c, seed).items():
            worst.setdefault(name, []).append(noise)
    for name, noises in worst.items():
        # A kink can lie within one of three small steps, not within all.
        if min(noises) > 1e-10:
            raise Failed(
                f"{name} moves in jumps of {min(noises):.1e} of its size: lower precision inside (float64: 1e-15)",
                c.example(c.exact),
            )
    if c.differentiable:
        found = first_order(c, s, c.exact, entries=16)
        if len(found.imprecise) >= 2 and not found.wrong:
            w = found.imprecise[0]
            where = f"{s.names[w.tensor]}{list(w.index) if w.index else ''}"
            raise Failed(
                f"the gradient of {where} is {w.analytical:.14g}, the numerical derivative is {w.numerical:.14g}:"
                " an operation or a constant of lower precision",
                c.example(c.exact),
            )
    return None


def _noise(c: Context, seed: int) -> dict[str, float]:
    """The fourth difference over steps of 3e-7, relative to the size: of a smooth function, rounding alone."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)

    starts = [t * (1 + 1e-3 * normal(t)) for t in c.exact.floats]
    directions = [normal(t).clamp(-2, 2) * t.abs().clamp(min=1e-2) for t in c.exact.floats]
    sums: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    for k, weight in enumerate((1, -4, 6, -4, 1)):
        at = c.exact.put([t + 3e-7 * k * d for t, d in zip(starts, directions, strict=True)])
        ys, gs = c.subject.run(at)
        named = {f"output {i}" if len(ys) > 1 else "the output": y for i, y in enumerate(ys) if y.is_floating_point()}
        named |= {f"the gradient of {c.subject.names[i]}": g for i, g in zip(c.subject.wanted, gs, strict=True)}
        overall = max((float(t.abs().max()) for t in named.values() if t.numel()), default=0.0)
        for name, t in named.items():
            sums[name] = weight * t + sums.get(name, torch.zeros_like(t))
            sizes[name] = max(float(t.abs().max()) if t.numel() else 0.0, 1e-5 * overall, 1e-300)
    return {name: float(t.abs().max()) / sizes[name] if t.numel() else 0.0 for name, t in sums.items()}


BOUND = 16.0
"""How many times the unavoidable error is allowed without a reference."""


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


def judge(c: Context, s: Subject, points: list[Point], where: str, ofs: tuple[str, ...] = ()) -> None:
    """Raise Failed if at more than half of the points a result's error exceeds its bound.

    The bound is :data:`BOUND` times what cannot be avoided at this precision: the root of the sum of squares of one
    rounding of the result and of the change that one rounding of every input, parameter and upstream gradient makes in
    float64. A function that is badly conditioned thus has a wider bound, by its own condition and not by choice. Half
    of the points may exceed it, because a rounding can carry a value over a kink.
    """
    excesses: dict[str, list[tuple[float, float, float]]] = {}
    for seed, point in enumerate(points):
        for name, values in _errors(s, point, seed).items():
            excesses.setdefault(name, []).append(values)
    for name, found in excesses.items():
        if ofs and not name.startswith(ofs):
            continue
        over = [row for row in found if not row[0] <= row[1]]
        if 2 * len(over) > len(found):
            error, bound, size = max(over, key=lambda row: row[0] if row[0] == row[0] else float("inf"))
            if c.random and _other_zeros(s, points[0]):
                raise NotApplicable("random numbers differ from dtype to dtype")
            raise Failed(
                f"{where}: {name} is off by {error:.2g} (root mean square, of {size:.2g}) from float64;"
                f" {bound / BOUND:.1g} cannot be avoided",
                c.example(points[0]),
            )


def _errors(s: Subject, point: Point, seed: int, size_at_least: float = 0.0) -> dict[str, tuple[float, float, float]]:
    """For each output and gradient: root mean squares of the error, its bound, and the value."""
    low = point.floats[0].dtype
    unit = torch.finfo(low).eps / 2
    exact = point.to(torch.float64)
    roots = [y for y in s(s.leaves(exact)[0]) if y.requires_grad]
    dys = [dy.to(low) for dy in upstream(roots)]
    wide = [dy.double() for dy in dys]
    at, leaves = s.leaves(point)
    ys = s(at)
    live = [dy.to(y.dtype) for dy, y in zip(dys, [y for y in ys if y.requires_grad], strict=True)]
    got = [y.detach() for y in ys] + s.pull(ys, leaves, live)
    right = s.run(exact, wide)
    expected = right[0] + right[1]
    generator = torch.Generator().manual_seed(seed)

    def nudged(t: Tensor) -> Tensor:
        return t * (1 + unit * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t))

    changes = [torch.zeros_like(t) if t.is_floating_point() else t for t in expected]
    for _ in range(3):
        near = s.run(exact.map(nudged), [nudged(dy) for dy in wide])
        for i, (a, b) in enumerate(zip(near[0] + near[1], expected, strict=True)):
            if a.is_floating_point():
                changes[i] = changes[i] + (a - b).square() / 3
    count = len(ys)
    names = [f"output {i}" if count > 1 else "the output" for i in range(count)]
    names += [f"the gradient of {s.names[i]}" for i in s.wanted]
    overall = max((float(g.abs().nan_to_num(0, 0, 0).max()) for g in right[1] if g.numel()), default=0.0)
    found = {}
    for name, a, b, change in zip(names, got, expected, changes, strict=True):
        if not is_float(b) or b.numel() == 0:
            continue
        limit = torch.finfo(a.dtype).max
        ok = b.isfinite() & (b.abs() < 0.9 * limit)  # else there is nothing to be near to
        if not ok.any():
            continue
        error = (a.double() - b)[ok].square().mean().sqrt()
        size = b[ok].square().mean().sqrt()
        rounding = unit * float(size) + torch.finfo(a.dtype).smallest_normal
        # A gradient that is zero but for rounding is as exact as the terms that cancel in it.
        rounding = max(rounding, unit * overall if name.startswith("the gradient") else 0.0, unit * size_at_least)
        bound = BOUND * float((change[ok].nan_to_num(0).mean() + rounding**2).sqrt())
        found[name] = (float(error), bound, float(size))
    return found


def _other_zeros(s: Subject, point: Point) -> bool:
    with torch.no_grad():
        pairs = zip(s(point), s(point.to(torch.float64)), strict=True)
    return any(a.shape == b.shape and not torch.equal(a == 0, b == 0) for a, b in pairs)


def _beside(c: Context, s: Subject, reference: Subject, dtype: torch.dtype, moved: Callable[[], Point]) -> str | None:
    """The error is at most twice the reference's, or one rounding; 60 more draws decide where 4 exceed that."""
    squares: list[dict[str, tuple[float, float, float]]] = []
    name = str(dtype).removeprefix("torch.")
    told = ""
    for draws in (4, 60):
        for _ in range(draws):
            point = moved()
            ours, theirs = _errors(s, point, 0), _errors(reference, point, 0)
            squares.append({key: (ours[key][0] ** 2, theirs[key][0] ** 2, ours[key][2] ** 2) for key in ours})
        over, worst = [], (0.0, "")
        for key in squares[0]:
            a, b, size = ((sum(row[key][k] for row in squares if key in row) / len(squares)) ** 0.5 for k in range(3))
            ratio = a / b if b else float(a > 0)
            worst = max(worst, (ratio, f"{key} {a:.2g}, the reference {b:.2g}"))
            if not a <= 2 * b + torch.finfo(dtype).eps / 2 * size:
                over.append(f"{key} is off by {a:.2g} from float64, the reference by {b:.2g} (of {size:.2g})")
        told = worst[1]
        if not over:
            return f"largest against the reference: {told}" if told else None
    raise Failed(f"{name}: {over[0]}", c.example(moved()))


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
    "tails",
    "inputs of ±20, ±100 and ±1000 give finite float32 where float64 is finite, and the same values",
    "one large activation turns the loss into NaN or the gradient into zero",
    shrinks=False,
)
def tails(c: Context) -> str | None:
    if c.double_refused is not None:
        raise NotApplicable(f"there is no float64 to compare with: {line(c.double_refused)}")
    i = c.need_inputs()[0]
    s = c.subject
    for size in (20.0, 100.0, 1000.0):
        floats = [t.clone() for t in c.exact.floats]
        floats[i] = torch.where(floats[i] < 0, -size, size).to(floats[i])
        point = c.exact.put(floats)
        ys, gs = s.run(point)
        if all(y.isfinite().all() for y in ys if is_float(y)):
            for k, g in zip(s.wanted, gs, strict=True):
                if g.isnan().any():
                    raise Failed(f"at ±{size:g} the gradient of {s.names[k]} is NaN in float64", c.example(point))
        low = point.to(torch.float32)
        # Looked for are results that are wrong, not digits of those that are small beside the input.
        for name, (off, bound, value) in _errors(s, low, 0, size).items():
            if not off <= bound:
                if c.random and _other_zeros(s, low):
                    raise NotApplicable("random numbers differ from dtype to dtype")
                raise Failed(
                    f"at ±{size:g} in float32 {name} is off by {off:.3g} from float64's, of {value:.3g}",
                    c.example(low),
                )
    return None


@check(
    "large-mean",
    "what does not depend on its input's mean is right at means of 1e3 and 1e5, in float32",
    "data that is not centred (pixels, prices, times) gives NaN, or noise in place of normalized values",
    shrinks=False,
)
def large_mean(c: Context) -> str | None:
    if c.double_refused is not None:
        raise NotApplicable(f"there is no float64 to compare with: {line(c.double_refused)}")
    i = c.need_inputs()[0]
    s = c.subject

    def shifted(mean: float) -> Point:
        return c.exact.put([t + mean if k == i else t for k, t in enumerate(c.exact.floats)])

    here, there = s.run(c.exact), s.run(shifted(1e3))
    if difference(there[0], here[0], 1e-7) is not None:
        raise NotApplicable("the output depends on the input's mean")
    # A parameter before a normalization has a gradient that is a small difference of large terms, whoever computes it.
    ofs = ("the output", "output", f"the gradient of {s.names[i]}")
    for mean in (1e3, 1e5):
        judge(c, s, [shifted(mean).to(torch.float32)], f"at a mean of {mean:g} in float32", ofs)
    return None


@check(
    "nan",
    "an output that depends on an input is NaN where that input is NaN",
    "a NaN in the data or in a layer below is hidden, and training goes on with wrong values",
)
def nan(c: Context) -> str | None:
    s = c.subject
    generator = torch.Generator().manual_seed(3)
    seen = False
    for i in c.need_inputs():
        n = c.given.floats[i].numel()
        for flat in torch.randperm(n, generator=generator)[:6].tolist():

            def put(value: float, i: int = i, flat: int = flat) -> Point:
                floats = [t.clone(memory_format=torch.contiguous_format) for t in c.given.floats]
                floats[i].view(-1)[flat] = value
                return c.given.put(floats)

            x = float(c.given.floats[i].reshape(-1)[flat])
            with torch.no_grad():
                here = s(c.given)
                depends = [torch.zeros_like(y, dtype=torch.bool) for y in here]
                # Which random numbers are drawn may depend on signs (RReLU's do): keep them.
                for step in (x, 2 * x) if c.random else (1.0, -1.0, 10.0, -10.0):
                    for k, y in enumerate(s(put(x + step))):
                        depends[k] |= (y != here[k]) & y.isfinite() & here[k].isfinite()
                point = put(float("nan"))
                ys = s(point)
            for y, on in zip(ys, depends, strict=True):
                if not y.is_floating_point():
                    continue
                seen |= bool(on.any())
                if (swallowed := on & ~y.isnan()).any():
                    place = torch.unravel_index(swallowed.reshape(-1).int().argmax(), y.shape)
                    index = tuple(int(k) for k in place)
                    raise Failed(
                        f"{s.names[i]} has a NaN, the output{list(index) if index else ''} that depends on it is"
                        f" {float(y[index]):.6g}",
                        {**c.example(point), "output": describe(y)},
                    )
    if not seen:
        raise NotApplicable("no output depends on the values of an input")
    return None
