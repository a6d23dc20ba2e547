"""What follows a layer, of plain tensors: activations by ATen's own kernels, dropout on the CPU in two passes and one
new tensor, and in place where the tensor is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...mode import wide
from .. import dropout as formula
from ..activation import ActivationFunction
from ..epilogue import ActivationBackwardFunction, Epilogue
from ..function import ATEN

__all__ = ["activate", "backward", "drop", "forward", "masked", "pull"]

ZEROS = {t: torch.zeros((), dtype=t, device="cpu") for t in (torch.float32, torch.float64, torch.bfloat16)}
"""To add to, made once: a call of ``new_zeros`` takes as long as a pass over a small tensor."""


def forward(
    e: Epilogue, z: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As :meth:`Epilogue.forward`, and may overwrite z, which is ours."""
    a = activate(e, z) if e.told_by else z
    y = a if mask is None and residual is None and e.p == 0 else drop(a, mask, e.p, residual)
    if e.told_by == "a":
        return y, None if residual is None and (mask is None or e.row.gate) else a
    return y, z if e.told_by else None


def activate(e: Epilogue, z: Tensor) -> Tensor:
    """a = f(z), in z where torch can: where f′ is told by a nobody will read it."""
    return z.relu_() if e.name == "relu" else z if not e.told_by else e.row.f(z, *e.parameters)


def backward(e: Epilogue, dy: Tensor, s: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """As :meth:`Epilogue.backward`."""
    if mask is not None or (e.p > 0 and (s is None or not e.told_by)):
        return pull(e, drop(dy, mask, e.p), s)
    dz = pull(e, dy, s)
    # Without a mask y tells it, and f′ is a number of size 1: the scale loses nothing afterwards, in dz, which is ours.
    return dz if e.p == 0 else dz.mul_(1 / (1 - e.p) if e.p < 1 else 0.0)


def pull(e: Epilogue, da: Tensor, s: Tensor | None) -> Tensor:
    """As :meth:`Epilogue.pull`."""
    if s is None or not e.told_by:
        return da
    row = e.row
    if row.native is not None:
        return row.native(da, s, *e.parameters)
    return row.pull(da, wide(s), *e.parameters).to(da.dtype)


def drop(x: Tensor, mask: Tensor | None, p: float, add: Tensor | None = None) -> Tensor:
    """As :func:`..dropout.drop`."""
    if mask is None or mask.dtype != torch.bool:  # a Seed's
        return formula.drop(x, mask, p, add)
    return masked(x, mask, 1 / (1 - p) if p < 1 else 0.0, add)


def masked(x: Tensor, mask: Tensor, scale: float, add: Tensor | None = None) -> Tensor:
    """scale · m ⊙ x, plus ``add`` if given."""
    if not x.is_cpu or mask.shape != x.shape or mask.stride() != x.stride():
        y = formula.masked(x, mask, scale)
        return y if add is None else add + y
    m = mask.view(torch.uint8).to(x.dtype)  # ATen converts bytes faster than booleans
    if add is not None and add.dtype == x.dtype:
        return torch.addcmul(add, x, m, value=scale, out=m)
    zero = ZEROS[x.dtype] if x.dtype in ZEROS else x.new_zeros(())
    y = torch.addcmul(zero, x, m, value=scale, out=m)
    return y if add is None else add + y


def _activation_backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor | None, ...]:
    (s,) = saved
    return backward(ctx.e, dy, s), None


def _forward(dy: Tensor, s: Tensor, mask: Tensor | None, e: Epilogue) -> Any:
    return NotImplemented if e.row.native is None else backward(e, dy, s, mask)


ActivationFunction.faster(ATEN, backward=_activation_backward)
ActivationBackwardFunction.faster(ATEN, forward=_forward)
