"""Times every block that autotuning may choose, of each family of kernels, at the benchmark's shapes.

One line a block, the fastest first, with the bytes that must move a second::

    python -m benchmarks.gpu.tune          # or: tune softmax, the rows with that in their names
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bp_torch import triton_kernels as kernels
from bp_torch.functions.batch_norm import Saved
from bp_torch.functions.epilogue import Epilogue
from bp_torch.triton_kernels import batch_norm, launch, softmax, tuning
from bp_torch.triton_kernels.launch import Block

DTYPE = torch.bfloat16
FURTHER = {
    "elementwise": (Block(2048, warps=4), Block(4096, warps=4)),
    "elementwise bias": (Block(128, 32, 8), Block(256, 8, 8)),
    "softmax": (Block(16384, warps=16), Block(32768, warps=16)),
    "cross-entropy": (Block(16384, warps=16),),
}
"""Blocks beside those of the table."""
PROGRAMS = (528, 660, 1024, 2112)
"""Of batch norm's reductions."""


class Row:
    """What is timed now."""

    title = ""
    moved = 0


def best(key: str, blocks: Sequence[Block], device: torch.device, run: Callable[[Block], object]) -> Block:
    """In place of tuning.best: times all of them and tells, whatever was kept."""
    times = {block: tuning._time(lambda: run(block)) for block in blocks}
    order = sorted(blocks, key=times.__getitem__)
    for block in order:
        rate = Row.moved / times[block] / 1e9
        print(f"{Row.title:34s} {key:44s} {tuning.describe(block):26s} {times[block] * 1e3:8.1f} us {rate:6.2f} TB/s")
    if order[0] != blocks[0]:
        gain = times[blocks[0]] / times[order[0]]
        print(f"{Row.title}, {key}: other than {tuning.describe(blocks[0])}: {tuning.describe(order[0])}, {gain:.2f} x")
    sys.stdout.flush()
    return order[0]


def time(title: str, moved: int, run: Callable[[], object]) -> None:
    """``moved``: bytes, at the least."""
    if not any(text in title for text in sys.argv[1:] or [""]):
        return
    Row.title, Row.moved = title, moved
    try:
        run()
    except Exception as error:  # such as a block for which the compiler fails
        print(f"{title} FAILED {type(error).__name__} {str(error)[-300:]}".replace("\n", " "), flush=True)
    torch.cuda.empty_cache()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def copy() -> None:
    source = random(2**28)  # not zeros, which take less power to move
    target = torch.empty_like(source)
    milliseconds = tuning.milliseconds(lambda: target.copy_(source))
    print(f"copy of random numbers {4 * source.numel() / milliseconds / 1e9:.2f} TB/s", flush=True)


def elementwise() -> None:
    x, y, n = random(65536, 1024), random(65536, 1024), 65536 * 1024
    s = torch.tensor([5], device="cuda")
    ew, dropped = kernels.elementwise, Epilogue("relu", p=0.5)
    time("relu dropout", 4 * n, lambda: ew.forward(x, None, None, s, dropped))
    time("residual", 6 * n, lambda: kernels.residual.forward(x, y, s, dropped))
    time("residual backward", 8 * n, lambda: kernels.residual.backward(x, y, s, dropped, (DTYPE, DTYPE)))
    time("bias relu backward", 6 * n, lambda: ew.backward_bias(x, y, None, dropped))
    time("bias gelu dropout backward", 6 * n, lambda: ew.backward_bias(x, y, s, Epilogue("gelu", p=0.5)))


def norms() -> None:
    for shape in ((65536, 1024), (32, 64, 112, 112), (128, 512, 28, 28)):
        for last in (False, True)[: len(shape) // 2]:
            x, dy = random(*shape), random(*shape)
            if last:
                x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
            channels, n = shape[1], x.numel()
            g, b = random(channels), random(channels)
            mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
            for programs in PROGRAMS:
                batch_norm.PROGRAMS = programs
                batch_norm.Plan.of.cache_clear()
                name = f"{'x'.join(map(str, shape))}{' channels last' * last} {programs}"
                needed: tuple[Any, ...] = ((True, True, True, False), (DTYPE, DTYPE, DTYPE, None))
                time(
                    f"batch norm {name}", 6 * n,
                    lambda: kernels.batch_norm.forward(x, g, b, None, 1e-5, Epilogue("relu")),
                )  # fmt: skip
                time(
                    f"batch norm backward {name}", 10 * n,
                    lambda: kernels.batch_norm.backward(
                        dy, None, None, Saved(x, g, b, None, mean, var, None, None), 1e-5, Epilogue("relu"), *needed
                    ),
                )  # fmt: skip


def rows() -> None:
    shapes = ((32768, 1024), (16384, 4096), (8192, 8192), (4096, 32768), (2048, 65536), (1024, 131072))
    for count, columns in shapes:
        x, n = random(count, columns), count * columns
        y = x.float().softmax(1).to(DTYPE)
        time(f"softmax {count}x{columns}", 4 * n, lambda: kernels.softmax.forward(x, 1, False))
        time(f"softmax backward {count}x{columns}", 6 * n, lambda: kernels.softmax.backward(x, y, 1, False))
    for count, columns in ((8192, 32000), (4096, 128256), (65536, 1000)):
        x, t = random(count, columns), torch.randint(columns, (count,), device="cuda")

        def both() -> None:
            entropy, one = kernels.cross_entropy, torch.ones((), device="cuda", dtype=DTYPE)
            _, total, m, r = entropy.forward(x, 1, t, None, -100, 0.0, "mean")
            entropy.backward(one, x, 1, t, None, total, m, r, -100, 0.0, "mean")

        time(f"cross-entropy {count}x{columns}", 2 * count * columns, both)  # backward moves twice as much


def losses() -> None:
    x, t, n = random(16384, 4096), random(16384, 4096), 16384 * 4096
    one = torch.ones((), device="cuda", dtype=DTYPE)
    needs = (True, False, False)
    time("mse", 4 * n, lambda: kernels.loss.forward(x, t, None, None, "mse", 0.0, "mean", DTYPE))
    time("mse backward", 6 * n, lambda: kernels.loss.backward(one, x, t, None, None, "mse", 0.0, "mean", needs))


def main() -> None:
    mock.patch.multiple(tuning, ENABLED=True, best=best).start()  # every launch is timed, by what keeps nothing
    softmax.LARGEST_TILE = 16384
    for family, blocks in FURTHER.items():
        launch.TABLE[family] = tuple(
            launch.ShapeClass(c.name, c.below, (*c.blocks, *(b for b in blocks if b not in c.blocks)))
            for c in launch.TABLE[family]
        )
    copy()
    for part in (elementwise, norms, rows, losses):
        part()


if __name__ == "__main__":
    main()
