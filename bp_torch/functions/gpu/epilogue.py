"""Activations and their backward by Triton kernels that draw dropout's mask from its seed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import kernels_for
from ..activation import ActivationFunction
from ..dropout import may_draw
from ..epilogue import ActivationBackwardFunction, Epilogue
from ..function import TRITON

__all__ = ["activate", "pull"]


def activate(e: Epilogue, x: Tensor) -> Any:
    """f(x)."""
    triton = kernels_for(x)
    return NotImplemented if triton is None else triton.elementwise.forward(x, None, None, None, e)[0]


def pull(e: Epilogue, dy: Tensor, s: Tensor, m: Tensor | None = None) -> Any:
    """As :meth:`Epilogue.backward`."""
    if e.name == "identity" and m is None and e.p == 0:
        return dy
    triton = kernels_for(dy, s) if may_draw(m) else None
    return NotImplemented if triton is None else triton.elementwise.backward(dy, s, m, e)


def _activation_backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> Any:
    (s,) = saved
    dx = NotImplemented if s is None else pull(ctx.e, dy, s)
    return dx if dx is NotImplemented else (dx, None)


def _second(ctx: Any, saved: tuple[Any, ...], g: Tensor) -> Any:
    dy, s, m = saved
    triton = kernels_for(g, dy, s) if may_draw(m) else None
    return NotImplemented if triton is None else (*triton.elementwise.second(g, dy, s, m, ctx.e), None, None)


ActivationFunction.faster(TRITON, forward=lambda x, e: activate(e, x), backward=_activation_backward)
ActivationBackwardFunction.faster(TRITON, forward=lambda dy, s, m, e: pull(e, dy, s, m), backward=_second)
