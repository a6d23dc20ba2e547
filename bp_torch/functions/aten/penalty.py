"""The slope of a penalty in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..function import ATEN
from ..penalty import PenaltyFunction


def _backward(ctx: Any, saved: tuple[Any, ...], dR: Tensor) -> Any:
    return None, None, *(None if w is None else _slope(w, ctx.l1, ctx.l2, dR) for w in saved)


def _slope(w: Tensor, l1: float, l2: float, dR: Tensor) -> Tensor:
    """(λ₁ sign(w) + 2 λ₂ w) dR."""
    wide = torch.promote_types(w.dtype, torch.float32)
    v, dR = w.to(wide), dR.to(torch.promote_types(dR.dtype, torch.float32))
    if l1 == 0:
        dw = v * (2 * l2 * dR)
    else:
        dw = torch.sgn(v).mul_(l1 * dR)
        dw = dw if l2 == 0 else dw.addcmul_(v, 2 * l2 * dR)
    return dw.to(w.dtype)


PenaltyFunction.faster(ATEN, backward=_backward)
