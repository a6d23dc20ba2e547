"""Checks of derivatives: first, second, forward mode, batched, undefined, and of frozen parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._torch import undefined_gradient
from .context import Context
from .numeric import Comparison, compare_gradients, difference, not_finite
from .registry import Failed, NotApplicable, check
from .subject import Point, Subject, differentiable, upstream

TRAINS = "training follows another direction than the loss's gradient"


def first_order(
    c: Context,
    subject: Subject,
    point: Point,
    entries: int = 40,
    only: Callable[[int, Tensor], Tensor] | None = None,
) -> Comparison:
    """The gradients of a subject against numerical derivatives; ``only(k, gradient)`` gives the entries to compare."""
    at, leaves = subject.leaves(point)
    ys = subject(at)
    roots = differentiable(ys)
    keep = [i for i, y in enumerate(ys) if y.requires_grad]
    dys = upstream(roots)
    analytical = subject.pull(ys, leaves, dys)

    def f(floats: list[Tensor]) -> list[Tensor]:
        values = subject(point.put(floats))
        return [values[i] for i in keep]

    chosen = None if only is None else [only(k, g) for k, g in zip(subject.wanted, analytical, strict=True)]
    return compare_gradients(f, point.floats, analytical, dys, subject.wanted, entries=entries, only=chosen)


def report(c: Context, found: Comparison, point: Point, what: str, names: Sequence[str]) -> str | None:
    """Raise Failed if an entry is wrong, else a note on entries that have no derivative."""
    if found.wrong:
        w = max(found.wrong, key=lambda w: abs(w.analytical - w.numerical))
        where = f"{names[w.tensor]}{list(w.index) if w.index else ''}"
        raise Failed(
            f"{what} {where} is {w.analytical:.6g}, the numerical derivative is {w.numerical:.6g}"
            f" ({len(found.wrong)} of {found.entries} compared are wrong)",
            c.example(point),
        )
    if found.skipped and found.skipped == found.entries:
        raise NotApplicable("numerical derivatives do not converge anywhere: the function is not smooth at this scale")
    return f"{found.skipped} of {found.entries} entries lie at kinks: not compared" if found.skipped else None


@check(
    "gradcheck",
    "each gradient equals the numerical derivative, in float64; backward is linear in its upstream gradient",
    TRAINS,
    gradients=True,
)
def gradcheck(c: Context) -> str | None:
    found = first_order(c, c.subject, c.exact)
    note = report(c, found, c.exact, "the gradient of", c.subject.names)
    at, leaves = c.subject.leaves(c.exact)
    roots = differentiable(c.subject(at))
    one, other = upstream(roots), upstream(roots, seed=12)
    both = [2 * a - b for a, b in zip(one, other, strict=True)]
    pulled = [c.subject.pull(roots, leaves, dys, retain_graph=True) for dys in (one, other, both)]
    expected = [2 * a - b for a, b in zip(*pulled[:2], strict=True)]
    tolerance = None if c.double_refused is None else 1e-3
    c.compare(([], pulled[2]), ([], expected), "backward is not linear in the upstream gradient", c.exact, tolerance)
    return note


@check(
    "gradgradcheck",
    "the gradient of the gradient equals its numerical derivative, in float64",
    "gradient penalties, force fields and physics-informed losses are silently wrong",
    gradients=True,
)
def gradgradcheck(c: Context) -> str | None:
    s = c.subject
    at, leaves = s.leaves(c.exact)
    ys = s(at)
    keep = [i for i, y in enumerate(ys) if y.requires_grad]
    dys = [dy.requires_grad_() for dy in upstream([ys[i] for i in keep])]
    gs = s.pull(ys, leaves, dys, create_graph=True)
    weights = upstream(gs, seed=13)
    everything = [*leaves, *dys]
    live = [(g, w) for g, w in zip(gs, weights, strict=True) if g.requires_grad]
    if live:
        # backward(), because grad() does not visit the node by which once_differentiable refuses.
        torch.autograd.backward([g for g, _ in live], [w for _, w in live])
    analytical = [torch.zeros_like(t) if t.grad is None else t.grad for t in everything]
    count, n = len(leaves), len(c.exact.floats)

    def f(tensors: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            near, near_leaves = s.leaves(c.exact.put(tensors[:n]))
            values = s(near)
            return s.pull([values[i] for i in keep], near_leaves, tensors[n:])

    floats = [*(t.detach() for t in c.exact.floats), *(dy.detach() for dy in dys)]
    recorded, plain = [g.detach() for g in gs], f(floats)
    c.compare(([], recorded), ([], plain), "under create_graph=True", c.exact)
    names = [*c.subject.names, *(f"the upstream gradient {i}" for i in range(len(dys)))]
    positions = [*s.wanted, *range(n, n + len(dys))]
    assert len(analytical) == count + len(dys)
    found = compare_gradients(f, floats, analytical, weights, positions, entries=16)
    return report(c, found, c.exact, "the second derivative: the gradient's gradient by", names)


@check(
    "forward-mode",
    "forward-mode derivatives equal those of backward",
    "Jacobian-vector products, and Hessians made of them, are wrong",
    gradients=True,
)
def forward_mode(c: Context) -> str | None:
    s = c.subject
    _, gs = s.run(c.exact)
    largest = max((float(g.abs().max()) for g in gs if g.numel()), default=0.0)
    # One by one, and all at once: how a rule adds them up shows in nothing else.
    for chosen in dict.fromkeys([*((k,) for k in s.wanted), tuple(s.wanted)]):
        floats = [t.detach() for t in c.exact.floats]
        tangents = upstream([floats[k] for k in chosen], seed=14)
        with forward_ad.dual_level():
            for k, tangent in zip(chosen, tangents, strict=True):
                floats[k] = forward_ad.make_dual(floats[k], tangent)
            pairs = [forward_ad.unpack_dual(y) for y in s(c.exact.put(floats)) if y.is_floating_point()]
            results = [(y.detach(), None if t is None else t.detach().clone()) for y, t in pairs]
        at, leaves = s.leaves(c.exact, chosen)
        ys = [y for y in s(at) if y.is_floating_point()]
        dys = upstream(ys)
        live = [dy for dy, y in zip(dys, ys, strict=True) if y.requires_grad]
        moves = [g * tangent for g, tangent in zip(s.pull(ys, leaves, live), tangents, strict=True)]
        terms = [dy * t for dy, (_, t) in zip(dys, results, strict=True) if t is not None]
        got, expected = (sum(float(t.sum()) for t in summed) for summed in (terms, moves))
        scale = sum(float(t.abs().sum()) for t in [*moves, *terms])
        # A gradient may be zero but for rounding.
        scale += 1e-4 * largest * sum(float(tangent.abs().sum()) for tangent in tangents)
        if not abs(got - expected) <= (1e-8 if c.double_refused is None else 1e-3) * scale:
            names = [s.names[k] for k in chosen]
            of = f"a tangent of {names[0]}" if len(names) == 1 else f"tangents of {', '.join(names)} at once"
            raise Failed(
                f"the derivative along {of} is {got:.6g} forward and {expected:.6g} by backward",
                c.example(c.exact, tangent=tangents[0]),
            )
    return None


@check(
    "batched-gradients",
    "several upstream gradients at once (is_grads_batched, as in jacobian(vectorize=True)) equal one after another",
    "vectorized Jacobians and Hessians are wrong",
    gradients=True,
)
def batched_gradients(c: Context) -> str | None:
    s = c.subject
    at, leaves = s.leaves(c.exact)
    roots = differentiable(s(at))
    several = [upstream(roots, seed=seed) for seed in (15, 16, 17)]
    one_by_one = [s.pull(roots, leaves, dys, retain_graph=True) for dys in several]
    stacked = [torch.stack(dys) for dys in zip(*several, strict=True)]
    together = s.pull(roots, leaves, stacked, is_grads_batched=True)
    expected = [torch.stack(gs) for gs in zip(*one_by_one, strict=True)]
    together = [g if g.shape == e.shape else g.expand(e.shape) for g, e in zip(together, expected, strict=True)]
    c.compare(([], together), ([], expected), "with several upstream gradients at once", c.exact)
    return None


@check(
    "undefined-gradients",
    "an output whose gradient is undefined counts as one with a gradient of zeros",
    "a model that leaves one of several outputs out of its loss crashes, or trains on wrong gradients",
    gradients=True,
)
def undefined_gradients(c: Context) -> str | None:
    s = c.subject
    undefined = undefined_gradient()
    at, leaves = s.leaves(c.exact)
    count = len(differentiable(s(at)))
    for lost in range(count):
        at, leaves = s.leaves(c.exact)
        roots = differentiable(s(at))
        dys = upstream(roots)
        zeros = [torch.zeros_like(dy) if j == lost else dy for j, dy in enumerate(dys)]
        expected = s.pull(roots, leaves, zeros, retain_graph=True)
        hidden = [undefined(y) if j == lost else y for j, y in enumerate(roots)]
        got = s.pull(hidden, leaves, dys)
        name = f"output {lost}" if count > 1 else "the output"
        c.compare(([], got), ([], expected), f"where the gradient of {name} is undefined", c.exact)
    return None


@check(
    "zeros",
    "where an input is 0 its gradient equals the numerical one, and none is NaN where one-sided derivatives converge",
    "a zero in the data (padding, a silent pixel, a masked row) turns every weight into NaN, or gets a wrong gradient",
    gradients=True,
)
def zeros(c: Context) -> str | None:
    for i in c.need_inputs():
        x = c.exact.floats[i]
        column = torch.ones_like(x)
        column[..., :1] = 0
        for name, factor in (("is 0", torch.zeros_like(x)), ("has a column of zeros", column)):
            point = c.exact.put([t * factor if k == i else t for k, t in enumerate(c.exact.floats)])
            zero = (factor == 0).reshape(-1).nonzero().reshape(-1).cpu()[:4]

            def only(k: int, g: Tensor, i: int = i, zero: Tensor = zero) -> Tensor:
                return torch.cat([not_finite(g)[:4], zero[: 4 * (k == i)]]).unique()

            found = first_order(c, c.subject, point, only=only)
            if found.wrong:  # an entry at a kink has no derivative
                report(c, found, point, f"where {c.subject.names[i]} {name}, the gradient of", c.subject.names)
    return None


@check(
    "frozen",
    "with any one input or parameter frozen, and with only one that is not, the other gradients stay the same",
    "fine-tuning with frozen layers, or a first layer whose input needs no gradient, trains on wrong gradients",
    gradients=True,
)
def frozen(c: Context) -> str | None:
    s = c.subject
    _, full = s.run(c.given)
    of = dict(zip(s.wanted, full, strict=True))
    choices = [[k] for k in s.wanted] + [[k for k in s.wanted if k != out] for out in s.wanted]
    for chosen in choices:
        if not chosen or len(chosen) == len(s.wanted):
            continue
        _, grads = s.run(c.given, _dys(c, chosen), chosen)
        names = [s.names[k] for k in chosen]
        for k, g in zip(chosen, grads, strict=True):
            if (wrong := difference([g], [of[k]])) is not None:
                alone = f"{', '.join(names)} alone {'needs a gradient' if len(names) == 1 else 'need gradients'}"
                raise Failed(f"where {alone}, that of {s.names[k]} is {wrong}", c.example(c.given))
    if len(s.wanted) == 1:
        raise NotApplicable("only one tensor is differentiated")
    return None


def _dys(c: Context, chosen: list[int]) -> list[Tensor]:
    """The upstream gradients of the full run, for the outputs that depend on the chosen tensors."""
    full, _ = c.subject.leaves(c.given)
    part, _ = c.subject.leaves(c.given, chosen)
    ys, fewer = c.subject(full), c.subject(part)
    dys = iter(upstream(differentiable(ys)))
    of = [next(dys) if y.requires_grad else None for y in ys]
    return [dy for dy, y in zip(of, fewer, strict=True) if y.requires_grad and dy is not None]
