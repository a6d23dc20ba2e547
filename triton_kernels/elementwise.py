"""One pass for what surrounds a layer: bias, activation, dropout and residual, in any combination.

Forward, for each element i in column c::

    a = f(x + bias[c])                      a layer: activation, dropout, residual
    y = keep · a / (1 - p) + r

    z = keep · x / (1 - p) + r              a residual connection: dropout, residual, activation
    y = f(z)

Backward, from the saved s (what f was given, or what it gave)::

    dx = keep · dy / (1 - p) · f′(s)        and, where asked for, dbias[c] = Σ dx over rows

    dr = dy · f′(s)
    dx = keep · dr / (1 - p)

Second order, from the gradient g of dz::

    ddy = keep · g / (1 - p) · f′(s)
    ds  = g · keep · dy / (1 - p) · ddf(s)

The mask is never stored: ``keep`` is drawn again from the seed (see random.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation as act
from . import random
from .cast import cast
from .epilogue import Epilogue, dropout_of, pair_of
from .launch import Block, block_for, device_of, grid_of, is_wide, warps_of

__all__ = ["Layout", "backward", "backward_bias", "forward", "run_backward", "run_forward", "second"]


@triton.jit
def _index(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    return start * BLOCK, start * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _dropped(
    x, SEED, start, scale, channels, points,
    THRESHOLD: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keep · x · scale; without a mask (BITS = 0) scale alone. A product, so that NaN stays NaN, as in torch.

    The mask is that of the element's index in the order of dimensions. Where the tensor lies as (N, points, channels)
    (channels_last: LAST), that index is computed for each element.
    """
    if BITS == 0:
        return x * scale
    elif not LAST:
        kept = random.keep_contiguous(tl.load(SEED), start, THRESHOLD, BITS, BLOCK)
        return x * tl.where(kept, scale, 0.0)
    else:
        i = start + tl.arange(0, BLOCK)
        row = i // channels
        index = ((row // points) * channels + i % channels) * points + row % points
        return x * tl.where(random.keep(tl.load(SEED), index, THRESHOLD, BITS), scale, 0.0)


@triton.jit
def _forward(
    X, BIAS, R, SEED, Y, S, n, columns, a, b, scale, channels, points,
    KEY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_R: tl.constexpr, ACT_LAST: tl.constexpr, STORE_S: tl.constexpr,
    THRESHOLD: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start, i = _index(BLOCK, WIDE)
    inside = i < n
    z = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(BIAS + i % columns, mask=inside, other=0.0).to(tl.float32)
    s = z
    if not ACT_LAST:
        s = act.forward(z, KEY, a, b)
    y = _dropped(s, SEED, start, scale, channels, points, THRESHOLD, BITS, LAST, BLOCK)
    if HAS_R:
        y += tl.load(R + i, mask=inside, other=0.0).to(tl.float32)
    if ACT_LAST:
        s = y
        y = act.forward(y, KEY, a, b)
    if STORE_S:
        tl.store(S + i, cast(s, S.dtype.element_ty), mask=inside)
    tl.store(Y + i, cast(y, Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    DY, S, SEED, DX, DR, n, a, b, scale, channels, points,
    KEY: tl.constexpr, OUTPUT: tl.constexpr, ACT_LAST: tl.constexpr,
    THRESHOLD: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start, i = _index(BLOCK, WIDE)
    inside = i < n
    d = tl.load(DY + i, mask=inside, other=0.0).to(tl.float32)
    if not ACT_LAST:
        d = _dropped(d, SEED, start, scale, channels, points, THRESHOLD, BITS, LAST, BLOCK)
    if KEY != "identity":
        s = tl.load(S + i, mask=inside, other=0.0).to(tl.float32)
        d = act.pull(d, s, KEY, OUTPUT, a, b)
    if ACT_LAST:
        tl.store(DR + i, cast(d, DR.dtype.element_ty), mask=inside)
        d = _dropped(d, SEED, start, scale, channels, points, THRESHOLD, BITS, LAST, BLOCK)
    tl.store(DX + i, cast(d, DX.dtype.element_ty), mask=inside)


@triton.jit
def _backward_bias(
    DY, S, SEED, DZ, PARTIAL, rows, columns, a, b, scale,
    KEY: tl.constexpr, OUTPUT: tl.constexpr, THRESHOLD: tl.constexpr, BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program takes STEPS tiles below each other, and writes one row of partial sums."""
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    group = tl.program_id(0) // across
    c = tl.program_id(0) % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    for step in range(STEPS):
        r = (group * STEPS + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        if WIDE:
            r = r.to(tl.int64)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        i = r[:, None] * columns + c[None, :]
        dz = tl.load(DY + i, mask=inside, other=0.0).to(tl.float32)
        if BITS == 0:
            dz = dz * scale
        else:
            dz = dz * tl.where(random.keep(tl.load(SEED), i, THRESHOLD, BITS), scale, 0.0)
        if KEY != "identity":
            s = tl.load(S + i, mask=inside, other=0.0).to(tl.float32)
            dz = act.pull(dz, s, KEY, OUTPUT, a, b)
        tl.store(DZ + i, cast(dz, DZ.dtype.element_ty), mask=inside)
        total += tl.sum(tl.where(inside, dz, 0.0), axis=0)
    tl.store(PARTIAL + group.to(tl.int64) * columns + c, total, mask=c < columns)


@triton.jit
def _second(
    G, DY, S, SEED, DDY, DS, n, a, b, scale, channels, points,
    KEY: tl.constexpr, OUTPUT: tl.constexpr,
    THRESHOLD: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start, i = _index(BLOCK, WIDE)
    inside = i < n
    g = tl.load(G + i, mask=inside, other=0.0).to(tl.float32)
    g = _dropped(g, SEED, start, scale, channels, points, THRESHOLD, BITS, LAST, BLOCK)
    dy = tl.load(DY + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(S + i, mask=inside, other=0.0).to(tl.float32)
    ddy = act.pull(g, s, KEY, OUTPUT, a, b)
    ds = g * dy * act.curvature(s, KEY, OUTPUT, a, b)
    tl.store(DDY + i, cast(ddy, DDY.dtype.element_ty), mask=inside)
    tl.store(DS + i, cast(ds, DS.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: in the order of its dimensions, or channels last."""

    channels: int = 0
    points: int = 0

    @staticmethod
    def of(x: Tensor) -> Layout:
        if x.dim() in (4, 5) and not x.is_contiguous():
            order = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            if x.is_contiguous(memory_format=order):
                return Layout(x.shape[1], x.shape[2:].numel())
        return Layout()

    def flat(self, t: Any) -> Any:
        """The tensor with its dimensions in the order of memory, contiguous."""
        return None if t is None else (t.movedim(1, -1) if self.channels else t).contiguous()

    def new(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """An empty tensor of ``like``'s shape that lies so, for a kernel to fill in the order of memory. What users may
        get is made by it: it is no view, which autograd would refuse to change in place.
        """
        order = torch.contiguous_format
        if self.channels:
            order = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
        return torch.empty_like(like, dtype=dtype, memory_format=order)


def forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, e: Epilogue
) -> tuple[Tensor, Tensor | None]:
    """y = dropout(f(x + bias)) + residual, in x's dtype promoted with the residual's; and a where that tells f′."""
    return run_forward(x, bias, residual, seed, e, act_last=False)


def run_forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, e: Epilogue, act_last: bool
) -> tuple[Tensor, Any]:
    """y of a layer, or of a residual connection (``act_last``); and a, or there z, where that tells f′."""
    store = e.keeps() == "z" if act_last else e.keeps(seed, residual) == "a"
    layout = Layout.of(x)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = layout.new(x, dtype)
    s = layout.new(x, dtype if act_last else x.dtype) if store else None
    x, residual = layout.flat(x), layout.flat(residual)
    scale, threshold, bits = dropout_of(e, seed)
    n = x.numel()
    if n:

        def launch(block: Block) -> None:
            _forward[grid_of(n, block.columns)](
                x, bias, residual, seed, y, s, n, x.shape[-1] if x.dim() else 1,
                *pair_of(e), scale, layout.channels, layout.points,
                e.name, bias is not None, residual is not None, act_last, store,
                threshold, bits, layout.channels > 0, block.columns, is_wide(x), num_warps=warps_of(block),
            )  # fmt: skip

        with device_of(x):
            launch(block_for("elementwise", n, x.device, launch, x.dtype, "forward"))
    return y, s


def backward(
    dy: Tensor, s: Tensor | None, seed: Tensor | None, e: Epilogue, dtype: torch.dtype | None = None
) -> Tensor:
    """dx, in ``dtype`` (dy's unless given)."""
    return run_backward(dy, s, seed, e, dtype or dy.dtype, None)[0]


def run_backward(
    dy: Tensor, s: Tensor | None, seed: Tensor | None, e: Epilogue, dtype: torch.dtype, dtype_r: torch.dtype | None
) -> tuple[Tensor, Any]:
    """dx of a layer; or, where ``dtype_r`` is given, dx and dr of a residual connection."""
    layout = Layout.of(dy if s is None else s)
    dx = layout.new(dy, dtype)
    dr = None if dtype_r is None else layout.new(dy, dtype_r)
    dy, s = layout.flat(dy), layout.flat(s)
    scale, threshold, bits = dropout_of(e, seed)
    n = dy.numel()
    if n:

        def launch(block: Block) -> None:
            _backward[grid_of(n, block.columns)](
                dy, s, seed, dx, dr, n, *pair_of(e), scale, layout.channels, layout.points,
                e.name, e.told_by == "a", dr is not None, threshold, bits, layout.channels > 0, block.columns,
                is_wide(dy), num_warps=warps_of(block),
            )  # fmt: skip

        with device_of(dy):
            launch(block_for("elementwise", n, dy.device, launch, dy.dtype, "backward"))
    return dx, dr


def backward_bias(
    dy: Tensor, s: Tensor | None, seed: Tensor | None, e: Epilogue, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """dz (rows, columns), and db = Σ dz over rows in float32: partial sums in the same pass, then one ordered sum."""
    dy = dy.contiguous()
    s = None if s is None else s.contiguous()
    dz = torch.empty_like(dy, dtype=dtype or dy.dtype)
    rows, columns = dy.shape
    if not dy.numel():
        return dz, torch.zeros(columns, dtype=torch.float32, device=dy.device)
    scale, threshold, bits = dropout_of(e, seed)

    def launch(block: Block) -> Tensor:
        # Few values, since each is a kernel of its own; enough programs to fill the chip.
        steps = next(steps for steps in (16, 8, 4, 2, 1) if rows >= steps * block.rows * 128 or steps == 1)
        (groups,) = grid_of(rows, block.rows * steps)
        partial = torch.empty((groups, columns), dtype=torch.float32, device=dy.device)
        _backward_bias[grid_of(columns, block.columns, groups)](
            dy, s, seed, dz, partial, rows, columns, *pair_of(e), scale,
            e.name, e.told_by == "a", threshold, bits, block.rows, block.columns, steps, is_wide(dy),
            num_warps=warps_of(block),
        )  # fmt: skip
        return partial.sum(0)

    with device_of(dy):
        return dz, launch(block_for("elementwise bias", dy.numel(), dy.device, launch, dy.dtype))


def second(g: Tensor, dy: Tensor, s: Tensor, seed: Tensor | None, e: Epilogue) -> tuple[Tensor, Tensor]:
    """ddy in dy's dtype and ds in s's."""
    layout = Layout.of(s)
    ddy, ds = layout.new(dy, dy.dtype), layout.new(s, s.dtype)
    g, dy, s = layout.flat(g), layout.flat(dy), layout.flat(s)
    scale, threshold, bits = dropout_of(e, seed)
    n = dy.numel()
    if n:

        def launch(block: Block) -> None:
            _second[grid_of(n, block.columns)](
                g, dy, s, seed, ddy, ds, n, *pair_of(e), scale, layout.channels, layout.points,
                e.name, e.told_by == "a", threshold, bits, layout.channels > 0, block.columns, is_wide(dy),
                num_warps=warps_of(block),
            )  # fmt: skip

        with device_of(dy):
            launch(block_for("elementwise", n, dy.device, launch, dy.dtype, "second"))
    return ddy, ds
