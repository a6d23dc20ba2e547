"""The statistics of a batch norm over several processes; batch_norm.py normalizes by them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import collectives
from ..mode import wide
from .channels import channel, count_of, dims_of, statistics_of
from .function import Function, call

__all__ = ["AllReduceFunction", "SyncStatisticsFunction", "centred", "merged"]


class AllReduceFunction(Function):
    """t = Σ over the group's ranks of their t.

    Backward: dt = Σ over ranks of their dt, for the sum of all ranks' losses.
    """

    @staticmethod
    def forward(t: Tensor, group: Any) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        if torch.compiler.is_compiling():
            reduced: Tensor = collectives().all_reduce(t, "sum", _named(group))
            return reduced
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor | None, ...]:
        return call(AllReduceFunction, dt, ctx.group), None

    @staticmethod
    def jvp_rule(ctx: Any, tt: Tensor, *_: None) -> Tensor:
        return call(AllReduceFunction, tt, ctx.group)


def _named(group: Any) -> Any:
    """The group for torch's functional collectives, which compilers can trace; they have no default."""
    return dist.group.WORLD if group is None else group


def _gathered(own: Tensor, group: Any) -> Tensor:
    """Each rank's tensor, in a new first dimension."""
    world = dist.get_world_size(group)
    if torch.compiler.is_compiling():
        gathered: Tensor = collectives().all_gather_tensor(own, 0, _named(group)).reshape(world, *own.shape)
        return gathered
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=group)
    return torch.stack(parts)


class SyncStatisticsFunction(Function):
    """mean, var and count n of a channel over all rows of all ranks; a rank may have none.

    Each rank's own statistics merge by the formula of Chan, Golub and LeVeque (1979, STAN-CS-79-773), in float64:
    mean = Σ nᵣ meanᵣ / n and var = Σ nᵣ (varᵣ + (meanᵣ - mean)²) / n.

    Backward: with dmean and dvar summed over ranks, dx = (dmean + 2 (x - mean) dvar)/n.
    """

    @staticmethod
    def forward(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean, z = centred(x)
        return merged(x, mean, *statistics_of(z), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.group = inputs
        mean, _, count = output
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, mean, count)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        mean, _, count = output
        ctx.save_for_forward(inputs[0], mean, count)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, mean, count = ctx.saved_tensors
        dmean, dvar = call(AllReduceFunction, torch.stack([dmean, dvar]), ctx.group) / count.to(mean.dtype)
        dx = channel(dmean, x) + (x - channel(mean, x)) * channel(2 * dvar, x)
        return dx.to(x.dtype), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, *_: None) -> tuple[Tensor, Tensor, None]:
        x, mean, count = ctx.saved_tensors
        own = torch.stack([wide(tx).sum(dims_of(x)), 2 * ((x - channel(mean, x)) * tx).sum(dims_of(x))])
        tmean, tvar = call(AllReduceFunction, own, ctx.group) / count.to(mean.dtype)
        return tmean, tvar, None


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """A channel's mean, and x without it, whose own mean is what rounding lost."""
    mean = wide(x).sum(dims_of(x)) / count_of(x)
    return mean, x - channel(mean, x)


def merged(x: Tensor, mean: Tensor, rest: Tensor, var: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """mean, var and n over all ranks, from this rank's mean, what rounding took from it, and var."""
    rows = torch.full_like(mean, x.shape[0] * math.prod(x.shape[2:]))
    own = torch.stack([mean.double() + rest, var.double(), rows.double()])
    means, variances, counts = _gathered(own, group).unbind(1)
    count = counts.sum(0)
    n = count.clamp(min=1)
    total_mean = (counts * means).sum(0) / n
    total_var = (counts * (variances + (means - total_mean) ** 2)).sum(0) / n
    return total_mean.to(mean.dtype), total_var.to(var.dtype), count[0]
