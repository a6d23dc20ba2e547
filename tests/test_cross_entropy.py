"""cross_entropy and nll_loss against torch, beyond the contracts that every case passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import widest
from exact import assert_as_good_as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import INF, REDUCTIONS, _chunks, assert_same, both  # noqa: F401  a fixture
from torch import Tensor

import bp_torch.functional as bpF


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_last_partial_block_of_rows_counts(name: str) -> None:
    for rows in (1, 7, 16, 17, 33, 130):
        x, t = torch.randn(rows, 5, dtype=widest()), torch.randint(0, 5, (rows,))
        for reduction in ("none", "mean", "sum"):
            assert_same(name, x, t, reduction=reduction)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("ignored", [-100, -1, 0, 2, 77])
def test_ignore_index_is_not_ignored(name: str, ignored: int) -> None:
    x, t = torch.randn(9, 4, dtype=widest()), torch.randint(0, 4, (9,))
    t[[1, 8]] = ignored
    assert_same(name, x, t, ignore_index=ignored)
    changed = x.clone()
    changed[t == ignored] += 5.0
    assert getattr(bpF, name)(changed, t, ignore_index=ignored) == getattr(bpF, name)(x, t, ignore_index=ignored)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("probabilities", [False, True])
def test_the_callers_logits_are_not_overwritten(probabilities: bool) -> None:
    x = torch.randn(40, 6, requires_grad=True)
    t = torch.rand(40, 6) if probabilities else torch.randint(0, 6, (40,))
    kept, kept_t = x.detach().clone(), t.clone()
    loss = bpF.cross_entropy(x, t)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    second = torch.autograd.grad(loss, x)
    assert torch.equal(x, kept)
    assert torch.equal(t, kept_t)
    assert torch.equal(first[0], second[0])


@pytest.mark.usefixtures("_chunks")
@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    ignored=st.sampled_from([-100, 0, 1]),
    reduction=REDUCTIONS,
    transposed=st.booleans(),
)
def test_class_options(
    shape: list[int], weighted: bool, smoothing: float, ignored: int, reduction: str, transposed: bool
) -> None:
    x = torch.randn(*reversed(shape), dtype=widest()).permute(*reversed(range(len(shape))))
    x = x if transposed else x.contiguous()
    K = shape[0] if len(shape) == 1 else shape[1]
    t = torch.randint(0, K, () if len(shape) == 1 else (shape[0], *shape[2:]))
    options = {"ignore_index": ignored, "reduction": reduction}
    w = (torch.rand(K, dtype=widest()) + 0.1) if weighted else None
    # The weight is a constant here, so it goes in as an option.
    assert_same("cross_entropy", x, t, weight=w, label_smoothing=smoothing, **options)
    assert_same("nll_loss", x.contiguous(), t, weight=w, **options)  # torch's backward refuses some other layouts
    torch.testing.assert_close(
        both("nll_loss", x, t, weight=w, **options, modules=[bpF]),
        both("nll_loss", x.contiguous(), t, weight=w, **options, modules=[bpF]),
        equal_nan=True,
    )


@pytest.mark.usefixtures("_chunks")
@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=REDUCTIONS,
    frozen=st.booleans(),
)
def test_probability_options(shape: list[int], weighted: bool, smoothing: float, reduction: str, frozen: bool) -> None:
    x, q = torch.randn(2, *shape, dtype=widest()).unbind()
    w = torch.rand(shape[0] if len(shape) == 1 else shape[1], dtype=widest())
    options = {"label_smoothing": smoothing, "reduction": reduction}
    if frozen:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        given_w = w if weighted else None
        ys = [m.cross_entropy(leaf, q, given_w, **options) for m, leaf in zip((bpF, F), leaves, strict=True)]
        torch.testing.assert_close(*ys)
        # No sine, whose slope at a large loss is known to few digits.
        grads = [torch.autograd.grad(y.square().sum(), leaf) for y, leaf in zip(ys, leaves, strict=True)]
        torch.testing.assert_close(*grads)
    else:
        assert_same("cross_entropy", x, q, *([w] if weighted else []), **options)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.tensor([0.5, 2.0, 1.0])}])
def test_every_position_ignored(options: dict[str, Any]) -> None:
    x, t = torch.randn(4, 3), torch.full((4,), -100)
    assert bpF.cross_entropy(x, t, **options).isnan()
    assert bpF.nll_loss(x, t).isnan()
    assert bpF.cross_entropy(x, t, reduction="sum", **options) == 0
    (dx,) = both("cross_entropy", x, t, **options)[0][1:]
    assert torch.equal(dx, torch.zeros_like(x))
    assert_same("cross_entropy", torch.randn(4, 3, 2), torch.full((4, 2), -100), **options)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
def test_logits_of_1e4_cost_no_accuracy(options: dict[str, Any]) -> None:
    for offset in (1e4, -1e4):
        t = torch.randint(0, 10, (40,))

        def by(module: Any, t: Tensor = t) -> Callable[[Tensor], tuple[Tensor, ...]]:
            return lambda x: both("cross_entropy", x, t, modules=(module,), reduction="none", **options)[0]

        def draw(offset: float = offset) -> tuple[Tensor]:
            return (torch.randn(40, 10) + offset,)

        assert_as_good_as_torch(by(bpF), by(F), draw)
        # And however far off torch may be: of logits near 0 it has all digits.
        (far,) = draw()
        torch.testing.assert_close(by(bpF)(far), by(bpF)(far - offset), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(
    "row",
    [[1e4, -1e4, 0.0], [-INF, 0.0, 1.0], [0.0, -INF, 1.0], [-INF] * 3, [INF, 0.0, 1.0], [float("nan"), 0.0, 1.0]],
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}])
def test_non_finite_logits(row: list[float], options: dict[str, Any]) -> None:
    assert_same("cross_entropy", torch.tensor([row, [1.0, 2.0, 3.0]]), torch.tensor([0, 1]), **options)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0), (0, 3, 2, 2), (2, 3, 0, 2), (0, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_empty(shape: tuple[int, ...], reduction: str, smoothing: float) -> None:
    t = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    assert_same("cross_entropy", torch.ones(shape), t, reduction=reduction, label_smoothing=smoothing)
    assert_same("nll_loss", torch.ones(shape), t, reduction=reduction)
    assert_same("cross_entropy", torch.ones(shape), torch.ones(shape), reduction=reduction, label_smoothing=smoothing)


def test_target_of_one_element_and_of_bytes() -> None:
    x = torch.randn(4, 3)
    for name in ("cross_entropy", "nll_loss"):
        results = [getattr(m, name)(x[0], torch.tensor([1]), reduction="none") for m in (bpF, F)]
        torch.testing.assert_close(*results)
        assert_same(name, x, torch.tensor([1, 0, 2, 2], dtype=torch.uint8))


def test_saves_the_logits_and_two_numbers_a_row() -> None:
    for rows, K, numbers in ((64, 1000, 2), (64, 10, 10)):  # of few logits log p, as torch does
        saved: list[Tensor] = []
        x, t = torch.randn(rows, K, requires_grad=True), torch.randint(0, K, (rows,))
        with torch.autograd.graph.saved_tensors_hooks(lambda s, saved=saved: saved.append(s) or s, lambda s: s):
            loss = bpF.cross_entropy(x, t)
        assert loss.requires_grad
        others = [s for s in saved if s.data_ptr() not in (x.data_ptr(), t.data_ptr())]
        assert sum(s.numel() for s in others) <= numbers * rows + 1


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_long_rows_is_at_most_twice_torchs(dtype: torch.dtype) -> None:
    for options in ({}, {"label_smoothing": 0.1}):

        def by(module: Any, options: dict[str, float] = options) -> Callable[..., tuple[Tensor, ...]]:
            return lambda x, t: both("cross_entropy", x, t, modules=(module,), **options)[0]

        def draw() -> tuple[Tensor, Tensor]:
            return (4 * torch.randn(12, 3000)).to(dtype), torch.randint(0, 3000, (12,))

        assert_as_good_as_torch(by(bpF), by(F), draw)


@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_distributed_tensors(target: str) -> None:
    """Sharded rows, in a group of one process."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = torch.randn(4, 3, dtype=torch.float64)
        t = torch.tensor([0, 2, 1, 1]) if target == "indices" else torch.rand(4, 3, dtype=torch.float64)
        whole = x.clone().requires_grad_()
        F.cross_entropy(whole, t).backward()
        sharded = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        loss = bpF.cross_entropy(sharded, distribute_tensor(t, mesh, [Shard(0)]))
        loss.backward()
        torch.testing.assert_close(loss.full_tensor(), F.cross_entropy(x, t))
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 2), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_ignored_positions_have_no_gradient_whatever_comes_back(
    loss: str, shape: tuple[int, ...], upstream: float
) -> None:
    """As when a gradient scaler overflows."""
    t = torch.zeros((*shape[:1], *shape[2:]) if len(shape) > 1 else (), dtype=torch.int64)
    t.view(-1)[0] = 1
    x = torch.linspace(-1, 1, 3 * t.numel()).reshape(shape)
    smoothing: dict[str, float]
    for smoothing in ({}, {"label_smoothing": 0.1}) if loss == "cross_entropy" else ({},):
        for ignored in (0, 1):
            found = []
            for module in (bpF, F):
                given = x.clone().requires_grad_()
                y = getattr(module, loss)(given, t, reduction="none", ignore_index=ignored, **smoothing)
                dy = torch.where(t == ignored, upstream, 1.0)
                found.append(torch.autograd.grad(y, given, dy)[0])
            torch.testing.assert_close(found[0], found[1])
            assert found[0].isfinite().all()
