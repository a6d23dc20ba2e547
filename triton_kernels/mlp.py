"""A whole narrow multilayer perceptron in one kernel forward and one backward: activations stay in registers.

    z_l = a_(l-1) W_lᵀ + b_l,   a_l = f(z_l),   a_0 = x,   y = z_n

All hidden layers have one width H; I, H and O are at most 64 (32 in float32, and in backward on ROCm). A program takes
whole rows through all layers, the weights come from the L2 cache. Backward writes each program's sums of dW and db,
which are then added in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activation as act
from .arithmetic import IN_INTERPRETER
from .cast import cast
from .dense import input_precision
from .epilogue import Epilogue, pair_of
from .launch import Block, first_block, tuned, warps_of

__all__ = ["backward", "fits", "forward"]

WIDEST, WIDEST_FLOAT32 = 64, 32
WIDEST_BACKWARD = 32 if torch.version.hip else 64  # with 64 it spills scalar registers on gfx942


def fits(x: Tensor, Ws: Sequence[Tensor], backward: bool = False) -> bool:
    """Whether the kernels serve these weights: at least one hidden layer, one hidden width, nothing empty or too wide.

    Up to 64 (32 backward on ROCm): of wider layers the weights, and backward the sums of dW beside them, do not
    fit into registers.
    float32 up to 32: without tensor cores the products of wider tiles compile to very long code.
    """
    widths = {W.shape[0] for W in Ws[:-1]}
    sizes = (*widths, Ws[0].shape[1], Ws[-1].shape[0])
    widest = WIDEST_FLOAT32 if x.dtype == torch.float32 else WIDEST_BACKWARD if backward else WIDEST
    return len(widths) == 1 and min(sizes) > 0 and max(sizes) <= widest and x.numel() > 0


@triton.jit
def _product(a, w, PRECISION: tl.constexpr):
    if IN_INTERPRETER:  # its dot takes the bits of bfloat16 for integers
        a, w = a.to(tl.float32), w.to(tl.float32)
    return tl.dot(a, w, input_precision=PRECISION)


@triton.jit
def _tile(P, row, column, rows, columns):
    """The (row, column) elements of a contiguous matrix of this size, 0 outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(P + row[:, None] * columns + column[None, :], mask=inside, other=0.0)


@triton.jit
def _forward(
    X, FIRST, HIDDEN, LAST, BIAS, S, Y, M, I, H, O, layers, a, b,  # noqa: E741
    KEY: tl.constexpr, HAS_BIAS: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, SIZE_I: tl.constexpr, SIZE_H: tl.constexpr, SIZE_O: tl.constexpr,
):  # fmt: skip
    """``layers`` is the number of hidden layers; STORE is "z", "a" or ""."""
    rows = tl.cast(M, tl.int64)  # a size of 1 is a constant in a launch, which has no .to
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i, h, o = tl.arange(0, SIZE_I), tl.arange(0, SIZE_H), tl.arange(0, SIZE_O)
    inside = (row < M)[:, None] & (h < H)[None, :]
    x = _tile(X, row, i, M, I)
    z = _product(x, tl.trans(_tile(FIRST, h, i, H, I)), PRECISION)
    for layer in range(layers):
        if layer > 0:
            w = _tile(HIDDEN + (layer - 1) * H * H, h, h, H, H)
            z = _product(cast(z, X.dtype.element_ty), tl.trans(w), PRECISION)
        if HAS_BIAS:
            z += tl.load(BIAS + layer * H + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        at = (row + layer * rows)[:, None] * H + h[None, :]
        if STORE == "z":
            tl.store(S + at, cast(z, S.dtype.element_ty), mask=inside)
        z = tl.where((h < H)[None, :], act.forward(z, KEY, a, b), 0.0)  # Inf times the padding is NaN
        if STORE == "a":
            tl.store(S + at, cast(z, S.dtype.element_ty), mask=inside)
    y = _product(cast(z, X.dtype.element_ty), tl.trans(_tile(LAST, o, h, O, H)), PRECISION)
    if HAS_BIAS:
        y += tl.load(BIAS + layers * H + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + row[:, None] * O + o[None, :], cast(y, Y.dtype.element_ty), mask=(row < M)[:, None] & (o < O)[None, :])


@triton.jit
def _add(P, value, row, column, rows, columns, step):
    """P += value in a matrix that this program alone writes; the first time P = value."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = P + row[:, None] * columns + column[None, :]
    if step > 0:
        value += tl.load(at, mask=inside, other=0.0)
    tl.store(at, value, mask=inside)


@triton.jit
def _add_bias(P, dz, column, columns, step):
    value = tl.sum(dz, axis=0)
    if step > 0:
        value += tl.load(P + column, mask=column < columns, other=0.0)
    tl.store(P + column, value, mask=column < columns)


@triton.jit
def _backward(
    X, FIRST, HIDDEN, LAST, S, DY, DX, PARTIAL, M, I, H, O, layers, steps, parameters, a, b,  # noqa: E741
    KEY: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, SIZE_I: tl.constexpr, SIZE_H: tl.constexpr, SIZE_O: tl.constexpr,
):  # fmt: skip
    """A program takes ``steps`` blocks of rows below each other, and sums its own dW and db: a row of PARTIAL.

    Its order: dW of the first, of the other hidden layers, of the last; then db in the same order. Rows outside have
    dz = 0, because their dy is 0.
    """
    program = tl.program_id(0).to(tl.int64)
    rows = tl.cast(M, tl.int64)
    i, h, o = tl.arange(0, SIZE_I), tl.arange(0, SIZE_H), tl.arange(0, SIZE_O)
    OWN = PARTIAL + program * parameters
    OWN_LAST = OWN + H * I + (layers - 1) * H * H
    OWN_BIAS = OWN_LAST + O * H
    for step in range(steps):
        row = (program * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = (row < M)[:, None]
        dz = _tile(DY, row, o, M, O)
        s = _tile(S + (layers - 1) * rows * H, row, h, M, H)
        v = cast(s.to(tl.float32) if OUTPUT else act.forward(s.to(tl.float32), KEY, a, b), X.dtype.element_ty)
        _add(OWN_LAST, _product(tl.trans(dz), v, PRECISION), o, h, O, H, step)
        _add_bias(OWN_BIAS + layers * H, dz.to(tl.float32), o, O, step)
        da = _product(dz, _tile(LAST, o, h, O, H), PRECISION)
        for back in range(layers):
            layer = layers - 1 - back
            d = tl.where(inside & (h < H)[None, :], act.pull(da, s.to(tl.float32), KEY, OUTPUT, a, b), 0.0)
            _add_bias(OWN_BIAS + layer * H, d, h, H, step)
            dh = cast(d, X.dtype.element_ty)
            if layer > 0:
                s = _tile(S + (layer - 1) * rows * H, row, h, M, H)
                v = cast(s.to(tl.float32) if OUTPUT else act.forward(s.to(tl.float32), KEY, a, b), X.dtype.element_ty)
                _add(OWN + H * I + (layer - 1) * H * H, _product(tl.trans(dh), v, PRECISION), h, h, H, H, step)
                da = _product(dh, _tile(HIDDEN + (layer - 1) * H * H, h, h, H, H), PRECISION)
            else:
                x = _tile(X, row, i, M, I)
                _add(OWN, _product(tl.trans(dh), x, PRECISION), h, i, H, I, step)
                dx = _product(dh, _tile(FIRST, h, i, H, I), PRECISION)
                at = DX + row[:, None] * I + i[None, :]
                tl.store(at, cast(dx, DX.dtype.element_ty), mask=inside & (i < I)[None, :])
        tl.debug_barrier()  # the next step's threads read what this one's wrote


ROWS = first_block("mlp").rows
PROGRAMS = 512
"""At most so many partial sums in backward."""


def _block(*sizes: int, backward: bool, float32: bool, rows: int = ROWS) -> Block:
    """So many warps that nothing is spilled: the weights of a layer are in registers at once."""
    return Block(max(sizes), rows, 8 if backward or max(sizes) > 32 else 2 if float32 else 4)


def _weights(Ws: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.stack(tuple(Ws[1:-1])) if len(Ws) > 2 else Ws[0]  # not read then
    return Ws[0].contiguous(), hidden, Ws[-1].contiguous()


def _sizes(I: int, H: int, O: int) -> tuple[int, int, int]:  # noqa: E741
    first, hidden, last = (max(16, triton.next_power_of_2(size)) for size in (I, H, O))
    return first, hidden, last


def forward(
    x: Tensor, Ws: Sequence[Tensor], bs: Sequence[Tensor | None], e: Epilogue, keep: bool
) -> tuple[Tensor, ...]:
    """y (..., O), and if asked to ``keep`` it z or a of each hidden layer, (..., H), whichever tells f′."""
    store = ("z" if e.keeps() == "z" else "a") if keep else ""
    shape, layers = x.shape[:-1], len(Ws) - 1
    M, I, H, O = shape.numel(), Ws[0].shape[1], Ws[0].shape[0], Ws[-1].shape[0]  # noqa: E741
    y = x.new_empty((*shape, O))
    s = x.new_empty((layers, *shape, H)) if store else None
    bias = None
    if any(b is not None for b in bs):
        bias = torch.cat([x.new_zeros(W.shape[0]) if b is None else b for W, b in zip(Ws, bs, strict=True)])
    x, weights, float32 = x.contiguous(), _weights(Ws), x.dtype == torch.float32

    def run(block: Block) -> None:
        _forward[(triton.cdiv(M, block.rows),)](
            x, *weights, bias, s, y, M, I, H, O, layers, *pair_of(e),
            e.name, bias is not None, store, input_precision(x.dtype), block.rows, *_sizes(I, H, O),
            num_warps=warps_of(_block(*_sizes(I, H, O), backward=False, float32=float32, rows=block.rows)),
        )  # fmt: skip

    tuned("mlp", max(I, H, O), x, run, "forward")
    return (y,) if s is None else (y, *s)


def backward(
    dy: Tensor, x: Tensor, Ws: Sequence[Tensor], s: Sequence[Tensor], e: Epilogue
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx, dW and db of each layer, from what forward kept."""
    output = e.keeps() != "z"
    layers = len(Ws) - 1
    M, I, H, O = x.shape[:-1].numel(), Ws[0].shape[1], Ws[0].shape[0], Ws[-1].shape[0]  # noqa: E741
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes = [W.numel() for W in Ws] + [W.shape[0] for W in Ws]
    x, weights, stored, dy, float32 = (
        x.contiguous(),
        _weights(Ws),
        _joined(s),
        dy.contiguous(),
        x.dtype == torch.float32,
    )

    def run(block: Block) -> Tensor:
        blocks = triton.cdiv(M, block.rows)
        steps = triton.cdiv(blocks, PROGRAMS)
        programs = triton.cdiv(blocks, steps)
        partial = torch.empty((programs, sum(sizes)), dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            x, *weights, stored, dy, dx, partial, M, I, H, O, layers, steps,
            sum(sizes), *pair_of(e), e.name, output, input_precision(x.dtype), block.rows, *_sizes(I, H, O),
            num_warps=warps_of(_block(*_sizes(I, H, O), backward=True, float32=float32, rows=block.rows)),
        )  # fmt: skip
        return partial

    sums = tuned("mlp", max(I, H, O), x, run, "backward").sum(0).to(x.dtype).split(sizes)
    return dx, [dW.view_as(W) for dW, W in zip(sums, Ws, strict=False)], list(sums[layers + 1 :])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one, one below the other: as forward laid them, unless something has moved them since."""
    first = tensors[0]
    step = first.numel() * first.element_size()
    if all(
        t.is_contiguous()
        and t.data_ptr() == first.data_ptr() + n * step
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for n, t in enumerate(tensors)
    ):
        return first
    return torch.stack(tuple(tensors))
