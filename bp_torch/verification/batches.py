"""Checks of batch sizes: none, one, odd ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import Context, Rows
from .gradients import first_order, report
from .numeric import difference
from .registry import Failed, NotApplicable, check, line, refusal
from .subject import Point, differentiable, is_float, upstream

ODD = (1, 3, 5, 7, 9, 17, 31, 33, 63, 65, 127, 129, 255, 257)


@check(
    "empty-batch",
    "a batch of no rows gives outputs of no rows, and gradients of zeros for everything else",
    "the last, empty share of a distributed batch, or an empty selection, crashes the run",
    shrinks=False,
)
def empty_batch(c: Context) -> str | None:
    rows = c.need_rows()
    s = c.subject
    point = c.given.rows(rows.batched, torch.arange(0))
    try:
        ys, gs = s.run(point)
    except Exception as error:
        if refusal(error) is not None:
            raise
        raise Failed(f"a batch of no rows raises {line(error)}", c.example(point)) from error
    if rows.kind == "each":
        for y in ys:
            if y.shape[0] != 0:
                raise Failed(f"no rows in, {y.shape[0]} rows out", c.example(point))
        for k, g in zip(s.wanted, gs, strict=True):
            if g.numel() and not bool((g == 0).all()):
                raise Failed(f"the gradient of {s.names[k]} over no rows is not 0", c.example(point))
    return None


@check(
    "one-row",
    "a batch of one row: the same row as in the whole batch, and gradcheck",
    "the last batch of an epoch, or a single sample at inference, gives wrong results",
    shrinks=False,
)
def one_row(c: Context) -> str | None:
    rows = c.need_rows()
    point = c.exact.rows(rows.batched, torch.arange(1))
    with torch.no_grad():
        ys, whole = c.subject(point), c.subject(c.exact)
    if rows.kind == "each" and (wrong := difference(ys, [y[:1] for y in whole])) is not None:
        raise Failed(f"alone the first row gives {wrong}", c.example(point))
    if not c.differentiable:
        return None
    return report(c, first_order(c, c.subject, point, entries=16), point, "the gradient of", c.subject.names)


@check(
    "batch-sizes",
    "gradcheck for batches of two rows and of more than were given",
    "whoever trains with another batch size than the one that was tried trains on wrong gradients",
    gradients=True,
    shrinks=False,
)
def batch_sizes(c: Context) -> str | None:
    rows = c.need_rows()
    notes = []
    for n in (2, 2 * rows.count + 1):
        point, _ = many(c.exact, rows, n)
        what = f"for {n} rows the gradient of"
        notes.append(report(c, first_order(c, c.subject, point, entries=8), point, what, c.subject.names))
    return next(filter(None, notes), None)


@check(
    "odd-sizes",
    "batches of 1 to 257 rows, most of them odd, give what their rows give in small batches",
    "the rows of the last, partial block of a kernel are wrong: some samples are never trained on",
    shrinks=False,
)
def odd_sizes(c: Context) -> str | None:
    rows, s = c.need_rows(), c.subject
    if c.random:
        raise NotApplicable("random numbers: other rows draw others")
    if rows.kind is None:
        raise NotApplicable("the result of a row depends on the other rows")
    for n in ODD:
        point, parts = many(c.given, rows, n)
        try:
            got = s.run(point, _ones(c, point) if rows.kind != "each" else None)
        except Exception as error:
            if refusal(error) is not None:
                raise
            raise Failed(f"{n} rows raise {line(error)}", c.example(point)) from error
        roots = [y for y in s(s.leaves(point)[0]) if y.requires_grad]
        dys = upstream(roots)
        results, sizes, start = [], [], 0
        for part in parts:
            size = part.inputs[rows.batched[0]].shape[0]
            if rows.kind == "each":
                sent = [dy[start : start + size].clone() for dy in dys]
            else:
                sent = [d * (size / n if rows.kind == "mean" else 1) for d in _ones(c, part)]
            results.append(s.run(part, sent))
            sizes.append(size)
            start += size
        expected = _joined(c, results, sizes, n)
        c.compare(got, expected, f"with {n} rows, unlike the same rows in batches of {max(sizes)}", point)
    return None


def _ones(c: Context, point: Point) -> list[Tensor]:
    roots = differentiable(c.subject(c.subject.leaves(point)[0]))
    return [torch.ones_like(y) for y in roots]


def many(point: Point, rows: Rows, n: int) -> tuple[Point, list[Point]]:
    """n rows made of the point's, each a little different, and the same in parts of at most two rows more."""
    big = point.rows(rows.batched, torch.arange(n) % rows.count)
    factors = 1 + 0.1 * torch.linspace(-1, 1, n, dtype=torch.float64)
    inputs = list(big.inputs)
    for i in rows.batched:
        if is_float(inputs[i]):
            inputs[i] = inputs[i] * factors.to(inputs[i]).reshape(-1, *[1] * (inputs[i].dim() - 1))
    big = Point(tuple(inputs), big.parameters)
    # Even sizes: the parts must not have the defect themselves.
    size = max(2, rows.count - rows.count % 2)
    starts = range(0, n, size)
    return big, [big.rows(rows.batched, torch.arange(a, min(a + size, n))) for a in starts]


def _joined(
    c: Context, results: list[tuple[list[Tensor], list[Tensor]]], sizes: list[int], n: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What the whole batch should give: rows joined, means weighted, gradients of parameters summed."""
    rows = c.rows
    outputs = list(zip(*(ys for ys, _ in results), strict=True))
    if rows.kind == "each":
        ys = [torch.cat(parts) for parts in outputs]
    else:
        weights = [size / n if rows.kind == "mean" else 1.0 for size in sizes]
        ys = [
            sum((w * y for w, y in zip(weights, parts, strict=True)), torch.zeros_like(parts[0])) for parts in outputs
        ]
    floats = [i for i, t in enumerate(c.given.inputs) if is_float(t)]
    gs = []
    for k, parts in zip(c.subject.wanted, zip(*(gs for _, gs in results), strict=True), strict=True):
        by_row = k < len(floats) and floats[k] in rows.batched
        gs.append(torch.cat(parts) if by_row else torch.stack(parts).sum(0))
    return ys, gs
