"""The kernels of the losses: every shape of tile, every option, against float64 and torch; and which kernels run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from exact import assert_as_good_as_torch
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF
from bp_torch import triton_kernels as kernels

ONE_BACKEND = "about the kernels alone"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES: list[tuple[int, ...]] = [
    (1, 1),
    (1, 7),
    (3, 1),
    (300, 10),  # several tiles of short rows, the last one not full
    (3, 5000),  # two blocks a row
    (70, 33),
    (2, 300, 40),  # classes are strided: two blocks of them, two tiles of neighbours
    (2, 3, 4, 5),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with bp_torch.backend("triton"):
        yield


def with_gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The loss and the gradient of each input, for an upstream gradient that differs from position to position."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    loss = f(*leaves)
    dloss = torch.cos(torch.arange(loss.numel(), device=loss.device) * 0.7).reshape(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss)]


def moved(t: Tensor) -> Tensor:
    """Each number a little larger or smaller, in the same places of memory."""
    base = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return (base * (1 + 0.003 * torch.randn_like(base))).as_strided(t.shape, t.stride(), t.storage_offset())


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The loss and its gradients, for these inputs moved slightly."""

    assert_as_good_as_torch(
        lambda *drawn: with_gradients(ours, drawn),
        lambda *drawn: with_gradients(theirs, drawn),
        lambda: list(map(moved, inputs)),
    )


def classes(shape: tuple[int, ...], ignored: int | None = None) -> Tensor:
    t = torch.randint(shape[1], (shape[0], *shape[2:]), device=DEVICE)
    if ignored is not None and t.numel() > 1:
        t.view(-1)[::3] = ignored
    return t


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"label_smoothing": 0.1, "reduction": "sum"},
    {"weight": True, "label_smoothing": 0.2, "ignore_index": -7},
    {"weight": True, "ignore_index": 0, "reduction": "none"},
]
CLASSES = [
    (name, dtype, options, shape)
    for name in ("cross_entropy", "nll_loss")
    for dtype in DTYPES
    for options in (OPTIONS if dtype == torch.float32 else OPTIONS[3:4])
    for shape in SHAPES
    if name == "cross_entropy" or "label_smoothing" not in options or "weight" in options
]


def given(options: dict[str, Any], shape: tuple[int, ...], name: str) -> Callable[[Tensor], dict[str, Any]]:
    """The options for logits of this shape, with a weight in the logits' dtype."""
    weight = torch.rand(shape[1], device=DEVICE) + 0.5
    kept = {k: v for k, v in options.items() if name == "cross_entropy" or k != "label_smoothing"}
    return lambda x: {**kept, **({"weight": weight.to(x.dtype)} if "weight" in kept else {})}


@pytest.mark.to_the_last_digits
@pytest.mark.parametrize(("name", "dtype", "options", "shape"), CLASSES, ids=str)
def test_classes(name: str, dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    x, t = 2 * torch.randn(shape, device=DEVICE), classes(shape, options.get("ignore_index"))
    if name == "nll_loss":
        x = x.log_softmax(1)
    choice = given(options, shape, name)
    check(lambda x: getattr(bpF, name)(x, t, **choice(x)), lambda x: getattr(F, name)(x, t, **choice(x)), x.to(dtype))


@pytest.mark.to_the_last_digits
@every_dtype
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "reduction": "none"}, {"weight": True}], ids=str)
@every_shape
def test_probabilities(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    x, q = (torch.randn(shape, device=DEVICE) for _ in range(2))
    choice = given(options, shape, "cross_entropy")
    check(
        lambda x, q: bpF.cross_entropy(x, q, **choice(x)),
        lambda x, q: F.cross_entropy(x, q, **choice(x)),
        (2 * x).to(dtype),
        q.softmax(1).to(dtype),
    )


def test_the_weight_of_probabilities_has_a_gradient() -> None:
    x, q, w = torch.randn(4, 3, device=DEVICE), torch.rand(4, 3, device=DEVICE), torch.rand(3, device=DEVICE)
    check(bpF.cross_entropy, F.cross_entropy, x, q, w)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_very_long_row(smoothing: float) -> None:
    """262,144 classes, of which a late one is the largest, so that what was summed before is shifted."""
    x = torch.randn(1, 262_144, device=DEVICE)
    x[0, 200_000] = 30.0
    t = torch.tensor([262_143], device=DEVICE)

    def loss(f: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: f(x, t, label_smoothing=smoothing)

    check(loss(bpF.cross_entropy), loss(F.cross_entropy), x)


@pytest.mark.to_the_last_digits
@pytest.mark.parametrize("K", [9, 5000])
def test_large_logits_cost_no_accuracy(K: int) -> None:
    x, t = torch.randn(3, K, device=DEVICE) + 1e4, torch.tensor([0, 5, K - 1], device=DEVICE)
    for options in ({}, {"label_smoothing": 0.3}):
        check(lambda x, o=options: bpF.cross_entropy(x, t, **o), lambda x, o=options: F.cross_entropy(x, t, **o), x)


def test_last_partial_tile_of_rows_counts() -> None:
    x, t = torch.zeros(257, 10, device=DEVICE), torch.zeros(257, dtype=torch.int64, device=DEVICE)
    x[256, 0] = -50.0
    torch.testing.assert_close(bpF.cross_entropy(x, t), F.cross_entropy(x, t))


@pytest.mark.parametrize("K", [4, 5000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan_are_torchs(K: int, smoothing: float) -> None:
    """Some and all of a row -inf, one inf, one NaN, at the class and elsewhere, in the first block and in the last."""
    rows = [torch.full((K,), -float("inf"), device=DEVICE)]
    for at in (0, 1, K - 1):
        for value in (float("nan"), float("inf"), -float("inf")):
            rows.append(torch.randn(K, device=DEVICE))
            rows[-1][at] = value
    x, t = torch.stack(rows), torch.ones(len(rows), dtype=torch.int64, device=DEVICE)
    options = {"reduction": "none", "label_smoothing": smoothing}
    ours = with_gradients(lambda x: bpF.cross_entropy(x, t, **options), (x,))
    theirs = with_gradients(lambda x: F.cross_entropy(x, t, **options), (x,))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.to_the_last_digits
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_any_layout_of_logits_and_targets(layout: str, probabilities: bool) -> None:
    x = torch.randn(2, 6, 3, 5, device=DEVICE)
    views: dict[str, Callable[[], Tensor]] = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "permuted": lambda: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "sliced": lambda: torch.stack([torch.full_like(x, float("nan")), x], -1)[..., 1],
        "expanded": lambda: x[:1].expand(4, 6, 3, 5),
    }
    view = views[layout]()
    t = torch.randint(6, (5, 3, view.shape[0]), device=DEVICE).permute(2, 1, 0)
    if probabilities:
        t = torch.rand(5, 3, 6, view.shape[0], device=DEVICE).permute(3, 2, 1, 0)
    for reduction in ("mean", "none"):
        check(
            lambda x, t=t, r=reduction: bpF.cross_entropy(x, t, reduction=r),
            lambda x, t=t, r=reduction: F.cross_entropy(x, t, reduction=r),
            *([view, t] if probabilities else [view]),
        )
    if layout == "channels_last":
        leaf = view.detach().requires_grad_()
        (dx,) = torch.autograd.grad(bpF.cross_entropy(leaf, t), leaf)
        assert dx.stride() == view.stride()


def test_every_position_ignored() -> None:
    x, t = torch.randn(3, 4, device=DEVICE), torch.full((3,), -100, device=DEVICE)
    for name in ("cross_entropy", "nll_loss"):
        loss, dx = with_gradients(lambda x, name=name: getattr(bpF, name)(x, t), (x,))
        assert loss.isnan()
        assert (dx == 0).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="what happens on the CPU")
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize("bad", [-1, 4])
def test_a_class_out_of_range_is_refused_on_the_cpu(name: str, bad: int) -> None:
    with pytest.raises(IndexError, match=f"expected classes from 0 to 3 or 'ignore_index', got {bad}"):
        getattr(bpF, name)(torch.randn(2, 4), torch.tensor([0, bad]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [-1, 4])
def test_the_kernels_read_no_class_out_of_range(bad: int, weighted: bool) -> None:
    """As on a GPU, where nothing refuses it before they run."""
    x, t = torch.randn(2, 4, device=DEVICE), torch.tensor([0, bad], device=DEVICE)
    w = torch.rand(4, device=DEVICE) if weighted else None
    loss, total, m, r = kernels.cross_entropy.forward(x, 1, t, w, -100, 0.0, "none")
    assert loss.isnan().tolist() == [False, True]
    dx = kernels.cross_entropy.backward(torch.ones_like(loss), x, 1, t, w, total, m, r, -100, 0.0, "none")
    assert dx.isnan().all(1).tolist() == [False, True]


@pytest.mark.gpu
def test_a_class_out_of_range_gives_nan_on_a_gpu() -> None:
    """It cannot be refused without waiting for the device; it reads nothing outside, and does not pass unseen."""
    x, t = torch.randn(2, 4, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    loss, dx = with_gradients(lambda x: bpF.cross_entropy(x, t, reduction="none"), (x,))
    assert loss.isnan().tolist() == [False, True]
    assert dx.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("K", [10, 5000])
def test_a_row_has_the_same_bits_in_every_batch(K: int) -> None:
    x, t = torch.randn(5, K, device=DEVICE), torch.randint(K, (5,), device=DEVICE)

    def results(rows: slice) -> list[Tensor]:
        leaf = x[rows].detach().requires_grad_()
        losses = bpF.cross_entropy(leaf, t[rows], reduction="none", label_smoothing=0.1)
        return [losses, *torch.autograd.grad(losses.sum(), leaf)]

    whole = results(slice(None))
    for i in (0, 4):
        for alone, all_rows in zip(results(slice(i, i + 1)), whole, strict=True):
            torch.testing.assert_close(alone[0], all_rows[i], rtol=0, atol=0)


ELEMENTWISE: list[tuple[str, dict[str, Any]]] = [
    ("mse_loss", {}),
    ("l1_loss", {}),
    ("smooth_l1_loss", {"beta": 0.5}),
    ("huber_loss", {"delta": 0.7}),
    ("binary_cross_entropy_with_logits", {}),
]
every_loss = pytest.mark.parametrize(("name", "parameters"), ELEMENTWISE, ids=[name for name, _ in ELEMENTWISE])


def pair(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    x, t = 2 * torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    return x, t.sigmoid() if name.startswith("binary") else t


@pytest.mark.to_the_last_digits
@every_dtype
@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_elementwise_losses(name: str, parameters: dict[str, Any], reduction: str, dtype: torch.dtype) -> None:
    """One element, a part of a block, and several blocks; a gradient for the target too."""
    options = {**parameters, "reduction": reduction}
    for shape in ((1,), (5, 7), (3, 1000)):
        x, t = (s.to(dtype) for s in pair(name, *shape))
        check(lambda x, t: getattr(bpF, name)(x, t, **options), lambda x, t: getattr(F, name)(x, t, **options), x, t)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
def test_weights_of_elementwise_losses(name: str, reduction: str) -> None:
    x, t = pair(name, 3, 500)
    w = torch.rand(3, 500, device=DEVICE)
    check(
        lambda x, t, w: getattr(bpF, name)(x, t, weight=w, reduction=reduction),
        lambda x, t, w: getattr(F, name)(x, t, weight=w, reduction=reduction),
        x, t, w,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 7), (1, 7), (3, 5, 7), (5, 1), (3, 1, 7)], ids=str)
@pytest.mark.parametrize("which", ["weight", "pos_weight"])
def test_weights_of_bce_broadcast(shape: tuple[int, ...], which: str) -> None:
    x, t = pair("binary", 3, 5, 7)
    w = torch.rand(shape, device=DEVICE) + 0.5

    def loss(f: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: f(x, t, reduction="none", **{which: w.to(x.dtype)})

    check(loss(bpF.binary_cross_entropy_with_logits), loss(F.binary_cross_entropy_with_logits), x, t)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check(loss(bpF.binary_cross_entropy_with_logits), loss(F.binary_cross_entropy_with_logits), strided, t)


@pytest.mark.to_the_last_digits
def test_bce_in_both_tails() -> None:
    x = torch.tensor([-200.0, -30.0, -1e-6, 0.0, 1e-6, 30.0, 200.0], device=DEVICE).repeat(3)
    t = torch.tensor([0.0, 1.0, 0.25], device=DEVICE).repeat_interleave(7)
    loss, dx = with_gradients(lambda x: bpF.binary_cross_entropy_with_logits(x, t, reduction="sum"), (x,))
    right, exact = with_gradients(
        lambda x: (F.softplus(-x) * t + F.softplus(x, threshold=300) * (1 - t)).sum(), (x.double(),)
    )
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    # Relative to each gradient: a tail of 1e-13 keeps its digits. Where t is 0.25 the gradient is a difference.
    torch.testing.assert_close(dx.double()[:14], exact[:14], rtol=1e-6, atol=1e-40)
    torch.testing.assert_close(dx.double()[14:], exact[14:], rtol=1e-6, atol=1e-7)


@every_loss
def test_elementwise_losses_of_nan_and_infinity(name: str, parameters: dict[str, Any]) -> None:
    x, t = pair(name, 4)
    x[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    ours = with_gradients(lambda x: getattr(bpF, name)(x, t, reduction="none", **parameters), (x,))
    theirs = with_gradients(lambda x: getattr(F, name)(x, t, reduction="none", **parameters), (x,))
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@every_loss
@pytest.mark.parametrize("layout", ["permuted", "mixed", "expanded", "gaps"])
def test_elementwise_losses_of_any_layout(name: str, parameters: dict[str, Any], layout: str) -> None:
    x, t = pair(name, 4, 3, 5)
    if layout in ("permuted", "mixed"):
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "permuted":
        t = t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "expanded":
        x, t = x[:1].expand(4, 3, 5), t[:1].expand(4, 3, 5)
    if layout == "gaps":
        x, t = (torch.stack([torch.full_like(s, float("nan")), s], -1)[..., 1] for s in (x, t))
    for reduction in ("none", "mean"):
        options = {**parameters, "reduction": reduction}
        check(
            lambda x, t, o=options: getattr(bpF, name)(x, t, **o),
            lambda x, t, o=options: getattr(F, name)(x, t, **o),
            x, t,
        )  # fmt: skip


def test_sums_of_many_partial_sums() -> None:
    """More of them than one program adds up, of two kinds."""
    part = torch.rand(2, 20_000, dtype=torch.float64, device=DEVICE)
    loss, total = kernels.loss.finish(part, torch.float32, None, True)
    torch.testing.assert_close(total, part[1].sum().float())
    torch.testing.assert_close(loss, (part[0].sum() / part[1].sum()).float())
    torch.testing.assert_close(
        kernels.loss.finish(part[:1], torch.bfloat16, 7, False)[0], (part[0].sum() / 7).bfloat16()
    )


def test_a_program_takes_several_blocks_of_a_long_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.loss, "PROGRAMS", 2)
    x, t = pair("mse", 9000)
    check(bpF.mse_loss, F.mse_loss, x, t)


@pytest.mark.parametrize(
    ("module", "names", "run"),
    [
        ("cross_entropy", ["forward", "backward"], lambda x: bpF.cross_entropy(x, classes((4, 3)))),
        ("nll_loss", ["forward", "backward"], lambda x: bpF.nll_loss(x, classes((4, 3)))),
        (
            "cross_entropy",
            ["probabilities_forward", "probabilities_backward"],
            lambda x: bpF.cross_entropy(x, torch.ones(4, 3, device=DEVICE)),
        ),
        ("loss", ["forward", "backward"], lambda x: bpF.huber_loss(x, torch.ones(4, 3, device=DEVICE))),
        (
            "loss",
            ["forward", "backward"],
            lambda x: bpF.binary_cross_entropy_with_logits(x, torch.ones(4, 3, device=DEVICE)),
        ),
        ("penalty", ["forward", "backward"], lambda x: bpF.l1_penalty([x], 1.0)),
    ],
)
def test_the_kernels_run(
    module: str, names: list[str], run: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for which in names:
        kernel = getattr(getattr(kernels, module), which)

        def counted(*args: Any, kernel: Any = kernel, which: str = which, **options: Any) -> Any:
            calls.append(which)
            return kernel(*args, **options)

        monkeypatch.setattr(getattr(kernels, module), which, counted)
    run(torch.randn(4, 3, device=DEVICE, requires_grad=True)).backward()
    assert calls == names


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_empty_batches_need_no_launch(name: str) -> None:
    x = torch.randn(0, 4, device=DEVICE, requires_grad=True)
    t = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss = getattr(bpF, name)(x, t)
    assert loss.isnan()
    loss.backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 4)
