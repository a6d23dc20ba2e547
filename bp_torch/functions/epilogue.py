"""What follows a layer, as one value.

Forward::

    a = f(z)
    y = m ⊙ a / (1 - p) + r

Backward::

    dz = m ⊙ dy / (1 - p) ⊙ f′(z)

f′ is told by one tensor s: by z, by a, or by y, whichever the row of the activation table says and dropout and the
residual leave readable. Each layer keeps that tensor, and asks here for all else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..mode import wide
from .activation_table import Activation, lookup
from .dropout import drop
from .function import CONSTANTS, Function, call

__all__ = ["ActivationBackwardFunction", "Epilogue"]


class _Known:
    """What follows from an Epilogue's values, looked up once."""

    row: Activation
    told_by: str
    """Which of ``z`` and ``a`` f′ is computed from; "" where f′ = 1."""


@dataclass(frozen=True)
class Epilogue(_Known):
    """f by its key in the activation table and its parameters; and p, the probability that dropout sets to zero.

    ``fused`` says which of the two rows that an activation may have: the one of fused layers, or the one of the
    activation by itself, which keeps what torch's operator keeps.
    """

    name: str = "identity"
    parameters: tuple[float, ...] = ()
    p: float = 0  # not 0.0, which Dynamo would take for an input of a dynamic graph
    fused: bool = True

    def __post_init__(self) -> None:
        row = lookup(self.name, self.parameters, self.fused)
        told_by = "" if self.name == "identity" else "z" if row.saves == "input" else "a"
        object.__setattr__(self, "row", row)
        object.__setattr__(self, "told_by", told_by)

    def keeps(self, mask: Tensor | None = None, residual: Tensor | None = None) -> str:
        """Which of ``z``, ``a``, ``y`` to keep for f′, or "". y costs nothing: the next layer keeps it."""
        if self.told_by == "a" and residual is None and (mask is None or self.row.gate):
            return "y"
        return self.told_by

    def without_dropout(self) -> Epilogue:
        return Epilogue(self.name, self.parameters, 0, self.fused) if self.p else self

    def activate(self, z: Tensor) -> Tensor:
        """a = f(z)."""
        return self.row.f(z, *self.parameters) if self.told_by else z

    def forward(
        self, z: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y, and what :meth:`keeps` names, unless it is y."""
        a = self.activate(z)
        kept = self.keeps(mask, residual)
        return drop(a, mask, self.p, residual), z if kept == "z" else a if kept == "a" else None

    def backward(self, dy: Tensor, s: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """dz, from what :meth:`keeps` names."""
        if s is None or not self.told_by:
            return drop(dy, mask, self.p)
        dz: Tensor = call(ActivationBackwardFunction, dy, s, mask, self)
        return dz

    def pull(self, da: Tensor, s: Tensor | None) -> Tensor:
        """da ⊙ f′(z), without dropout: the pullback of f alone, and its pushforward as well, for f′ is diagonal."""
        return self.without_dropout().backward(da, s)


class ActivationBackwardFunction(Function):
    """dz = m ⊙ dy / (1 - p) ⊙ f′(z), from the tensor s that tells f′: the pullback of dropout(f(z)).

    Backward: d(dy) = m ⊙ g / (1 - p) ⊙ f′(z); ds = m ⊙ g ⊙ dy / (1 - p) ⊙ ddf(s), where ddf(s) is f″(z) for s = z.

    f′ and m are diagonal, so that this is the pushforward as well. The mask m may be None: then it is 1.
    """

    @staticmethod
    def forward(dy: Tensor, s: Tensor, mask: Tensor | None, e: Epilogue) -> Tensor:
        return e.row.pull(drop(dy, mask, e.p), wide(s), *e.parameters).to(dy.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, s, mask, ctx.e = inputs
        ctx.save_for_backward(dy, s, mask)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, s, mask = ctx.saved_tensors
        need_dy, need_s = ctx.needs_input_grad[:2]
        ddy = ctx.e.backward(g, s, mask) if need_dy else None
        ds = _curvature(g, dy, s, mask, ctx.e) if need_s else None
        return ddy, ds, None, None

    @staticmethod
    def jvp_rule(ctx: Any, tdy: Tensor | None, ts: Tensor | None, *_: None) -> Tensor:
        dy, s, mask = ctx.saved_tensors
        t = torch.zeros_like(dy) if tdy is None else ctx.e.backward(tdy, s, mask)
        return t if ts is None else t + _curvature(ts, dy, s, mask, ctx.e)


def _curvature(g: Tensor, dy: Tensor, s: Tensor, mask: Tensor | None, e: Epilogue) -> Tensor:
    """m ⊙ g ⊙ dy / (1 - p) ⊙ ddf(s)."""
    return (g * drop(dy, mask, e.p) * e.row.ddf(wide(s), *e.parameters)).to(s.dtype)


CONSTANTS.add(Epilogue)
