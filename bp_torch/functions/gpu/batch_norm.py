"""Batch norm by Triton kernels. Dropout is a pass of its own: drawing masks inside the reductions made them spill
registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import kernels_for
from .. import dropout as formula
from ..batch_norm import BatchNormFunction, NormalizeFunction, Saved
from ..dropout import may_draw
from ..epilogue import Epilogue
from ..function import TRITON
from ..sync_batch_norm import SyncStatisticsFunction, merged
from . import dropout


def _kernels(x: Tensor | None, m: Tensor | None, *others: Tensor | None) -> Any:
    return kernels_for(x, *others) if x is not None and x.numel() > 0 and may_draw(m) else None


def _drop(x: Tensor, m: Tensor | None, p: float) -> Tensor:
    dropped: Tensor = formula.drop(x, m, p) if m is None else dropout.drop(x, m, p)
    return dropped


def _forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, m: Tensor | None, eps: float, e: Epilogue
) -> Any:
    triton = _kernels(x, m, gamma, beta, r)
    if triton is None:
        return NotImplemented
    a, mean, var = triton.batch_norm.forward(x, gamma, beta, r, eps, e)
    return _drop(a, m, e.p), mean, var


def _backward(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None
) -> Any:
    saved = Saved(*saved)
    triton = None if dy is None else _kernels(saved.x, saved.m, dy, dmean, dvar, *_beside(saved))
    if triton is None or dy is None:
        return NotImplemented
    da = _drop(dy, saved.m, ctx.e.p)
    gradients = triton.batch_norm.backward(
        da, dmean, dvar, _read(saved, ctx.e, ctx.dtypes), ctx.eps, ctx.e, ctx.needs_input_grad, ctx.dtypes
    )
    return *gradients, None, None, None


def _apply(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, mean: Tensor, var: Tensor,
    m: Tensor | None, eps: float, e: Epilogue,
) -> Any:  # fmt: skip
    triton = _kernels(x, m, gamma, beta, r, mean, var)
    if triton is None:
        return NotImplemented
    return _drop(triton.batch_norm.apply(x, gamma, beta, r, mean, var, eps, e), m, e.p)


def _apply_backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> Any:
    saved = Saved(*saved)
    triton = _kernels(saved.x, saved.m, dy, *_beside(saved))
    if triton is None:
        return NotImplemented
    da = _drop(dy, saved.m, ctx.e.p)
    gradients = triton.batch_norm.normalize_backward(
        da, _read(saved, ctx.e, ctx.dtypes), ctx.eps, ctx.e, ctx.needs_input_grad, ctx.dtypes
    )
    return *gradients, None, None, None


def _beside(saved: Saved) -> tuple[Tensor | None, ...]:
    """The tensors beside x and m."""
    return saved.gamma, saved.beta, saved.r, saved.mean, saved.var, saved.y


def _read(saved: Saved, e: Epilogue, dtypes: Sequence[torch.dtype | None]) -> Saved:
    """What the kernels read: y is computed again where that reads less, unless it tells the mask."""
    tells_mask = saved.m is None and e.p > 0
    return saved if tells_mask or dtypes[3] is not None else saved._replace(y=None)


def _statistics(x: Tensor, group: Any) -> Any:
    triton = _kernels(x, None)
    if triton is None:
        return NotImplemented
    mean, rest, var = triton.batch_norm.statistics(x)
    return merged(x, mean, rest, var, group)


BatchNormFunction.faster(TRITON, forward=_forward, backward=_backward)
NormalizeFunction.faster(TRITON, forward=_apply, backward=_apply_backward)
SyncStatisticsFunction.faster(TRITON, forward=_statistics)
