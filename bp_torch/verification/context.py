"""What every check is given: the subject, the points where it is evaluated, and what is known about it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._torch import tree_leaves
from .numeric import difference, largest, same_bits
from .registry import Failed, NotApplicable, describe, line, refusal
from .subject import Point, Subject, differentiable, is_float

__all__ = ["Context", "Rows"]


@dataclass(frozen=True)
class Rows:
    """How the results depend on the rows of the inputs (their dimension 0).

    Attributes:
        count: rows given.
        batched: the positions among the flattened inputs that have a row for each row of the batch.
        kind: ``"each"`` if a row of the outputs depends on that row of the inputs alone; ``"mean"`` or ``"sum"`` if
            the output is that of the rows' own outputs; None if nothing of the kind was found.
    """

    count: int
    batched: tuple[int, ...]
    kind: str | None


class Context:
    """The subject with the values given, their float64 copies, and what was found out about it."""

    def __init__(self, subject: Subject, reference: Subject | None, compiler: str) -> None:
        self.subject, self.reference, self.compiler = subject, reference, compiler
        self.given = subject.point
        self.fewer_rows = "the first has none, or no rows"
        self.double_refused: Exception | None = None
        self.exact = self.given.to(torch.float64)
        subject.in_place = self._works_in_place()
        try:
            subject.run(self.exact)
        except Exception as error:
            # The given values worked forward: what fails is float64, or backward, which the checks will report.
            if refusal(error) is not None or self._raises(self.exact):
                self.double_refused, self.exact = error, self.given

    def _raises(self, point: Point) -> bool:
        try:
            with torch.no_grad():
                self.subject(point)
        except Exception:
            return True
        return False

    @property
    def dtype(self) -> torch.dtype:
        return self.given.floats[0].dtype

    def with_rows(self, rows: Sequence[int]) -> Context:
        """The same on these rows."""
        other = copy.copy(self)
        index = torch.tensor(rows)
        other.given = self.given.rows(self.rows.batched, index)
        other.exact = self.exact.rows(self.rows.batched, index)
        other.subject = self.subject.at(other.given)
        other.__dict__["rows"] = Rows(len(rows), self.rows.batched, self.rows.kind)
        return other

    def _works_in_place(self) -> bool:
        """Whether the subject overwrites an input and says so, as ReLU(inplace=True) does."""
        with torch.no_grad():
            point = self.given.to(self.dtype)
            versions = [t._version for t in point.floats]
            self.subject(point)
            return any(t._version > v for t, v in zip(point.floats, versions, strict=True))

    @cached_property
    def deterministic(self) -> bool:
        """Whether two calls with one seed agree, up to another order of summation."""
        with torch.no_grad():
            first, second = self.subject(self.given), self.subject(self.given)
        return difference(first, second) is None

    @cached_property
    def random(self) -> bool:
        """Whether the results depend on random numbers."""
        s = self.subject
        with torch.no_grad():
            s.sow()
            results = [s.call(self.given) for _ in range(4)]
        return any(not same_bits(results[0], other) for other in results[1:])

    @cached_property
    def differentiable(self) -> bool:
        at, _ = self.subject.leaves(self.exact)
        return bool(differentiable(self.subject(at)))

    @cached_property
    def rows(self) -> Rows:
        tensors = [t for t in self.exact.inputs if isinstance(t, Tensor)]
        first = next((t for t in tensors if is_float(t)), tensors[0])
        if first.dim() == 0 or first.shape[0] == 0:
            return Rows(0, (), None)
        n = first.shape[0]
        position = next(i for i, t in enumerate(self.exact.inputs) if t is first)
        alike = tuple(
            i for i, t in enumerate(self.exact.inputs) if isinstance(t, Tensor) and t.dim() and t.shape[0] == n
        )
        fallback: Rows | None = None
        # A weight can have as many rows as the batch by chance: the larger set is tried first, then x alone.
        for batched in dict.fromkeys((alike, (position,))):
            kind = self._kind(batched, n)
            if kind in ("each", "mean", "sum"):
                return Rows(n, batched, kind)
            if kind == "whole" and fallback is None:
                fallback = Rows(n, batched, None)
        return fallback or Rows(n, (), None)

    def _kind(self, batched: tuple[int, ...], n: int) -> str | None:
        """How results depend on rows; "whole" if in another way, None if fewer rows are refused."""
        s = self.subject
        many = self.exact if n > 1 else self.exact.rows(batched, torch.zeros(3, dtype=torch.long))
        n, k = max(n, 3) if n == 1 else n, max(1, n // 2)
        # Other values in each row, so that a mean differs from a row.
        spread = torch.linspace(0.9, 1.1, n, dtype=torch.float64)
        inputs = list(many.inputs)
        for i in batched:
            if is_float(inputs[i]):
                factor = spread.to(inputs[i]).reshape(-1, *[1] * (inputs[i].dim() - 1))
                inputs[i] = inputs[i] * factor
        many = Point(tuple(inputs), many.parameters)
        try:
            with torch.no_grad():
                whole = s(many)
                parts = [s(many.rows(batched, torch.arange(a, b))) for a, b in ((0, k), (k, n))]
        except Exception as error:
            self.fewer_rows = line(error)
            return None
        kind = self._kind_of(whole, parts, n, k)
        if kind in ("mean", "sum") and n <= 16:
            # Halves can agree by chance, for instance where as many targets are ignored in both.
            with torch.no_grad():
                single = [s(many.rows(batched, torch.tensor([r])))[0] for r in range(n)]
            total = torch.stack(single).sum(0)
            if difference([total / n if kind == "mean" else total], [whole[0]], 1e-4) is not None:
                return "whole"
        return kind

    def _kind_of(self, whole: Sequence[Tensor], parts: Sequence[Sequence[Tensor]], n: int, k: int) -> str:
        if all(y.dim() and y.shape[0] == n for y in whole) and all(len(p) == len(whole) for p in parts):
            try:
                joined = [torch.cat(pair) for pair in zip(*parts, strict=True)]
            except RuntimeError:
                return "whole"
            return "each" if difference(joined, whole, 1e-4) is None else "whole"
        if len(whole) == 1 and whole[0].numel() == 1 and whole[0].is_floating_point():
            (y,), (a,), (b,) = whole, *parts
            if a.shape == b.shape == y.shape:
                if difference([(k * a + (n - k) * b) / n], [y], 1e-4) is None:
                    return "mean"
                if difference([a + b], [y], 1e-4) is None:
                    return "sum"
        return "whole"

    @cached_property
    def typical(self) -> tuple[list[float], list[float]]:
        """The largest absolute values of each output and of each wanted gradient, at the values given."""
        ys, gs = self.subject.run(self.given)
        return [largest(y) for y in ys], [largest(g) for g in gs]

    def need_rows(self) -> Rows:
        if not self.rows.batched:
            raise NotApplicable(f"no dimension 0 of the inputs is a batch: {self.fewer_rows}")
        return self.rows

    def need_inputs(self) -> list[int]:
        """Positions among the floats that are inputs, not parameters."""
        count = len(self.given.floats) - len(self.given.parameters)
        if count == 0:
            raise NotApplicable("no input is a floating-point tensor")
        return list(range(count))

    def example(self, point: Point, **more: Tensor) -> dict[str, str]:
        """The tensors of a point by name, as text."""
        named = dict(zip(self.subject.names, point.floats, strict=True))
        for i, t in enumerate(tree_leaves(list(point.inputs))):
            if isinstance(t, Tensor) and not is_float(t):
                named[f"input {i}"] = t
        return {name: describe(t) for name, t in (named | more).items()}

    def compare(
        self,
        got: tuple[list[Tensor], list[Tensor]],
        expected: tuple[list[Tensor], list[Tensor]],
        what: str,
        point: Point,
        tolerance: float | None = None,
        wanted: list[int] | None = None,
        **more: Tensor,
    ) -> None:
        """Raise Failed unless outputs and gradients agree."""
        # Where all values happen to be small (a constant column, normalized) rounding is as large as elsewhere.
        typical = self.typical if wanted is None else ([], [])
        floors = typical[0] if len(typical[0]) == len(got[0]) else [0.0] * len(got[0])
        if (wrong := difference(got[0], expected[0], tolerance, floors)) is not None:
            raise Failed(f"{what}: the output is {wrong}", self.example(point, **more))
        chosen = self.subject.wanted if wanted is None else wanted
        names = [self.subject.names[i] for i in chosen] if expected[1] else []
        floors = typical[1] if len(typical[1]) == len(got[1]) else [0.0] * len(got[1])
        size = max((largest(g) for g in expected[1]), default=0.0)
        for name, a, b, floor in zip(names, got[1], expected[1], floors, strict=True):
            if (wrong := difference([a], [b], tolerance, [floor])) is None:
                continue
            # A gradient that is zero but for rounding has no digits of its own.
            alike = a.shape == b.shape and a.dtype == b.dtype and a.is_floating_point()
            if alike and float((a - b).abs().max()) <= 64 * torch.finfo(a.dtype).eps * size:
                continue
            raise Failed(f"{what}: the gradient of {name} is {wrong}", self.example(point, **more))
