"""A dense layer's product with what follows it done in place, and ATen's kernels of the activations' backwards."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..dense import DenseFunction, LinearFunction, gradients, product
from ..epilogue import Epilogue
from ..function import ATEN
from . import epilogue

__all__ = ["forward"]


def _linear(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    need_x, need_W, _ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_W else None, W if need_x else None)
    return F.linear(x, W, b) if b is None or x.dim() == 2 else product(x, W, b)


def forward(
    x: Tensor, W: Tensor, b: Tensor | None, r: Tensor | None, m: Tensor | None, e: Epilogue
) -> Tensor | tuple[Tensor, Tensor]:
    y, s = epilogue.forward(e, product(x, W, b), m, r)
    return y if s is None else (y, s)


def _forward_and_save(
    ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, r: Tensor | None, m: Tensor | None, e: Epilogue
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`forward`, and what DenseFunction's ``setup_context`` does."""
    z = F.linear(x, W, b) if b is None or x.dim() == 2 else product(x, W, b)
    y, s = epilogue.forward(e, z, m, r)
    ctx.set_materialize_grads(False)
    ctx.e, ctx.dtype = e, W.dtype
    need_x, need_W, need_b = ctx.needs_input_grad[:3]
    told, m = (y, None) if s is None and e.told_by else (s, m)
    told, m = (told, m) if need_x or need_W or need_b else (None, None)
    ctx.save_for_backward(x if need_W else None, W if need_x else None, told, m)
    return y if s is None else (y, s)


def _backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, ds: Tensor | None = None) -> Any:
    if dy is None or ds is not None:
        return NotImplemented
    x, W, s, m = saved
    need_x, need_W, need_b, need_r, *_ = ctx.needs_input_grad
    if not (need_x or need_W or need_b):
        return None, None, None, dy if need_r else None, None, None
    dz = epilogue.backward(ctx.e, dy if dy.dtype is ctx.dtype else dy.to(ctx.dtype), s, m)
    return *gradients(dz, x, W, need_b), dy if need_r else None, None, None


LinearFunction.faster(ATEN, forward_and_save=_linear, always=True)
DenseFunction.faster(ATEN, forward_and_save=_forward_and_save, backward=_backward, always=True)
