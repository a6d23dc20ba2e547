"""How the kernels of batch normalization cut a tensor up: small tiles, several splits, 64-bit offsets, the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton_batch_norm import (
    KERNELS,
    _triton,  # noqa: F401  a fixture
    check,
    inputs_like,
    made,
    ours,
    parameters,
    results,
)
from torch import Tensor

from bp_torch import triton_kernels as kernels
from bp_torch.triton_kernels.launch import TABLE, Block, ShapeClass

ONE_BACKEND = "about the kernels alone"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that little data takes many of them, splits in several rounds."""
    for name, value in {"FEWEST_TILES": 1, "MOST_TILES": 3, "SPLITS_AT_ONCE": 2}.items():
        monkeypatch.setattr(KERNELS, name, value)
    for family, default, block in (("rows", "BY_ROWS", Block(4, 4)), ("planes", "BY_PLANES", Block(8, 2))):
        monkeypatch.setattr(KERNELS, default, block)
        monkeypatch.setitem(TABLE, f"batch norm {family}", (ShapeClass("any", math.inf, (block,)),))
    KERNELS.Plan.of.cache_clear()
    yield
    KERNELS.Plan.of.cache_clear()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("shape", "order"),
    [((23, 6), None), ((3, 2, 5, 5), None), ((2, 3, 3, 4), torch.channels_last), ((11, 1, 9), None)],
    ids=str,
)
def test_many_small_tiles_and_splits(shape: tuple[int, ...], order: Any) -> None:

    def draw() -> Tensor:
        x = 1e5 + torch.randn(shape, device=DEVICE)
        return x if order is None else x.contiguous(memory_format=order)

    plan = KERNELS.Plan.for_tensor(draw(), kernels.elementwise.Layout.of(draw()))
    assert plan.splits > KERNELS.SPLITS_AT_ONCE
    check(lambda: inputs_like(draw(), residual=torch.float32), "gelu")
    check(lambda: inputs_like(draw()), "relu", tuple(torch.rand(2, shape[1], device=DEVICE) + 0.1))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_drawn_shapes_and_options(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4), label="shape"))
    if shape[0] * torch.Size(shape[2:]).numel() == 1:
        shape = (2, *shape[1:])
    residual, evaluation = data.draw(st.booleans()), data.draw(st.booleans())
    key = data.draw(st.sampled_from(["identity", "relu", "gelu", "tanh", "leaky_relu"]), label="key")
    last = len(shape) == 4 and data.draw(st.booleans(), label="channels last")
    order = torch.channels_last if last else torch.contiguous_format
    statistics = tuple(torch.rand(2, shape[1], device=DEVICE) + 0.5) if evaluation else (None, None)

    def draw() -> list[Tensor]:
        x = torch.randn(shape, device=DEVICE).contiguous(memory_format=order)
        return inputs_like(x, residual=x.dtype if residual else None)

    check(draw, key, statistics, once=True)


@pytest.mark.parametrize("layout", ["channels-last", "split-planes", "split-rows"])
def test_same_bits_again_and_at_64_bit_offsets(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = made(layout)
    inputs, dy = [x, *parameters(x, x.dtype), torch.randn_like(x)], torch.randn_like(x)
    reference = results(ours, inputs, dy, "gelu")
    torch.testing.assert_close(results(ours, inputs, dy, "gelu"), reference, rtol=0, atol=0)
    monkeypatch.setattr(KERNELS, "is_wide", lambda *_: True)
    torch.testing.assert_close(results(ours, inputs, dy, "gelu"), reference, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("planes", "rows", "columns", "channels"),
    [(True, 32, 112 * 112, 64), (False, 32 * 112 * 112, 64, 64), (False, 65536, 128, 128), (True, 32, 49, 2048)],
)
def test_a_reduction_fills_a_chip(planes: bool, rows: int, columns: int, channels: int) -> None:
    """At least 4 programs for each of 132 multiprocessors, for batch 32, 64 channels, 112 × 112 among others."""
    plan = KERNELS.Plan.of(planes, rows, columns, channels)
    assert 512 <= plan.groups * plan.splits <= 2 * max(KERNELS.PROGRAMS, channels)


@given(
    planes=st.booleans(),
    rows=st.integers(1, 10**6),
    columns=st.integers(1, 10**5),
    channels=st.integers(1, 5000),
)
def test_a_plan_covers_everything_once(planes: bool, rows: int, columns: int, channels: int) -> None:
    columns = columns if planes else channels
    plan = KERNELS.Plan.of(planes, rows, columns, channels)
    assert plan.across * plan.block_columns >= columns > (plan.across - 1) * plan.block_columns
    down = plan.tiles // plan.across if planes else plan.tiles
    assert down * plan.block_rows >= rows > (down - 1) * plan.block_rows
    assert plan.splits * plan.steps >= plan.tiles > (plan.splits - 1) * plan.steps  # no split is empty
    assert plan.steps <= KERNELS.MOST_TILES
    assert plan.block_rows * plan.block_columns <= KERNELS.TILE
