"""Where the tiles of batch norm's kernels lie: rows of channels, or planes of one channel."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["channels_of", "last_first", "matrix_tile", "share_of", "spread", "tile"]


@triton.jit
def _long(t, WIDE: tl.constexpr):
    """The number of a tile, of which there are fewer than 2³¹, as offsets must be counted."""
    if WIDE:
        return tl.full((), 0, tl.int64) + t
    else:
        return t


@triton.jit
def tile(
    t, group, rows, columns, channels, across,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tile t of a group of channels: offsets, mask, and the number of values of a channel in it."""
    if PLANES:
        top = _long(t // across, WIDE) * BLOCK_ROWS
        left = _long(t % across, WIDE) * BLOCK_COLUMNS
    else:
        top = _long(t, WIDE) * BLOCK_ROWS
        left = _long(group, WIDE) * BLOCK_COLUMNS
    r = top + tl.arange(0, BLOCK_ROWS)
    k = left + tl.arange(0, BLOCK_COLUMNS)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    count = tl.minimum(rows - top, BLOCK_ROWS)
    if PLANES:
        count = count * tl.minimum(columns - left, BLOCK_COLUMNS)
        r = r * channels + group
    return r[:, None] * columns + k[None, :], inside, count.to(tl.float32)


@triton.jit
def matrix_tile(
    t, rows, columns, channels, across,
    PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tile t of the whole matrix: offsets, mask, and the channels of its rows (planes) or columns, with their mask."""
    r = _long(t // across, WIDE) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = _long(t % across, WIDE) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (r < rows)[:, None] & (k < columns)[None, :]
    i = r[:, None] * columns + k[None, :]
    if PLANES:
        return i, inside, r % channels, r < rows
    else:
        return i, inside, k, k < columns


@triton.jit
def last_first():
    """The program's number, counted from the end: what the sweep before read last is in the L2 cache still."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def share_of(groups, steps, tiles):
    """The program's group and split, and its tiles first ... last - 1."""
    program = tl.program_id(0)
    split = program // groups
    first = split * steps
    return program % groups, split, first, tl.minimum(first + steps, tiles)


@triton.jit
def channels_of(group, channels, PLANES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The channels of a group, and which of them there are."""
    if PLANES:
        c = group + tl.arange(0, 1)
    else:
        c = group * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return c, c < channels


@triton.jit
def spread(v, PLANES: tl.constexpr):
    """A value of each row (planes) or column, to broadcast over a tile of the whole matrix."""
    return v[:, None] if PLANES else v[None, :]
