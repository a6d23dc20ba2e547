"""A multilayer perceptron layer by layer, by the ways of aten/dense.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..epilogue import Epilogue
from ..function import ATEN
from ..mlp import MLPFunction, gradients, kept_of, layer_by_layer, saved_of
from . import dense, epilogue


def _forward(x: Tensor, e: Epilogue, recompute: bool, *layers: Tensor | None) -> tuple[Tensor, ...]:
    return kept_of(layer_by_layer(dense.forward, x, e, layers), recompute)


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, *ds: Tensor | None) -> tuple[Tensor | None, ...]:
    x, layers, s = saved_of(saved, len(ctx.needs_input_grad), ctx.e, ctx.recompute, dense.forward)
    return gradients(ctx.e, ctx.first, ctx.needs_input_grad, dy, ds, x, layers, s, Epilogue.activate, epilogue.pull)


MLPFunction.faster(ATEN, forward=_forward, backward=_backward)
