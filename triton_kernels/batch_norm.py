"""Batch normalization with a residual and an activation: statistics, forward and backward.

Forward, over the n values x of a channel c::

    mean = Σ x / n,  var = Σ (x - mean)² / n,  k = γ / √(var + eps)
    y = f(k (x - mean) + β + r)

Backward, where z or y is computed again, elementwise, instead of being read::

    dz = dy · f′(z),  dr = dz,  dβ = Σ dz,  dγ = Σ dz (x - mean) / √(var + eps)
    dx = k dz + shift + slope (x - mean),
    shift = (dmean - k dβ) / n,  slope = (2 dvar - k dγ / √(var + eps)) / n      both 0 where statistics are given
    dmean = -k dβ,  dvar = -k dγ / (2 √(var + eps))                             where statistics are given

A tensor is read as a matrix, of one of two kinds:

- rows: (rows, C), of 2-D and channels_last tensors. A tile is rows × up to 64 channels, a group is a tile's channels.
- planes: (N·C, points), of (N, C, ...) tensors. A tile of a reduction is some of the N rows of one channel, which is a
  group, × points.

A reduction over a channel is split over programs, each of which takes some tiles one after the other (see
:class:`Plan`). Each writes its own sums, which a second small kernel adds up in a fixed order: the same bits each time.
Statistics are sums of x - K and (x - K)² in float32, where K is the mean of the program's first tile: a common offset
of the data costs no digits. The sums of programs merge by the formula of Chan, Golub and LeVeque (1979,
STAN-CS-79-773). Where one program has a whole channel, it applies what it found too, in the same launch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from .batch_norm_kernels import (
    _apply,
    _backward_apply,
    _backward_whole,
    _finish,
    _forward_whole,
    _merge,
    _reduce,
    _statistics,
)
from .elementwise import Layout
from .epilogue import Epilogue, pair_of
from .launch import Block, device_of, first_block, grid_of, is_wide, tuned, warps_of

__all__ = ["Plan", "apply", "backward", "forward", "normalize_backward", "statistics"]

BY_ROWS, BY_PLANES = first_block("batch norm rows"), first_block("batch norm planes")
TILE = BY_ROWS.rows * BY_ROWS.columns  # two 16-byte accesses a thread in 16-bit dtypes
WARPS = warps_of(BY_ROWS)
PROGRAMS = 1024  # that a reduction is split into, where there is the work for them
FEWEST_TILES, MOST_TILES = 4, 64  # of a program of a reduction; beyond the most, Σ (x - K)² could lose digits
SPLITS_AT_ONCE, CHANNELS_AT_ONCE = 256, 8  # of the kernels that add up splits


@dataclass(frozen=True)
class Plan:
    """How a tensor is cut up: by its shape, its memory format and the block, so that the bits depend on nothing else.

    A channel's tiles are split so that there are about PROGRAMS programs over all groups, each with FEWEST_TILES to
    MOST_TILES tiles (or fewer, where a channel has fewer).
    """

    planes: bool
    rows: int
    """Of planes N, else all rows."""
    columns: int
    channels: int
    block_rows: int
    block_columns: int
    across: int
    """Tiles beside each other."""
    groups: int
    tiles: int
    """Of a group."""
    steps: int
    """Tiles of a program, of which the last may have fewer."""
    splits: int
    warps: int

    @property
    def n(self) -> int:
        """The number of values of a channel."""
        return self.rows * self.columns if self.planes else self.rows

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(planes: bool, rows: int, columns: int, channels: int, block: Block | None = None) -> Plan:
        block = block or (BY_PLANES if planes else BY_ROWS)
        block_columns = min(triton.next_power_of_2(columns), block.columns)
        block_rows = min(triton.next_power_of_2(rows), max(block.rows * block.columns // block_columns, 1))
        across = -(-columns // block_columns)
        groups = channels if planes else across
        tiles = -(-rows // block_rows) * (across if planes else 1)
        steps = -(-tiles * groups // PROGRAMS)
        steps = min(max(steps, FEWEST_TILES), MOST_TILES, tiles)
        return Plan(
            planes, rows, columns, channels, block_rows, block_columns, across, groups, tiles,
            steps, -(-tiles // steps), warps_of(block),
        )  # fmt: skip

    @staticmethod
    def for_tensor(x: Tensor, layout: Layout, block: Block | None = None) -> Plan:
        """Of x (N, C, ...), not empty."""
        n, channels = x.shape[:2]
        points = x.shape[2:].numel()
        if in_planes(x, layout):
            return Plan.of(True, n, points, channels, block)
        return Plan.of(False, n * points, channels, channels, block)

    def matrix(self) -> tuple[int, ...]:
        """The arguments of kernels over the whole matrix."""
        return (self.rows * self.channels if self.planes else self.rows, self.columns, self.channels, self.across)

    def grid(self) -> tuple[int]:
        """Of kernels over the whole matrix."""
        return grid_of(self.matrix()[0], self.block_rows, self.across)

    def reduction(self) -> tuple[int, ...]:
        """The arguments of kernels over groups."""
        return (self.rows, self.columns, self.channels, self.across)

    def groups_grid(self) -> tuple[int]:
        return grid_of(self.groups, 1, self.splits)

    def blocks(self, x: Tensor) -> tuple[Any, ...]:
        return (self.planes, self.block_rows, self.block_columns, is_wide(x))

    def columns_grid(self) -> tuple[int]:
        """Of the kernels that add up splits."""
        return grid_of(self.channels, CHANNELS_AT_ONCE)

    def splits_at_once(self) -> int:
        return min(triton.next_power_of_2(self.splits), SPLITS_AT_ONCE)


def in_planes(x: Tensor, layout: Layout) -> bool:
    """Whether a channel's points lie next to each other, rather than a point's channels."""
    return not layout.channels and x.shape[2:].numel() != 1


def _with_plan(run: Callable[..., Any]) -> Callable[..., Any]:
    """Gives ``run``, as its first two arguments, the layout of its x and the plan with the block for it."""
    names = list(inspect.signature(run).parameters)
    position = names.index("x" if "x" in names else "saved") - 2

    @wraps(run)
    def planned(*args: Any) -> Any:
        x = args[position] if "x" in names else args[position].x
        layout = Layout.of(x)
        family = "batch norm planes" if in_planes(x, layout) else "batch norm rows"
        return tuned(
            family,
            x.numel(),
            x,
            lambda block: run(layout, Plan.for_tensor(x, layout, block), *args),
            run.__name__.strip("_"),
        )

    return planned


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@_with_plan
def statistics(layout: Layout, plan: Plan, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, what rounding took from it, and biased var (C), float32, of x (N, C, ...) that is not empty."""
    mean, rest, var = torch.empty((3, x.shape[1]), dtype=torch.float32, device=x.device)
    _run_statistics(layout.flat(x), plan, mean, var, rest)
    return mean, rest, var


def _run_statistics(x: Tensor, plan: Plan, mean: Tensor, var: Tensor, rest: Tensor | None = None) -> None:
    partial = torch.empty((4, plan.splits, plan.channels), dtype=torch.float32, device=x.device)
    with device_of(x):
        _statistics[plan.groups_grid()](
            x, partial, *plan.reduction(), plan.groups, plan.steps, plan.tiles, plan.splits, *plan.blocks(x),
            num_warps=plan.warps,
        )  # fmt: skip
        _merge[plan.columns_grid()](
            partial, mean, rest, var, float(plan.n),
            plan.channels, plan.splits, plan.splits_at_once(), CHANNELS_AT_ONCE, num_warps=WARPS,
        )  # fmt: skip


@_with_plan
def forward(
    layout: Layout, plan: Plan,
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, e: Epilogue,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, in x's dtype promoted with the residual's, and the batch's mean and biased var in float32. x is not empty."""
    mean, var = (torch.empty(plan.channels, dtype=torch.float32, device=x.device) for _ in range(2))
    if plan.splits > 1:
        _run_statistics(layout.flat(x), plan, mean, var)
        y = _normalized(layout, plan, x, gamma, beta, residual, mean, var, eps, e)
        return y, mean, var
    flat, r, gamma, beta = layout.flat(x), layout.flat(residual), _vector(gamma), _vector(beta)
    y = layout.new(x, x.dtype if r is None else torch.promote_types(x.dtype, r.dtype))
    with device_of(x):
        _forward_whole[plan.groups_grid()](
            flat, gamma, beta, r, mean, var, y, eps, *pair_of(e), *plan.reduction(), plan.tiles,
            e.name, *plan.blocks(x), num_warps=plan.warps,
        )  # fmt: skip
    return y, mean, var


def _normalized(
    layout: Layout, plan: Plan,
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, mean: Tensor, var: Tensor,
    eps: float, e: Epilogue,
) -> Tensor:  # fmt: skip
    y = layout.new(x, x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    x, residual = layout.flat(x), layout.flat(residual)
    with device_of(x):
        _apply[plan.grid()](
            x, _vector(gamma), _vector(beta), residual, _vector(mean), _vector(var), y, eps, *pair_of(e),
            *plan.matrix(), e.name, *plan.blocks(x), num_warps=plan.warps,
        )  # fmt: skip
    return y


apply = _with_plan(_normalized)
"""y by statistics that are given, in x's dtype promoted with the residual's. x is not empty."""


def _new(like: Tensor, dtype: torch.dtype | None, needed: bool, layout: Layout | None = None) -> Any:
    return (layout or Layout()).new(like, dtype) if needed and dtype is not None else None


Gradients = list[Any]


class Saved(Protocol):
    """What backward reads, by name."""

    x: Any
    gamma: Any
    beta: Any
    r: Any
    mean: Any
    var: Any
    y: Any


Dtypes = Sequence["torch.dtype | None"]


@_with_plan
def backward(
    layout: Layout, plan: Plan,
    dy: Tensor, dmean: Tensor | None, dvar: Tensor | None, saved: Saved, eps: float, e: Epilogue,
    needs: Sequence[bool], dtypes: Dtypes,
) -> Gradients:  # fmt: skip
    """[dx, dγ, dβ, dr] of :func:`forward`, each where it is needed, in these dtypes.

    Args:
        dmean, dvar: the gradients of the statistics, or None.
        saved: of it y may be None: it is computed again from x, β and the residual.
        needs, dtypes: for x, γ, β and r.
    """
    identity = e.name == "identity"
    x, mean, var = saved.x, saved.mean, saved.var
    dx = _new(x, dtypes[0], needs[0], layout)
    dr = _new(x, dtypes[3], needs[3] and not identity, layout)
    given = dy
    dgamma, dbeta = (_new(mean, dtypes[i], needs[i]) for i in (1, 2))
    dy, x, residual, y = (layout.flat(t) for t in (dy, x, saved.r, saved.y))
    gamma, beta, dmean, dvar = (_vector(t) for t in (saved.gamma, saved.beta, dmean, dvar))
    tensors = (x, gamma, beta, residual, y, mean, var)
    constants = (e.name, e.told_by == "a", *plan.blocks(x))
    a, b = pair_of(e)
    with device_of(x):
        if plan.splits == 1:
            _backward_whole[plan.groups_grid()](
                dy, *tensors, dx, dr, dgamma, dbeta, dmean, dvar, eps, float(plan.n), a, b,
                *plan.reduction(), plan.tiles, *constants, num_warps=plan.warps,
            )  # fmt: skip
        else:
            partial = torch.empty((2, plan.splits, plan.channels), dtype=torch.float32, device=x.device)
            coefficients = None if dx is None else torch.empty((2, plan.channels), device=x.device)
            # Where dr is as exact as dy, the second sweep reads it instead of what dz is computed from.
            early = dr is not None and (dx is None or dr.dtype == dy.dtype)
            _reduce[plan.groups_grid()](
                dy, *tensors, None, dr if early else None, partial, eps, a, b, *plan.reduction(),
                plan.groups, plan.steps, plan.tiles, plan.splits, *constants, num_warps=plan.warps,
            )  # fmt: skip
            _finish[plan.columns_grid()](
                partial, gamma, var, dgamma, dbeta, dmean, dvar, coefficients, eps, float(plan.n),
                plan.channels, plan.splits, False, plan.splits_at_once(), CHANNELS_AT_ONCE, num_warps=WARPS,
            )  # fmt: skip
            if dx is not None:
                if early:
                    constants = ("identity", False, *plan.blocks(x))
                    tensors = (x, gamma, None, None, None, mean, var)
                _backward_apply[plan.grid()](
                    dr if early else dy, *tensors, coefficients, dx, None if early else dr, eps, a, b,
                    *plan.matrix(), *constants, num_warps=plan.warps,
                )  # fmt: skip
    if identity and needs[3]:
        dr = given.to(dtypes[3])
    return [dx, dgamma, dbeta, dr]


@_with_plan
def normalize_backward(
    layout: Layout, plan: Plan,
    dy: Tensor, saved: Saved, eps: float, e: Epilogue, needs: Sequence[bool], dtypes: Dtypes
) -> Gradients:  # fmt: skip
    """[dx, dγ, dβ, dr, dmean, dvar] of :func:`apply`, as :func:`backward`: one sweep, and a reduction where needed."""
    identity = e.name == "identity"
    x, mean, var = saved.x, saved.mean, saved.var
    dx = _new(x, dtypes[0], needs[0], layout)
    dr = _new(x, dtypes[3], needs[3] and not identity, layout)
    given = dy
    dy, x, residual, y = (layout.flat(t) for t in (dy, x, saved.r, saved.y))
    vectors: list[Any] = [_vector(t) for t in (saved.gamma, saved.beta, mean, var)]
    gamma, beta, mean, var = vectors
    of_channels = [_new(mean, dtypes[i], needs[i]) for i in (1, 2, 4, 5)]
    tensors = (x, gamma, beta, residual, y, mean, var)
    constants = (e.name, e.told_by == "a", *plan.blocks(x))
    a, b = pair_of(e)
    with device_of(x):
        if any(t is not None for t in of_channels):
            partial = torch.empty((2, plan.splits, plan.channels), dtype=torch.float32, device=x.device)
            _reduce[plan.groups_grid()](
                dy, *tensors, dx, dr, partial, eps, a, b, *plan.reduction(),
                plan.groups, plan.steps, plan.tiles, plan.splits, *constants, num_warps=plan.warps,
            )  # fmt: skip
            _finish[plan.columns_grid()](
                partial, gamma, var, *of_channels, None, eps, float(plan.n),
                plan.channels, plan.splits, True, plan.splits_at_once(), CHANNELS_AT_ONCE, num_warps=WARPS,
            )  # fmt: skip
        elif dx is not None or dr is not None:
            _backward_apply[plan.grid()](
                dy, *tensors, None, dx, dr, eps, a, b, *plan.matrix(), *constants, num_warps=plan.warps
            )  # fmt: skip
    if identity and needs[3]:
        dr = given.to(dtypes[3])
    dgamma, dbeta, dmean, dvar = of_channels
    return [dx, dgamma, dbeta, dr, dmean, dvar]
