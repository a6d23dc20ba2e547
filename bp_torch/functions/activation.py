"""Activations by the rows of the table in activation_table.py.

Forward: y = f(x). Backward: dx = dy ⊙ f′(x), which is a Function of its own, so that f″ is explicit too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import is_batch_invariant, plain_kernels
from . import batch_invariant
from .activation_table import ACTIVATIONS, Activation, lookup
from .dropout import drop, dropout_scale, may_draw
from .function import Function, call, is_plain, wide

__all__ = ["ACTIVATIONS", "Activation", "ActivationFunction", "activate", "activation_backward", "lookup"]


def activate(x: Tensor, name: str, parameters: tuple[float, ...]) -> Tensor:
    """f(x) by torch's operators."""
    f = lookup(name, parameters).f
    if is_batch_invariant() and name != "identity":
        return batch_invariant.elementwise(lambda part: f(part, *parameters), x)
    return f(x, *parameters)


class ActivationFunction(Function):
    """y = f(x).

    Backward: dx = dy ⊙ f′(x), from x or from y, whichever torch keeps. Shapes: any, all equal. dtypes: floating.
    """

    @staticmethod
    def forward(x: Tensor, name: str, parameters: tuple[float, ...]) -> Tensor:
        triton = plain_kernels(x)
        if triton is not None:
            return triton.elementwise.forward(x, None, None, None, 0.0, name, parameters)
        return activate(x, name, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.name, ctx.parameters = inputs
        s = x if lookup(ctx.name, ctx.parameters).saves == "input" else output
        s = None if ctx.name == "identity" else s
        ctx.save_for_backward(s)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *row = inputs
        ctx.save_for_forward(x if lookup(*row).saves == "input" else output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (s,) = ctx.saved_tensors
        if s is None:
            return dy, None, None
        return activation_backward(dy, s, ctx.name, ctx.parameters, fused=False), None, None

    @staticmethod
    def jvp_rule(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        (s,) = ctx.saved_tensors
        if s is None:
            return dx.clone()
        return activation_backward(dx, s, ctx.name, ctx.parameters, fused=False)


class ActivationBackwardFunction(Function):
    """dz = m ⊙ dy / (1 - p) ⊙ f′(z), from the saved tensor s: the pullback of dropout(f(z)).

    Backward: d(dy) = m ⊙ g / (1 - p) ⊙ f′(z); ds = m ⊙ g ⊙ dy / (1 - p) ⊙ ddf(s), where ddf(s) is f″(z) for s = z.

    f′ and m are diagonal, so that this is the pushforward as well. The mask m may be None: then it is 1. ``fused`` says
    which row of the activation made s.
    """

    @staticmethod
    def forward(
        dy: Tensor, s: Tensor, mask: Tensor | None, p: float, name: str, parameters: tuple[float, ...], fused: bool
    ) -> Tensor:
        if is_plain(dy, s):
            return _pull(dy, s, mask, p, name, parameters, fused)
        return (drop(dy, mask, p) * lookup(name, parameters, fused).df(wide(s), *parameters)).to(dy.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, s, mask, *ctx.constants = inputs
        ctx.save_for_backward(dy, s, mask)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, s, mask = ctx.saved_tensors
        need_dy, need_s = ctx.needs_input_grad[:2]
        p, name, parameters, fused = ctx.constants
        triton = plain_kernels(g, dy, s) if may_draw(mask) else None
        if triton is not None:
            output = lookup(name, parameters, fused).saves == "output"
            ddy, ds = triton.elementwise.second(g, dy, s, mask, p, name, parameters, output)
        else:
            ddy = activation_backward(g, s, name, parameters, mask, p, fused) if need_dy else None
            ds = _curvature(g, dy, s, mask, *ctx.constants) if need_s else None
        return ddy, ds, None, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, tdy: Tensor | None, ts: Tensor | None, *_: None) -> Tensor:
        dy, s, mask = ctx.saved_tensors
        p, name, parameters, fused = ctx.constants
        t = torch.zeros_like(dy) if tdy is None else activation_backward(tdy, s, name, parameters, mask, p, fused)
        return t if ts is None else t + _curvature(ts, dy, s, mask, *ctx.constants)


def _pull(
    dy: Tensor, s: Tensor, mask: Tensor | None, p: float, name: str, parameters: tuple[float, ...], fused: bool
) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z) of plain tensors, in one kernel of ATen's or of ours where there is one."""
    row = lookup(name, parameters, fused)
    triton = plain_kernels(dy, s) if may_draw(mask) else None
    if triton is not None:
        dz: Tensor = triton.elementwise.backward(dy, s, mask, p, name, parameters, row.saves == "output")
        return dz
    if row.native is None:
        return (drop(dy, mask, p) * row.df(wide(s), *parameters)).to(dy.dtype)
    if mask is None and row.saves == "output":  # f′ is a number of size 1: the scale loses nothing afterwards, in place
        dz = row.native(dy, s, *parameters)
        return dz if p == 0 else dz.mul_(dropout_scale(p))
    return row.native(drop(dy, mask, p), s, *parameters)


def _curvature(
    g: Tensor,
    dy: Tensor,
    s: Tensor,
    mask: Tensor | None,
    p: float,
    name: str,
    parameters: tuple[float, ...],
    fused: bool,
) -> Tensor:
    """m ⊙ g ⊙ dy / (1 - p) ⊙ ddf(s)."""
    return (g * drop(dy, mask, p) * lookup(name, parameters, fused).ddf(wide(s), *parameters)).to(s.dtype)


def activation_backward(
    dy: Tensor,
    s: Tensor,
    name: str,
    parameters: tuple[float, ...],
    mask: Tensor | None = None,
    p: float = 0,  # not 0.0, which Dynamo would take for an input of a dynamic graph
    fused: bool = True,
) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z), from what the row of a fused layer saves, or that of the activation by itself."""
    if is_plain(dy, s):
        return _pull(dy, s, mask, p, name, parameters, fused)
    return call(ActivationBackwardFunction, dy, s, mask, p, name, parameters, fused)
