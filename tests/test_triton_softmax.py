"""The kernels of softmax and log-softmax: every shape of tile, against float64 and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from device import DEVICE
from exact import assert_as_good_as_torch
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF
from bp_torch import triton_kernels as kernels

ONE_BACKEND = "about the kernels alone"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with bp_torch.backend("triton"):
        yield


def results(f: Callable[..., Tensor], x: Tensor, dim: int, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = f(x, dim)
    return [y, *torch.autograd.grad(y, x, dy.to(y.dtype))]


def check(name: str, make: Callable[[], Tensor], dim: int) -> None:
    """Forward and gradient, for what ``make`` draws."""

    def draw() -> tuple[Tensor, Tensor]:
        x = make()
        return x, torch.randn(x.shape, dtype=torch.float64, device=x.device).to(x.dtype)

    def by(module: Any) -> Callable[[Tensor, Tensor], list[Tensor]]:
        return lambda x, dy: results(getattr(module, name), x, dim, dy)

    assert_as_good_as_torch(by(bpF), by(torch.nn.functional), draw)


@pytest.mark.to_the_last_digits
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((1, 1), 1),
        ((3, 1), 1),
        ((1, 7), 1),
        ((300, 10), 1),  # several tiles of short rows, the last one not full
        ((5, 1000), 1),
        ((2, 5000), 1),  # one block, not a power of 2
        ((2, 17000), 1),  # longer than a block: carried along
        ((10, 3), 0),  # strided, one tile
        ((300, 40), 0),  # strided, several blocks of classes and two tiles of neighbours
        ((2, 4, 5, 9), 1),
        ((2, 4, 5, 9), 2),
        ((7,), 0),
    ],
    ids=str,
)
def test_error_at_most_twice_torch(name: str, dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    check(name, lambda: 3 * torch.randn(shape, device=DEVICE).to(dtype), dim)


@both
def test_a_very_long_row(name: str) -> None:
    """262,144 classes, of which a late one is the largest, so that what was summed before is scaled down."""

    def make() -> Tensor:
        x = torch.randn(1, 262_144, device=DEVICE)
        x[0, 200_000] = 30.0
        return x

    check(name, make, 1)


@pytest.mark.to_the_last_digits
@both
def test_large_logits_cost_no_accuracy(name: str) -> None:
    for K in (9, 20_000):
        check(name, lambda K=K: torch.randn(2, K, device=DEVICE) + 1e4, 1)


@both
@pytest.mark.parametrize("K", [9, 20_000])
def test_infinities_and_nan_are_torchs(name: str, K: int) -> None:
    """Some and all of a row -inf, one inf, one NaN; in the first block and in the last."""
    rows = []
    for at in (0, K - 1):
        for value in (float("nan"), float("inf"), -float("inf")):
            row = torch.randn(K, device=DEVICE)
            row[at] = value
            rows.append(row)
    first = torch.randn(K, device=DEVICE)
    first[: K - 2] = -float("inf")
    x = torch.stack([*rows, first, torch.full_like(first, -float("inf"))])
    ours, theirs = getattr(bpF, name)(x, 1), getattr(torch.nn.functional, name)(x, 1)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.to_the_last_digits
@both
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
def test_any_layout_is_read_and_dense_ones_are_kept(name: str, dim: int, layout: str) -> None:
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        "sliced": lambda x: torch.stack([torch.full_like(x, float("nan")), x], -1)[..., 1],
        "expanded": lambda x: x[:1].expand(4, 6, 3, 5),
    }

    def make() -> Tensor:
        return views[layout](torch.randn(2, 6, 3, 5, device=DEVICE))

    check(name, make, dim)
    view = make()
    y = getattr(bpF, name)(view, dim)
    if layout in ("channels_last", "permuted"):
        assert y.stride() == view.stride()


@both
@pytest.mark.parametrize("K", [10, 3000, 17000])
def test_a_row_has_the_same_bits_in_every_batch(name: str, K: int) -> None:
    x, dy = torch.randn(5, K, device=DEVICE), torch.randn(5, K, device=DEVICE)
    whole = results(getattr(bpF, name), x, 1, dy)
    for i in (0, 4):
        alone = results(getattr(bpF, name), x[i : i + 1], 1, dy[i : i + 1])
        for a, b in zip(alone, whole, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=0, atol=0)


@both
def test_empty_tensors_and_scalars_need_no_launch(name: str) -> None:
    for shape in ((0, 3), (3, 0), ()):
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        y = getattr(bpF, name)(x, -1)
        torch.testing.assert_close(y, getattr(torch.nn.functional, name)(x, -1))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == x.shape


@both
def test_the_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for which in ("forward", "backward"):
        kernel = getattr(kernels.softmax, which)

        def counted(*args: Any, kernel: Any = kernel, which: str = which, **options: Any) -> Any:
            calls.append(which)
            return kernel(*args, **options)

        monkeypatch.setattr(kernels.softmax, which, counted)
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    getattr(bpF, name)(x, 1).sum().backward()
    assert calls == ["forward", "backward"]
