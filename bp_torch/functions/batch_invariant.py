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

from .function import is_ordinary

__all__ = ["elementwise", "linear"]

SIZES = 16, 48, 64
"""Rows a call, in order of preference; one row, if in none of these all places are alike."""
CHUNK = 32768
"""Elements a call: as many as ATen gives to one thread, and whole vectors on any processor."""
VECTORS = 64


def linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b in calls of a fixed number of rows, the last one filled up with zeros.

    Shapes and dtypes of :func:`torch.nn.functional.linear`, x with at least one dimension.

    Raises:
        RuntimeError: a transform or a compiler is at work, which choose the products themselves.
    """
    _require_eager(x, W, b)
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
    """f(x) for an elementwise f, in whole vectors; on other devices than the CPU f(x) itself.

    Raises:
        RuntimeError: a transform or a compiler is at work.
    """
    _require_eager(x)
    if x.device.type != "cpu":
        return f(x)
    flat = x.reshape(x.numel())
    filled = torch.cat([flat, flat.new_zeros(-x.numel() % VECTORS)])
    *parts, last = (f(part) for part in filled.split(CHUNK))
    y = _shaped(torch.cat([*parts, last[: x.numel() - CHUNK * len(parts)]]), x.shape)
    return y if x.is_contiguous() else torch.empty_like(x, dtype=y.dtype).copy_(y)


def _shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshaped y that is no view: forward mode refuses a Function whose output is one."""
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, shape)
    return shaped


def _require_eager(*tensors: Tensor | None) -> None:
    if not is_ordinary(*tensors):
        raise RuntimeError(
            "batch_invariant(): expected ordinary tensors in eager mode, got a transform, a compiler or a tensor "
            "subclass, which choose the order of sums themselves"
        )
