"""The residual connection: a branch, dropped out, is added to what went round it.

    forward    z = r + m ⊙ h / (1 - p)
               y = f(z)
    backward   dz = dy ⊙ f′(z)
               dr = dz
               dh = m ⊙ dz / (1 - p)

Source: He et al. 2016, arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dropout import drop
from .epilogue import Epilogue
from .function import Function

__all__ = ["ResidualFunction"]


class ResidualFunction(Function):
    """y = f(r + m ⊙ h / (1 - p)).

    Shapes: branch h, residual r and y all equal; the mask m broadcasts to h, or is None. f and p are those of e, whose
    dropout acts on h here.

    ``forward`` returns y, or (y, z) where f′ is computed from z; z is differentiable like y.
    """

    @staticmethod
    def forward(h: Tensor, r: Tensor, m: Tensor | None, e: Epilogue) -> Tensor | tuple[Tensor, Tensor]:
        z = drop(h, m, e.p, r)
        y = e.activate(z)
        return (y, z) if e.keeps() == "z" else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        h, r, m, ctx.e = inputs
        ctx.set_materialize_grads(False)
        ctx.dtypes = h.dtype, r.dtype
        # y does not tell the mask: where the branch was dropped there is still the residual.
        ctx.save_for_backward(_told_by(ctx.e, output), m if ctx.needs_input_grad[0] else None)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        ctx.save_for_forward(_told_by(ctx.e, output), inputs[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, m = ctx.saved_tensors
        if dy is not None:
            pulled = ctx.e.pull(dy, s)
            dz = pulled if dz is None else pulled + dz
        need_h, need_r, *_ = ctx.needs_input_grad
        dh = None if dz is None or not need_h else drop(dz, m, ctx.e.p)
        return *in_dtypes((dh, dz if need_r else None), ctx.dtypes), None, None

    @staticmethod
    def jvp_rule(ctx: Any, th: Tensor | None, tr: Tensor | None, *_: None) -> Tensor | tuple[Tensor, Tensor]:
        s, m = ctx.saved_tensors
        th = None if th is None else drop(th, m, ctx.e.p)
        tz = tr if th is None else th if tr is None else tr + th
        assert tz is not None
        tz = tz.to(torch.promote_types(*ctx.dtypes))
        ty = ctx.e.pull(tz, s)
        return (ty, tz) if ctx.e.keeps() == "z" else ty


def in_dtypes(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> tuple[Tensor | None, ...]:
    """dh and dr. One of a wider dtype makes y, and so dz, wider than the other."""
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


def _told_by(e: Epilogue, output: Tensor | tuple[Tensor, Tensor]) -> Tensor | None:
    """The tensor s that tells f′, among the outputs."""
    return output[1] if isinstance(output, tuple) else output if e.keeps() == "y" else None
