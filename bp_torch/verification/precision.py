"""Checks of numbers: a reference, float64, large values, large means, NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from .batches import many
from .context import Context
from .gradients import first_order
from .numeric import difference
from .registry import Failed, NotApplicable, check, describe, line
from .rounding import BOUND, errors_of, judge, other_numbers
from .subject import Point, is_float


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
        # Looked for are results that are wrong, not digits of those that are small beside the input. The gradient of a
        # weight may be a small difference of such, as in saturated attention, times the input.
        own = f"the gradient of {s.names[i]}"
        squared = BOUND * torch.finfo(torch.float32).eps / 2 * size**2
        for name, (off, bound, value) in errors_of(s, low, 0, size).items():
            if not off <= (max(bound, squared) if name.startswith("the gradient") and name != own else bound):
                if c.random and other_numbers(s, low):
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
        # How the inputs are rounded is luck, and another one at each mean.
        near = [shifted(mean * (1 + j / 8)).to(torch.float32) for j in range(5)]
        judge(c, s, near, f"at a mean of {mean:g} in float32", ofs)
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
