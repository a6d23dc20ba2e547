"""Numerical derivatives with an estimate of their own error, and the comparison of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Comparison", "Wrong", "compare_gradients", "difference", "largest", "not_finite", "same_bits"]

F = Callable[[list[Tensor]], Sequence[Tensor]]

# Central differences of sixth order: f′ = Σ c_m (f(x + m h) - f(x - m h))/h + O(h⁶).
_WEIGHTS = {1.0: 45 / 60, 2.0: -9 / 60, 3.0: 1 / 60}


@dataclass(frozen=True)
class Wrong:
    """One entry of a gradient that numerical differentiation contradicts."""

    tensor: int
    index: tuple[int, ...]
    analytical: float
    numerical: float


@dataclass
class Comparison:
    wrong: list[Wrong] = field(default_factory=list)
    imprecise: list[Wrong] = field(default_factory=list)
    """Right to five digits, not to nine: a constant or an operation of lower precision."""
    entries: int = 0
    """Derivatives that were compared: of single entries, or along directions through many."""
    skipped: int = 0
    """Entries at a kink or a jump, where there is no derivative."""


def compare_gradients(
    f: F,
    tensors: list[Tensor],
    analytical: Sequence[Tensor],
    weights: Sequence[Tensor],
    at: Sequence[int],
    *,
    entries: int = 40,
    only: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare ``analytical``, the gradient of S = Σ ⟨weights, f(tensors)⟩, with numerical derivatives of S.

    A derivative along a direction d comes from differences of sixth order with steps h and h/2; their disagreement
    estimates the error. In float64 that is about 1e-13 of S's scale. It is wrong where it is off by more than 1e-5 of
    the gradient's scale and by ten times the estimate. Where the steps disagree (a kink within 0.6 % of x) smaller
    steps are tried; where one-sided derivatives disagree, or none converge, there is no derivative: it is skipped. A
    NaN or Inf is wrong where the derivatives on the sides on which f is finite converge, whether they agree or not.

    Tensors up to ``entries`` entries are compared entry by entry. In larger ones random directions cover all entries
    at once, are halved until a single wrong entry is found, and some entries are compared on their own, NaN first.

    Args:
        tensors: the arguments of f; ``at`` are the positions of those that ``analytical`` belongs to.
        only: for each of these the entries to compare, counted through, in place of those chosen here.
    """
    result = Comparison()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for j, (k, g) in enumerate(zip(at, analytical, strict=True)):
            n = g.numel()
            if only is not None:
                single = only[j]
            elif n <= entries:
                single = torch.arange(n)
            else:
                single = torch.cat([not_finite(g)[:4], torch.randperm(n, generator=generator)[: entries // 2]])
            if len(single) == 0:
                continue
            line = _Line(f, tensors, weights, k, g, result)
            for i in single.tolist():
                line.visit(torch.tensor([i]), torch.ones(1))
            if only is None and n > entries:
                for _ in range(2):
                    signs = torch.randint(2, (n,), generator=generator) * 2.0 - 1
                    line.bisect(torch.arange(n), signs)
    return result


class _Line:
    """Derivatives of S along directions of one tensor."""

    def __init__(
        self, f: F, tensors: list[Tensor], weights: Sequence[Tensor], k: int, g: Tensor, result: Comparison
    ) -> None:
        self.f, self.tensors, self.weights, self.k, self.result = f, tensors, weights, k, result
        self.g = g.detach().double().reshape(-1).cpu()
        self.x = tensors[k].detach()
        self.double = self.x.dtype == torch.float64
        size = max((float(w.abs().max()) for w in weights if w.numel()), default=0.0)
        ys = [y.double() for y in f(tensors)]
        values = [float((w.double() * y).abs().sum()) for w, y in zip(weights, ys, strict=True) if y.numel()]
        self.level = max(sum(v for v in values if v == v and v != float("inf")), size, 1e-30)

    def value(self, step: float, direction: Tensor) -> list[Tensor]:
        moved = list(self.tensors)
        moved[self.k] = self.x + (step * direction).to(self.x.dtype)
        return [y.double() for y in self.f(moved)]

    def dot(self, ys: Sequence[Tensor], zs: Sequence[Tensor], scale: float) -> float:
        pairs = zip(self.weights, ys, zs, strict=True)
        return sum(float((w.double() * (y - z)).sum()) for w, y, z in pairs) * scale

    def derivative(self, direction: Tensor, h: float) -> tuple[float, float]:
        """The derivative and the estimate of its error."""
        found = []
        cache: dict[float, list[Tensor]] = {}

        def at(step: float) -> list[Tensor]:
            if step not in cache:
                cache[step] = self.value(step, direction)
            return cache[step]

        for step in (h, h / 2):
            found.append(sum(self.dot(at(m * step), at(-m * step), c / step) for m, c in _WEIGHTS.items()))
        coarse, fine = found
        return fine, abs(fine - coarse)

    def test(self, index: Tensor, signs: Tensor) -> str:
        """right, wrong, imprecise or unclear; and what was found in ``self.last``."""
        direction = torch.zeros(self.g.numel(), dtype=torch.float64)
        direction[index] = signs.double()
        analytical = float((self.g[index] * signs).sum())
        near = max(1.0, float(self.x.reshape(-1)[index.to(self.x.device)].abs().max()))
        on = direction.reshape(self.x.shape).to(self.x.device)
        scale = max(float(self.g[index].norm()), abs(analytical))
        scale = max(scale, 1e-3 * largest(self.g))
        self.result.entries += 1
        if not math.isfinite(analytical):
            self.last = analytical, next(iter(self.one_sided(on, near)), math.nan)
            return "unclear" if math.isnan(self.last[1]) or len(index) > 1 else "wrong"
        for h in (2e-3, 1e-5) if self.double else (6e-2, 1e-2):
            h *= near
            numerical, doubt = self.derivative(on, h)
            self.last = analytical, numerical
            error = abs(analytical - numerical)
            floor = (1e-15 if self.double else 1e-6) * self.level / h
            scale = max(scale, abs(numerical))
            if not doubt <= max(1e-3 * scale, 100 * floor):
                continue  # NaN, or a kink in reach of the stencil
            if error <= 1e-9 * scale + floor or (not self.double and error <= 1e-3 * scale + 30 * floor + 10 * doubt):
                return "right"
            if error <= 1e-5 * scale + 10 * doubt + 30 * floor:
                # Nothing is said of a difference that the numerical derivative does not resolve itself.
                return "imprecise" if doubt < error / 100 and error > 30 * floor else "right"
            if doubt > max(0.1 * abs(numerical), 100 * floor):
                continue  # the function bends within the stencil: steep at x, and flat around
            return "unclear" if self.kink(on, 1e-6 * near, numerical, scale) else "wrong"
        return "unclear"

    def kink(self, direction: Tensor, h: float, numerical: float, scale: float) -> bool:
        """Whether the derivatives to the right and to the left differ."""
        here, right, left = self.value(0.0, direction), self.value(h, direction), self.value(-h, direction)
        gap = abs(self.dot(right, here, 1 / h) - self.dot(here, left, 1 / h))
        return not gap < 1e-2 * scale + 1e-15 * self.level / h

    def one_sided(self, direction: Tensor, near: float) -> list[float]:
        """The derivatives on the sides where f is finite; none if one of them does not converge."""
        found = []
        here = self.value(0.0, direction)
        for side in (1, -1):
            steps = [side * near * h for h in ((1e-3, 1e-4, 1e-5) if self.double else (6e-2, 2e-2, 6e-3))]
            a, b, c = (self.dot(self.value(step, direction), here, 1 / step) for step in steps)
            if math.isnan(c):
                continue
            noise = (1e-14 if self.double else 1e-6) * self.level / abs(steps[-1])
            if not abs(c - b) <= max(0.5 * abs(b - a), noise):
                return []
            found.append(c)
        return found

    def visit(self, index: Tensor, signs: Tensor) -> str:
        verdict = self.test(index, signs)
        if verdict in ("wrong", "imprecise"):
            place = tuple(int(i) for i in torch.unravel_index(index[0], self.x.shape)) if self.x.dim() else ()
            entry = Wrong(self.k, place, self.last[0] * float(signs[0]), self.last[1] * float(signs[0]))
            (self.result.wrong if verdict == "wrong" else self.result.imprecise).append(entry)
        elif verdict == "unclear":
            self.result.skipped += 1
        return verdict

    def bisect(self, index: Tensor, signs: Tensor, budget: int = 60) -> None:
        """Look for a wrong entry where the derivative along many entries is wrong."""
        pending = [(index, signs)]
        while pending and budget > 0 and not self.result.wrong:
            index, signs = pending.pop()
            budget -= 1
            if len(index) == 1:
                self.visit(index, signs)
            elif self.test(index, signs) in ("wrong", "unclear"):
                half = len(index) // 2
                pending += [(index[half:], signs[half:]), (index[:half], signs[:half])]


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative to the largest value: what another order of summation may change."""


def difference(
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float | None = None,
    sizes: Sequence[float] | None = None,
) -> str | None:
    """How two lists of tensors differ, beyond another order of summation; None if they do not. NaN equals NaN.

    The tolerance is relative to the largest value of a tensor, or to its entry in ``sizes`` if that is larger.
    """
    if len(got) != len(expected):
        return f"{len(got)} tensors instead of {len(expected)}"
    overall = max((largest(b) for b in expected if b.is_floating_point()), default=0.0)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        where = f" of tensor {i}" if len(got) > 1 else ""
        if a.shape != b.shape:
            return f"shape {tuple(a.shape)} instead of {tuple(b.shape)}{where}"
        if a.dtype != b.dtype:
            return f"{a.dtype} instead of {b.dtype}{where}".replace("torch.", "")
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"other values{where}"
            continue
        bound = TOLERANCE.get(a.dtype, 1e-4) if tolerance is None else tolerance
        wide_a, wide_b = a.detach().double(), b.detach().double()
        limit = bound * max(largest(b), sizes[i] if sizes else 0.0) + 16 * torch.finfo(a.dtype).eps * overall
        same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
        error = torch.where(same, torch.zeros_like(wide_a), (wide_a - wide_b).abs())
        bad = ~(error <= limit)
        if bad.any():
            flat = int(torch.where(error.isnan(), torch.inf, error).argmax())
            place = tuple(int(k) for k in torch.unravel_index(torch.tensor(flat), a.shape)) if a.dim() else ()
            at = f" at {list(place)}" if place else ""
            return f"{float(wide_a.reshape(-1)[flat]):.6g} instead of {float(wide_b.reshape(-1)[flat]):.6g}{at}{where}"
    return None


def largest(t: Tensor) -> float:
    """The largest absolute value that is finite."""
    finite = t.detach()[t.detach().isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def not_finite(t: Tensor) -> Tensor:
    """Where it is NaN or Inf, counted through."""
    return (~t.detach().isfinite()).reshape(-1).nonzero().reshape(-1).cpu()


def same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(got) == len(expected) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(got, expected, strict=True)
    )
