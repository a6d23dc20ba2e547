"""Softmax and log-softmax in one Triton kernel each way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...backends import kernels_for
from ..function import TRITON, Function
from ..softmax import LogSoftmaxFunction, SoftmaxFunction


def _register(function: type[Function], log: bool) -> None:
    def forward(x: Tensor, dim: int) -> Any:
        triton = kernels_for(x)
        return NotImplemented if triton is None else triton.softmax.forward(x, dim, log=log)

    def backward(ctx: Any, saved: tuple[Any, ...], dy: Tensor) -> Any:
        (y,) = saved
        triton = kernels_for(dy, y)
        return NotImplemented if triton is None else (triton.softmax.backward(dy, y, ctx.dim, log=log), None)

    function.faster(TRITON, forward=forward, backward=backward)


_register(SoftmaxFunction, log=False)
_register(LogSoftmaxFunction, log=True)
