"""The backward of softmax and log-softmax in one kernel of ATen's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..function import ATEN
from ..softmax import LogSoftmaxFunction, SoftmaxFunction

aten = torch.ops.aten


def _by(kernel: Callable[..., Tensor]) -> Callable[..., Any]:
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return kernel(dy, y, ctx.dim, y.dtype), None

    return backward


SoftmaxFunction.faster(ATEN, backward=_by(aten._softmax_backward_data.default))
LogSoftmaxFunction.faster(ATEN, backward=_by(aten._log_softmax_backward_data.default))
