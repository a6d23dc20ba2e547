"""Products and activations whose rows do not feel their neighbours, for :func:`bp_torch.batch_invariant`.

A library's matrix product chooses its blocks, and with them the order of its sums, by the number of rows, and may treat
the rows at the edge of a block in another way than those inside. ATen's elementwise CPU loops compute the last few
elements by other code than the rest. Here every call has the same shape, whatever the number of rows, and that all
places within it are treated alike is tried out on the machine, not supposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import unsafe_view
from ..backends import kernels
from .activation import ActivationFunction
from .aten import batch_norm as aten_batch_norm
from .batch_norm import NormalizeFunction, normalize, result_dtype
from .dense import DenseFunction, LinearFunction
from .dropout import drop
from .epilogue import Epilogue
from .function import BATCH_INVARIANT
from .mlp import MLPFunction, kept_of, layer_by_layer
from .residual import ResidualFunction
from .softmax import LogSoftmaxFunction, SoftmaxFunction

__all__ = ["elementwise", "linear"]

SIZES = 16, 48, 64
"""Rows a call, in order of preference; one row, if in none of these all places are alike."""
CHUNK = 32768
"""Elements a call: as many as ATen gives to one thread, and whole vectors on any processor."""
VECTORS = 64


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b in calls of a fixed number of rows, the last one filled up with zeros.

    Shapes and dtypes of :func:`torch.nn.functional.linear`, x with at least one dimension.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.shape[0] == 0 or W.numel() == 0:
        return F.linear(x, W, b)  # no sums
    W = W.contiguous()
    size = block_of(*W.shape, W.dtype, W.device, b is not None, torch.get_num_threads())
    parts = []
    for part in rows.split(size):
        # A new tensor each, so that alignment is the same as well.
        filled = torch.cat([part, part.new_zeros((size - part.shape[0], part.shape[1]))])
        parts.append(F.linear(filled, W, b)[: part.shape[0]])
    return _shaped(torch.cat(parts), (*x.shape[:-1], W.shape[0]))


@cache
def block_of(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, bias: bool, threads: int) -> int:
    """The first of SIZES in which equal rows give equal bits at every place, for W of shape
    (outputs, inputs); else 1.

    Tried on random numbers, thousands of sums. MKL on AVX2, for one, fails with 32 rows and passes with 16.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    with torch.no_grad():
        W, b = draw(outputs, inputs), draw(outputs) if bias else None
        for size in SIZES:
            for _ in range(1 + 4096 // outputs):
                y = F.linear(draw(1, inputs).expand(size, inputs).contiguous(), W, b)
                if not bool((y == y[:1]).all()):
                    break
            else:
                return size
    return 1


def elementwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) for an elementwise f, in whole vectors; on other devices than the CPU f(x) itself."""
    if x.device.type != "cpu":
        return f(x)
    flat = x.reshape(x.numel())
    filled = torch.cat([flat, flat.new_zeros(-x.numel() % VECTORS)])
    *parts, last = (f(part) for part in filled.split(CHUNK))
    y = _shaped(torch.cat([*parts, last[: x.numel() - CHUNK * len(parts)]]), x.shape)
    return y if x.is_contiguous() else torch.empty_like(x, dtype=y.dtype).copy_(y)


def _shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshaped y that is no view: forward mode refuses a Function whose output is one."""
    shaped: Tensor = unsafe_view(y, shape)
    return shaped


def _follow(e: Epilogue, z: Tensor, m: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As :meth:`Epilogue.forward`."""
    a, kept = _activate(z, e), e.keeps(m, r)
    return drop(a, m, e.p, r), z if kept == "z" else a if kept == "a" else None


def _activate(z: Tensor, e: Epilogue) -> Tensor:
    return z if e.name == "identity" else elementwise(e.activate, z)


def _dense(
    x: Tensor, W: Tensor, b: Tensor | None, r: Tensor | None, m: Tensor | None, e: Epilogue
) -> Tensor | tuple[Tensor, Tensor]:
    triton = kernels(x, W, b)  # a mask that is no seed stops the kernels at what follows the product
    z = linear(x, W, b) if triton is None else triton.dense.forward(x, W, b, None, None, Epilogue())[0]
    y, s = _follow(e, z, m, r)
    return y if s is None else (y, s)


def _mlp(x: Tensor, e: Epilogue, recompute: bool, *layers: Tensor | None) -> tuple[Tensor, ...]:
    return kept_of(layer_by_layer(_dense, x, e, layers), recompute)


def _activation(x: Tensor, e: Epilogue) -> Tensor:
    return e.row.f(x) if e.name == "identity" else _activate(x, e)


def _residual(h: Tensor, r: Tensor, m: Tensor | None, e: Epilogue) -> Tensor | tuple[Tensor, Tensor]:
    z = drop(h, m, e.p, r)
    y = _activate(z, e)
    return (y, z) if e.keeps() == "z" else y


def _normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, mean: Tensor, var: Tensor,
    m: Tensor | None, eps: float, e: Epilogue,
) -> Tensor:  # fmt: skip
    by = aten_batch_norm.normalize if aten_batch_norm.is_fused(x) else normalize
    return _follow(e, by(x, gamma, beta, r, mean, var, eps), m, None)[0].to(result_dtype(x, r))


def _row_by_row(f: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """f along the last dimension, where ATen's CPU loops compute each row by itself. Along another they divide what
    lies beside it among threads, and compute the last few numbers of a part by other code than the rest.
    """

    def forward(x: Tensor, dim: int) -> Tensor:
        if x.dim() == 0 or dim in (-1, x.dim() - 1):
            return f(x, dim)
        y = torch.empty_like(x)
        return y.copy_(f(x.movedim(dim, -1).contiguous(), -1).movedim(-1, dim))

    return forward


LinearFunction.faster(BATCH_INVARIANT, forward=linear)
DenseFunction.faster(BATCH_INVARIANT, forward=_dense)
MLPFunction.faster(BATCH_INVARIANT, forward=_mlp)
ActivationFunction.faster(BATCH_INVARIANT, forward=_activation)
ResidualFunction.faster(BATCH_INVARIANT, forward=_residual)
NormalizeFunction.faster(BATCH_INVARIANT, forward=_normalize)
SoftmaxFunction.faster(BATCH_INVARIANT, forward=_row_by_row(torch.softmax))
LogSoftmaxFunction.faster(BATCH_INVARIANT, forward=_row_by_row(torch.log_softmax))
