"""Launch parameters: the table, autotuning and its file, grids, and warming up."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from device import DEVICE
from triton.runtime.errors import OutOfResources

import bp_torch
import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch import triton_kernels as kernels
from bp_torch.functions.epilogue import Epilogue
from bp_torch.triton_kernels import launch, tuning
from bp_torch.triton_kernels.launch import TABLE, Block, block_for, grid_of, warps_of

ONE_BACKEND = "about the kernels alone"

CPU = torch.device("cpu")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[dict[int, float]], list[int]]:
    """Autotuning with a clock that knows the time of each number of columns; returns what it timed."""
    monkeypatch.setenv("BP_TORCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_chosen", {})

    def with_times(times: dict[int, float]) -> list[int]:
        timed: list[int] = []
        ran: list[Block] = []

        def clock(run: Callable[[], object]) -> float:
            run()
            timed.append(ran[-1].columns)
            return times[ran[-1].columns]

        monkeypatch.setattr(tuning, "milliseconds", clock)
        with_times.launch = ran.append  # type: ignore[attr-defined]
        return timed

    return with_times


@pytest.mark.parametrize("family", TABLE)
def test_blocks_are_ones_that_compile(family: str) -> None:
    """Triton's ranges are powers of 2, a product takes 16 of each at least, and a program has 32 warps at most."""
    sizes = [c.below for c in TABLE[family]]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == float("inf")
    for block in (block for c in TABLE[family] for block in c.blocks):
        numbers = (block.columns, block.rows, block.depth, block.warps)
        assert all(n >= 1 and n & (n - 1) == 0 for n in numbers), block
        assert block.warps <= 32, block
        assert block.depth == 1 or min(block.columns, block.rows, block.depth) >= 16, block


def test_offsets_of_64_bits_are_for_tensors_that_need_them() -> None:
    small, large = torch.empty(2**31 - 1, device="meta"), torch.empty(2**31, device="meta")
    assert not launch.is_wide(small, None, small)
    assert launch.is_wide(small, None, large)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = (Block(64), Block(128), Block(256, warps=8))
    monkeypatch.setitem(
        TABLE, "test", (launch.ShapeClass("small", 10, blocks[:1]), launch.ShapeClass("large", 1e9, blocks))
    )


def pick(tuned: Callable[[dict[int, float]], list[int]], size: int = 100) -> int:
    return block_for("test", size, CPU, tuned.launch).columns  # type: ignore[attr-defined]


def test_every_row_of_the_table_is_usable() -> None:
    for family, classes in TABLE.items():
        assert classes[-1].below == float("inf"), family
        assert [c.below for c in classes] == sorted(c.below for c in classes)
        assert len({c.name for c in classes}) == len(classes)
        for block in (b for c in classes for b in c.blocks):
            # Blocks are powers of two, and 32 warps do not run on AMD.
            for number in (block.columns, block.rows, block.warps):
                assert number & (number - 1) == 0
            assert block.warps <= 16


def test_the_first_block_of_the_class_unless_asked_to_tune(table: None) -> None:
    def never(block: Block) -> None:
        raise AssertionError("nothing is timed")

    assert not tuning.ENABLED
    assert block_for("test", 9, CPU, never).columns == 64
    assert block_for("test", 10, CPU, never).columns == 64


def test_the_fastest_block_is_used_and_kept(table: None, tuned: Callable[..., list[int]]) -> None:
    timed = tuned({64: 3.0, 128: 1.0, 256: 2.0})
    assert pick(tuned) == 128
    assert timed == [64, 128, 256]
    assert pick(tuned) == 128
    assert len(timed) == 3
    # Another process reads it from disk, and another class is timed by itself.
    tuning._chosen.clear()
    timed = tuned({64: 1.0, 128: 9.0, 256: 9.0})
    assert pick(tuned) == 128
    assert timed == []
    assert pick(tuned, size=3) == 64
    assert timed == []  # there is nothing to choose from
    kept = json.loads(tuning.cache_file().read_text())
    assert kept == {
        f"cpu | triton {triton.__version__} | test/large": "1 x 128, 4 warps",
        f"cpu | triton {triton.__version__} | test/small": "1 x 64, 4 warps",
    }
    assert list(tuning.cache_file().parent.iterdir()) == [tuning.cache_file()]


@pytest.fixture
def last_is_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Autotuning with a clock by which each block is faster than the one before."""
    times = itertools.count(0, -1)

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(times)

    monkeypatch.setenv("BP_TORCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "milliseconds", clock)


def normalize(x: torch.Tensor, training: bool = True) -> torch.Tensor:
    return bpF.batch_norm_act(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), training=training, activation="tanh")


def mlp(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return bpF.mlp(x, [torch.randn(8, 5), torch.randn(8, 8), torch.randn(3, 8)], None, activation="relu")


def dense(x: torch.Tensor) -> torch.Tensor:
    W = torch.linspace(-1, 1, 7 * x.shape[-1], dtype=x.dtype).reshape(7, -1)
    with bp_torch.batch_invariant():  # otherwise cuBLAS may be chosen
        return bpF.dense(x, W, activation="relu")


CLASSES, TARGETS = torch.tensor([0, 2, 1]), torch.linspace(0, 1, 15).reshape(3, 5)
TUNED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...], set[str]]] = {
    "elementwise": (bpF.gelu, (3, 5), {"elementwise/small/float32/forward", "elementwise/small/float32/backward"}),
    "dense": (dense, (3, 5), {"dense float32/any/float32", "elementwise/small/float32/backward"}),
    "batch norm rows": (
        normalize, (3, 5), {"batch norm rows/small/float32/forward", "batch norm rows/small/float32/backward"}
    ),
    "batch norm planes": (
        normalize, (3, 5, 4), {"batch norm planes/small/float32/forward", "batch norm planes/small/float32/backward"}
    ),
    "batch norm in evaluation": (
        lambda x: normalize(x, False), (3, 5),
        {"batch norm rows/small/float32/normalized", "batch norm rows/small/float32/normalize_backward"},
    ),
    "softmax": (
        lambda x: bpF.softmax(x, 1), (3, 5),
        {"softmax/short row/float32/forward", "softmax/short row/float32/backward"},
    ),
    "long softmax": (
        lambda x: bpF.softmax(x, 1), (1, 5000),
        {"softmax/whole row/float32/forward", "softmax/whole row/float32/backward"},
    ),
    "strided softmax": (
        lambda x: bpF.log_softmax(x, 1), (3, 5, 2),
        {"softmax strided/any/float32/softmax forward", "softmax strided/any/float32/softmax backward"},
    ),
    "cross-entropy": (
        lambda x: bpF.cross_entropy(x, CLASSES), (3, 5),
        {"cross-entropy/short row/float32/forward", "cross-entropy/short row/float32/backward"},
    ),
    "cross-entropy of probabilities": (
        lambda x: bpF.cross_entropy(x, TARGETS), (3, 5),
        {"cross-entropy probabilities/any/float32/forward", "cross-entropy probabilities/any/float32/backward"},
    ),
    "nll": (lambda x: bpF.nll_loss(x, CLASSES), (3, 5), {"cross-entropy/short row/float32/nll backward"}),
    "loss": (
        lambda x: bpF.mse_loss(x, TARGETS), (3, 5), {"loss/small/float32/forward", "loss/small/float32/backward"}
    ),
    "mlp": (mlp, (3, 5), {"mlp/any/float32/forward", "mlp/any/float32/backward"}),
}  # fmt: skip


@pytest.mark.skipif(not kernels.INTERPRETED, reason="on a GPU every candidate would be compiled")
@pytest.mark.parametrize(("f", "shape", "expected"), TUNED.values(), ids=TUNED)
def test_every_family_is_tuned_by_class_dtype_and_kernel(
    f: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], expected: set[str], last_is_fastest: None
) -> None:
    """Each candidate runs, the chosen one gives right values, and the same bits run after run."""

    def results(name: str) -> tuple[torch.Tensor, ...]:
        x = torch.linspace(-2, 2, math.prod(shape)).cos().reshape(shape).requires_grad_()
        with bp_torch.backend(name):
            y = f(x)
            (dx,) = torch.autograd.grad(y, x, torch.linspace(1, 2, y.numel()).reshape(y.shape))
        return y, dx

    first, second = results("triton"), results("triton")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, results("torch"))
    kept = json.loads(tuning.cache_file().read_text())
    chosen = {key.rsplit(" | ", 1)[1]: value for key, value in kept.items()}
    assert expected <= set(chosen)
    for key in expected:
        family, name = key.split("/")[:2]
        blocks = next(c.blocks for c in TABLE[family] if c.name == name)
        assert len(blocks) > 1
        assert chosen[key] == tuning.describe(blocks[-1])


@pytest.mark.skipif(not kernels.INTERPRETED, reason="on a GPU every candidate would be compiled")
@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (dense, (70, 33)),
        (mlp, (70, 5)),
        (lambda x: bpF.softmax(x, 1), (70, 9)),
        (lambda x: bpF.cross_entropy(x, torch.arange(len(x)) % 9, reduction="none"), (70, 9)),
        (lambda x: normalize(x, False), (70, 5)),
    ],
    ids=["dense", "mlp", "softmax", "cross-entropy", "batch norm in evaluation"],
)
def test_tuned_blocks_do_not_depend_on_the_batch(
    f: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], last_is_fastest: None
) -> None:
    x = torch.randn(shape)
    with bp_torch.backend("triton"), bp_torch.batch_invariant(), torch.no_grad():
        whole = f(x)
        for rows in (1, 3, 64):
            assert torch.equal(f(x[:rows]), whole[:rows])


def test_a_block_that_the_gpu_has_no_room_for_is_not_chosen(
    table: None, tuned: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned({64: 3.0, 128: 1.0, 256: 2.0})
    clock = tuning.milliseconds

    def limited(run: Callable[[], object]) -> float:
        time = clock(run)
        if time == 1.0:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return time

    monkeypatch.setattr(tuning, "milliseconds", limited)
    assert pick(tuned) == 256


def test_a_block_that_left_the_table_is_timed_again(table: None, tuned: Callable[..., list[int]]) -> None:
    tuning.keep(tuning.cache_file(), f"cpu | triton {triton.__version__} | test/large", "7 x 7, 7 warps")
    tuned({64: 3.0, 128: 2.0, 256: 1.0})
    assert pick(tuned) == 256


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"key": 3}', "\x00\xff"])
def test_a_corrupt_file_is_ignored_with_a_warning(table: None, tuned: Callable[..., list[int]], content: str) -> None:
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(content, encoding="latin-1")
    tuned({64: 3.0, 128: 1.0, 256: 2.0})
    with pytest.warns(UserWarning, match="ignored the launch parameters in"):
        assert pick(tuned) == 128
    assert list(json.loads(tuning.cache_file().read_text()).values()) == ["1 x 128, 4 warps"]


def test_a_folder_that_cannot_be_written_only_warns(
    table: None, tuned: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BP_TORCH_CACHE", str(tmp_path / "file"))
    tuned({64: 3.0, 128: 1.0, 256: 2.0})
    with pytest.warns(UserWarning):  # noqa: PT030 -- one for reading, one for writing
        assert pick(tuned) == 128


def test_autotuning_is_off_unless_asked_for_and_in_the_interpreter() -> None:
    code = "from bp_torch.triton_kernels import tuning; print(tuning.ENABLED)"
    for environment, expected in (
        ({}, "False"),
        ({"BP_TORCH_AUTOTUNE": "1"}, "True"),
        ({"BP_TORCH_AUTOTUNE": "0"}, "False"),
        ({"BP_TORCH_AUTOTUNE": "1", "TRITON_INTERPRET": "1"}, "False"),
    ):
        plain = {
            key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "BP_TORCH_AUTOTUNE")
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=plain | environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_the_cache_is_in_the_home_folder_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BP_TORCH_CACHE", raising=False)
    assert tuning.cache_file() == Path.home() / ".cache" / "bp_torch" / "launch.json"


def test_grids() -> None:
    assert grid_of(1, 1024) == (1,)
    assert grid_of(1024, 1024) == (1,)
    assert grid_of(1025, 1024) == (2,)
    assert grid_of(65, 64, 70_000) == (140_000,)
    with pytest.raises(ValueError, match="a grid holds 2147483647"):
        grid_of(2**42, 1024)


def test_a_warp_of_64_threads_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert [warps_of(Block(64, warps=w)) for w in (1, 2, 4, 8)] == [1, 2, 4, 8]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert [warps_of(Block(64, warps=w)) for w in (1, 2, 4, 8)] == [1, 1, 2, 4]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="only its shape matters; a GPU shows it in test_gpu.py")
def test_more_columns_than_a_second_grid_dimension_holds() -> None:
    """65,535 blocks along y would end at 4.2 M columns; the interpreter's grid has no limit, so the launch is read."""
    grids = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: grids.append(grid)

    dy = torch.zeros(1, 64 * 65_536, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.elementwise, "_backward_bias", Recorded())
        kernels.elementwise.backward_bias(dy, None, None, Epilogue())
    assert grids == [(65_536,)]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dense = nn.Dense(6, 4, activation="relu", dropout=0.5)
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        self.calls += 1
        self.graph = torch.is_grad_enabled()
        return {"y": self.dense(self.norm(x)) * scale, "count": torch.tensor(3)}


@pytest.mark.parametrize("frozen", [False, True])
def test_warming_up_leaves_no_trace(frozen: bool) -> None:
    model = Model().requires_grad_(not frozen)
    model.dense.weight.grad = torch.full_like(model.dense.weight, 5.0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    state = torch.get_rng_state()
    x = torch.randn(8, 6, requires_grad=not frozen)
    torch.set_rng_state(state)
    with torch.no_grad() if frozen else contextlib.nullcontext():
        bp_torch.warmup(model, x, scale=2.0)
    assert model.calls == 1
    assert model.graph
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert tensors == {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert (model.dense.weight.grad == 5).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != "dense.weight")


def test_warming_up_runs_forward_and_backward_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("forward", "backward_bias"):
        original = getattr(kernels.elementwise, name)
        monkeypatch.setattr(
            kernels.elementwise, name, lambda *a, original=original, name=name: ran.append(name) or original(*a)
        )
    model = nn.Dense(6, 4, activation="relu", dropout=0.5).to(DEVICE)
    with bp_torch.backend("triton"):
        bp_torch.warmup(model, torch.randn(8, 6, device=DEVICE))
    assert ran == ["forward", "backward_bias"]


def test_warming_up_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"warmup: expected a torch\.nn\.Module, got function"):
        bp_torch.warmup(lambda x: x, torch.ones(2))  # type: ignore[arg-type]
