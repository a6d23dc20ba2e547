"""Activations by the rows of the table in activation_table.py.

Forward: y = f(x). Backward: dx = dy ⊙ f′(x), which is a Function of its own (see epilogue.py), so that f″ is explicit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .activation_table import ACTIVATIONS, Activation, lookup
from .epilogue import ActivationBackwardFunction, Epilogue
from .function import Function

__all__ = ["ACTIVATIONS", "Activation", "ActivationBackwardFunction", "ActivationFunction", "lookup"]


class ActivationFunction(Function):
    """y = f(x).

    Backward: dx = dy ⊙ f′(x), from x or from y, whichever torch keeps. Shapes: any, all equal. dtypes: floating.
    """

    @staticmethod
    def forward(x: Tensor, e: Epilogue) -> Tensor:
        y: Tensor = e.row.f(x, *e.parameters)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.e = inputs
        kept = ctx.e.keeps()
        ctx.save_for_backward(x if kept == "z" else output if kept == "y" else None)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(inputs[0] if ctx.e.keeps() == "z" else output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (s,) = ctx.saved_tensors
        return ctx.e.backward(dy, s), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, _: None) -> Tensor:
        (s,) = ctx.saved_tensors
        return tx.clone() if ctx.e.name == "identity" else ctx.e.backward(tx, s)
