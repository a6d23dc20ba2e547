"""An activation's backward by ATen's kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..activation import ActivationFunction
from ..function import ATEN
from . import epilogue


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (s,) = ctx.saved_tensors
    return epilogue.backward(ctx.e, dy, s), None


ActivationFunction.faster(ATEN, backward=_backward)
