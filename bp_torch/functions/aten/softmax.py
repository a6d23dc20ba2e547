"""The backward of softmax and log-softmax in one kernel of ATen's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..._torch import log_softmax_backward, softmax_backward
from ..function import ATEN
from ..softmax import LogSoftmaxFunction, SoftmaxFunction


def _by(kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> tuple[Tensor, None]:
        (y,) = saved
        return kernel(dy, y, ctx.dim, y.dtype), None

    return backward


SoftmaxFunction.faster(ATEN, backward=_by(softmax_backward))
LogSoftmaxFunction.faster(ATEN, backward=_by(log_softmax_backward))
