"""A multilayer perceptron in one Triton kernel each way where its hidden layers have one width, up to 64 (float32, and
backward on ROCm: 32); others layer by layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import kernels_for
from ..epilogue import Epilogue
from ..function import TRITON
from ..mlp import MLPFunction, gradients, kept_of, layer_by_layer, saved_of
from . import dense
from .epilogue import activate, pull


def _forward(x: Tensor, e: Epilogue, recompute: bool, *layers: Tensor | None) -> Any:
    triton = kernels_for(x, *layers)
    if triton is None:
        return NotImplemented
    if triton.mlp.fits(x, layers[::2]):
        results: tuple[Tensor, ...] = triton.mlp.forward(x, layers[::2], layers[1::2], e, not recompute)
        return results
    return kept_of(layer_by_layer(dense.forward, x, e, layers), recompute)


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, *ds: Tensor | None) -> Any:
    x, *given = saved
    triton = None if dy is None or not any(ctx.needs_input_grad) else kernels_for(dy, x, *given)
    if triton is None:
        return NotImplemented
    layers = given[: len(ctx.needs_input_grad) - 3]
    whole = triton.mlp.fits(x, layers[::2])
    if ctx.recompute and whole:
        s = triton.mlp.forward(x, layers[::2], layers[1::2], ctx.e, True)[1:]
    else:
        s = saved_of(saved, len(ctx.needs_input_grad), ctx.e, ctx.recompute, dense.forward)[2]
    if any(d is not None for d in ds) or not triton.mlp.fits(x, layers[::2], True):
        return gradients(ctx.e, ctx.first, ctx.needs_input_grad, dy, ds, x, tuple(layers), s, activate, pull)
    dx, dWs, dbs = triton.mlp.backward(dy, x, layers[::2], s, ctx.e)
    found = [g for pair in zip(dWs, dbs, strict=True) for g in pair]
    needed = (g if need else None for g, need in zip(found, ctx.needs_input_grad[3:], strict=True))
    return dx if ctx.needs_input_grad[0] else None, None, None, *needed


MLPFunction.faster(TRITON, forward=_forward, backward=_backward)
