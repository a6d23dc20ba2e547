"""L1, L2 and elastic-net penalties over any number of tensors, in one launch for each of their dtypes.

    forward    R = λ₁ Σ |w| + λ₂ Σ w²        over all elements w of all tensors
    backward   dw = (λ₁ sign(w) + 2 λ₂ w) dR,   sign(0) = 0

A program takes one block of one tensor. Which one, a table on the device tells: for each block the address of its first
element, how many elements it has, and where its gradient goes. The table is made once for a list of tensors and kept as
long as they stay where they are, so that a training step copies nothing to the device. Gradients of one dtype are
slices of one buffer. Partial sums are added up in the order of blocks.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cast import cast
from .launch import device_of, first_block, warps_of
from .loss import finish

__all__ = ["backward", "forward"]


@triton.jit
def _block(TABLE, kind, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program's block: the address and the offset of its results; the elements that lie in whole groups of 8,
    which are accessed 16 bytes at a time, with their mask; and the up to 7 that are left, with theirs.

    ``kind`` is a pointer that has the type of the elements.
    """
    entry = TABLE + tl.program_id(0).to(tl.int64) * 3
    pointer = tl.load(entry).to(kind.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    count = tl.load(entry + 1).to(tl.int32)
    at = tl.multiple_of(tl.load(entry + 2), 16)
    whole = count // 8 * 8
    i = tl.arange(0, BLOCK)
    rest = whole + tl.arange(0, 8)
    return pointer, at, i, i < whole, rest, rest < count


@triton.jit
def _size(w, l1, l2, HAS_L1: tl.constexpr, HAS_L2: tl.constexpr):
    """λ₁ |w| + λ₂ w². A term whose λ is 0 is left out: 0 · ∞ would be NaN."""
    total = w * 0.0
    if HAS_L1:
        total = tl.abs(w) * l1
        if HAS_L2:
            total += w * w * l2
    elif HAS_L2:
        total = w * w * l2
    return total


@triton.jit
def _slope(w, l1, l2, HAS_L1: tl.constexpr, HAS_L2: tl.constexpr):
    """λ₁ sign(w) + 2 λ₂ w."""
    total = w * 0.0
    if HAS_L1:
        total = tl.where(w > 0, l1, tl.where(w < 0, -l1, 0.0))
        if HAS_L2:
            total += w * 2 * l2
    elif HAS_L2:
        total = w * 2 * l2
    return total


@triton.jit
def _forward(
    TABLE, PART, KIND, first, l1, l2,
    HAS_L1: tl.constexpr, HAS_L2: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The penalty of each block; those of this dtype begin at ``first``. KIND is a pointer of this dtype."""
    pointer, at, i, inside, rest, left = _block(TABLE, KIND, ALIGNED, BLOCK)
    size = _size(tl.load(pointer + i, mask=inside, other=0.0).to(tl.float32), l1, l2, HAS_L1, HAS_L2)
    last = _size(tl.load(pointer + rest, mask=left, other=0.0).to(tl.float32), l1, l2, HAS_L1, HAS_L2)
    total = tl.sum(size, axis=0).to(tl.float64) + tl.sum(last, axis=0).to(tl.float64)
    tl.store(PART + first + tl.program_id(0), total)


@triton.jit
def _backward(
    TABLE, DR, DW, l1, l2,
    HAS_L1: tl.constexpr, HAS_L2: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pointer, at, i, inside, rest, left = _block(TABLE, DW, ALIGNED, BLOCK)
    out = DW + at
    dR = tl.load(DR).to(tl.float32)
    w = tl.load(pointer + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, cast(_slope(w, l1, l2, HAS_L1, HAS_L2) * dR, DW.dtype.element_ty), mask=inside)
    w = tl.load(pointer + rest, mask=left, other=0.0).to(tl.float32)
    tl.store(out + rest, cast(_slope(w, l1, l2, HAS_L1, HAS_L2) * dR, DW.dtype.element_ty), mask=left)


BLOCK = first_block("penalty").columns
WARPS = warps_of(first_block("penalty"))
SLOT = 64
"""Every gradient begins at a multiple of so many elements of its buffer, hence of 16 bytes."""
KEPT = 32
"""Tables kept: one for each list of parameters, dtype and direction in use."""

Key = tuple[torch.device, tuple[tuple[int, int, int], ...]]
_tables: OrderedDict[Key, tuple[Tensor, bool]] = OrderedDict()
_captured: list[Tensor] = []
"""Tables that a CUDA graph reads: they stay."""


def _dense(w: Tensor) -> Tensor:
    """w, copied if it does not fill its memory without gaps."""
    return w if w.is_contiguous() or torch.empty_like(w, device="meta").stride() == w.stride() else w.contiguous()


def _slots(sizes: list[int]) -> list[int]:
    """Where each gradient begins in the buffer, and the buffer's size."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + triton.cdiv(size, SLOT) * SLOT)
    return starts


def _table(tensors: list[Tensor]) -> tuple[Tensor, bool]:
    """(blocks, 3) on the tensors' device, and whether all addresses are multiples of 16."""
    where = tuple((w.data_ptr(), w.numel(), w.element_size()) for w in tensors)
    key = (tensors[0].device, where)
    capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    found = _tables.get(key)
    if found is None:
        # A CUDA graph cannot copy from the host: there the table is computed on the device, at each replay.
        table = _blocks(where, tensors[0].device if capturing else torch.device("cpu")).to(tensors[0].device)
        found = table, all(address % 16 == 0 for address, _, _ in where)
        if not capturing:
            _tables[key] = found
            while len(_tables) > KEPT:
                _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if capturing:
        _captured.append(found[0])
    return found


def _blocks(where: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """The table of tensors given by address, number of elements and bytes of an element."""
    parts = []
    for (address, size, width), at in zip(where, _slots([size for _, size, _ in where]), strict=False):
        start = torch.arange(0, size, BLOCK, device=device)
        parts.append(torch.stack([address + start * width, (size - start).clamp(max=BLOCK), at + start], 1))
    return torch.cat(parts)


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for w in tensors:
        if w.numel():
            groups.setdefault(w.dtype, []).append(w)
    return list(groups.values())


def forward(tensors: list[Tensor], l1: float, l2: float, dtype: torch.dtype) -> Tensor:
    """R in ``dtype``. One launch for each dtype among the tensors, and one for the last sum."""
    groups = [[_dense(w) for w in group] for group in _by_dtype(tensors)]
    if not groups or (l1 == 0 and l2 == 0):
        return tensors[0].new_zeros((), dtype=dtype)
    tables = [_table(group) for group in groups]
    part = tensors[0].new_empty((1, sum(len(table) for table, _ in tables)), dtype=torch.float64)
    first = 0
    with device_of(part):
        for group, (table, aligned) in zip(groups, tables, strict=True):
            _forward[(len(table),)](
                table, part, group[0], first, l1, l2, l1 != 0, l2 != 0, aligned, BLOCK, num_warps=WARPS
            )
            first += len(table)
    return finish(part, dtype, 1, False)[0]


def backward(dR: Tensor, tensors: list[Tensor], l1: float, l2: float) -> list[Tensor]:
    """dw of each tensor, in its dtype and memory layout. One launch for each dtype among them."""
    dense = [_dense(w) for w in tensors]
    gradients: dict[int, Tensor] = {}
    for group in _by_dtype(dense):
        table, aligned = _table(group)
        starts = _slots([w.numel() for w in group])
        buffer = group[0].new_empty(starts[-1])
        with device_of(dR):
            _backward[(len(table),)](
                table, dR, buffer, l1, l2, l1 != 0, l2 != 0, aligned, BLOCK, num_warps=WARPS
            )  # fmt: skip
        for w, start in zip(group, starts, strict=False):
            gradients[id(w)] = buffer.as_strided(w.shape, w.stride(), start)
    return [gradients[id(w)] if w.numel() else torch.empty_like(w) for w in dense]
