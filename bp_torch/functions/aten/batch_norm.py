"""Batch norm by ATen's CPU kernels, which do several passes of the formulas in one.

The formulas stand in ../batch_norm.py, with their symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...mode import wide
from ..batch_norm import BatchNormFunction, NormalizeFunction, Saved, needed, result_dtype
from ..channels import channel, count_of, dims_of
from ..epilogue import Epilogue
from ..function import ATEN
from ..sync_batch_norm import SyncStatisticsFunction, centred, merged
from . import epilogue

__all__ = ["is_fused", "normalize"]

aten = torch.ops.aten

CHUNK = 2**18
"""Elements that one step of a pass takes: what it computes on the way stays in a core's cache."""
FRESH = 24 * 2**20
"""Bytes from which a new tensor's memory comes fresh from the system, each time, and costs more than the arithmetic of
a pass: at 17 MB the pass in steps took 1.2 times the time of ATen's kernel, at 29 MB 0.8.
"""


def is_fused(x: Tensor) -> bool:
    """Whether ATen's kernels serve for x."""
    return x.is_cpu and x.numel() > 0


def _native(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else wide(p) for p in parameters]


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, mean: Tensor, var: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """z, by statistics that are given."""
    z, _, _ = aten.native_batch_norm(wide(x), *_native(gamma, beta, mean, var), False, 0.0, eps)
    return _add(z, r)


def _with_statistics(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean, var.

    ATen adds up a contiguous plane in float64, but rows one by one in their own dtype: at a mean of 1e5 and a deviation
    of 1 its variance was 130 for NHWC float32 data, 850 for (65536, 8). Where that may have cost more than rounding,
    the statistics are taken again.
    """
    x = wide(x)
    n, channels = count_of(x), x.shape[1]
    if n > 1:
        mean, var = x.new_zeros(channels), x.new_zeros(channels)
        z, _, _ = aten.native_batch_norm.default(x, *_native(gamma, beta), mean, var, True, 1.0, eps)
        exact = x.shape[2:].numel() > 1 and x.is_contiguous()
        if not exact:
            # n additions about a mean of k deviations lose about 2⁻²⁶ k √n of one: up to 1e-5 here, that is k² ≤ most.
            most = (2**26 * 1e-5) ** 2 / n
            exact = float(mean.square().sub_(var, alpha=most).amax()) <= 0
        if exact:  # var moved from 0 by its whole way to the unbiased variance
            return _add(z, r), mean, var.mul_((n - 1) / n)
    return _accurate_forward(x, gamma, beta, r, eps)


def _accurate_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean, var, whatever the mean.

    ATen returns the variance about its own mean m, var + (mean - m)². A small excess is subtracted, and with a large
    one the statistics are those of x - mean. Those are summed pairwise: row by row, squares of numbers that are all
    multiples of one rounding of the mean lost 6e-5 of the variance of 65,536.
    """
    m, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    mean = x.mean(dims_of(x))
    excess = (mean - m).square_()
    # The exact mean is no number of this dtype: it may be half a unit of its last place away.
    lost = mean * (torch.finfo(x.dtype).eps / 2)
    if bool((excess + lost.square_() <= 1e-6 * var).all()):
        var = var.sub_(excess)
        z, _, _ = aten.native_batch_norm(x, *_native(gamma, beta), mean, var, False, 0.0, eps)
    else:
        z = x - channel(mean, x)
        var, rest = torch.var_mean(z, dims_of(z), correction=0)
        z, _, _ = aten.native_batch_norm(z, *_native(gamma, beta), rest, var, False, 0.0, eps)
        mean = torch.where(mean.isfinite(), mean + rest, mean)  # an infinity stays one
    return _add(z, r), mean, var


def _add(z: Tensor, r: Tensor | None) -> Tensor:
    """z + r, in z where it fits."""
    if r is None:
        return z
    return z.add_(r) if z.dtype == torch.promote_types(z.dtype, r.dtype) else z + r


def _through_statistics(
    dz: Tensor, saved: Saved, eps: float, training: bool, needs: Sequence[bool], ours: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dγ, dβ; dx in dz's memory if it is ``ours``."""
    x, gamma, mean, var = saved.x, saved.gamma, saved.mean, saved.var
    s = torch.rsqrt(var + eps) if training else None
    statistics = (mean, var, None, None) if s is None else (None, None, mean, s)
    if s is None or not (ours and needs[0] and _in_steps(x, dz)):
        return aten.native_batch_norm_backward.default(
            dz, wide(x), *_native(gamma, *statistics), training, eps, list(needs)
        )
    # dx is written into dz.
    _, dgamma, dbeta = aten.native_batch_norm_backward.default(
        dz, x, *_native(gamma, *statistics), training, eps, [False, True, True]
    )
    n = count_of(x)
    k = s if gamma is None else gamma * s
    mean, k, of_xhat, shift = (channel(t, x) for t in (mean, k, k * s * dgamma / -n, k * dbeta / -n))
    step = max(1, CHUNK * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], step):
        i = slice(start, start + step)
        torch.addcmul(shift, dz[i], k, out=dz[i])
        dz[i].addcmul_(x[i] - mean, of_xhat)
    return dz, dgamma if needs[1] else None, dbeta if needs[2] else None


def _in_steps(x: Tensor, dz: Tensor) -> bool:
    """Whether dx is faster written into dz: it is large, and a row of channels lies together, as in ``channels_last``;
    numbers of a channel that repeat along a plane make the steps 1.3 to 1.9 times as slow as ATen's kernel.
    """
    return x.numel() * x.element_size() >= FRESH and x.dtype == dz.dtype and x.stride(1) == dz.stride(1) == 1


def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, m: Tensor | None, eps: float, e: Epilogue
) -> Any:
    if not is_fused(x):
        return NotImplemented
    z, mean, var = _with_statistics(x, gamma, beta, r, eps)
    return _followed(e, z, m, result_dtype(x, r)), mean, var


def _apply(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, mean: Tensor, var: Tensor,
    m: Tensor | None, eps: float, e: Epilogue,
) -> Any:  # fmt: skip
    if not is_fused(x):
        return NotImplemented
    return _followed(e, normalize(x, gamma, beta, r, mean, var, eps), m, result_dtype(x, r))


def _followed(e: Epilogue, z: Tensor, m: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y, in this dtype, from a z that is ours."""
    y = epilogue.forward(e, z, m)[0] if e.told_by or e.p > 0 else z
    return y if y.dtype is dtype else y.to(dtype)


def _dz(e: Epilogue, eps: float, dy: Tensor, saved: Saved) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z), wide."""
    dy, s = wide(dy), saved.y
    if s is None and e.told_by:
        s = normalize(saved.x, saved.gamma, saved.beta, saved.r, saved.mean, saved.var, eps)
        s = epilogue.activate(e, s) if e.told_by == "a" else s
    return epilogue.backward(e, dy, s if s is None else s.to(dy.dtype), saved.m)


def _backward(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None
) -> Any:
    saved = Saved(*saved)
    if dy is None or dmean is not None or dvar is not None or not _serves(saved, dy):
        return NotImplemented
    return *_gradients(ctx, dy, saved, training=True), None, None, None


def _apply_backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> Any:
    saved = Saved(*saved)
    if any(ctx.needs_input_grad[4:6]) or not _serves(saved, dy):
        return NotImplemented
    return *_gradients(ctx, dy, saved, training=False), None, None, None, None, None


def _gradients(ctx: Any, dy: Tensor, saved: Saved, training: bool) -> list[Tensor | None]:
    """dx, dγ, dβ and dr."""
    needs, dtypes, e = ctx.needs_input_grad, ctx.dtypes, ctx.e
    dz = _dz(e, ctx.eps, dy, saved)
    # Whether dz was made here, and is nobody's gradient.
    ours = bool(e.told_by or e.p > 0) and dtypes[3] is None
    return needed(needs, dtypes, *_through_statistics(dz, saved, ctx.eps, training, needs[:3], ours), dz)


def _serves(saved: Saved, dy: Tensor) -> bool:
    """Whether dz will have the dtype that x is computed in: a residual of a wider one makes it wider."""
    x = saved.x
    return x is not None and is_fused(x) and wide(dy).dtype == torch.promote_types(x.dtype, torch.float32)


def _statistics(x: Tensor, group: Any) -> Any:
    if not is_fused(x):
        return NotImplemented
    mean, z = centred(x)
    rest, var = torch.batch_norm_update_stats(z, None, None, 0.0)
    return merged(x, mean, rest, var, group)


BatchNormFunction.faster(ATEN, forward=_forward, backward=_backward)
NormalizeFunction.faster(ATEN, forward=_apply, backward=_apply_backward)
SyncStatisticsFunction.faster(ATEN, forward=_statistics)
