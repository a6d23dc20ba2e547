"""The losses against torch, beyond the contracts that every case passes. test_cross_entropy.py has class scores."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import widest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.aten import cross_entropy as ce
from bp_torch.functions.aten import loss as losses

INF = float("inf")
ERROR_LOSSES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
REDUCTIONS = st.sampled_from(["none", "mean", "sum"])


def both(name: str, *inputs: Any, modules: Any = (bpF, F), **options: Any) -> list[tuple[Tensor, ...]]:
    """(loss, every gradient) by bp_torch and by torch."""
    results = []
    for module in modules:
        leaves = [t.detach().requires_grad_() if _differentiable(t) else t for t in inputs]
        loss = getattr(module, name)(*leaves, **options)
        wanted = [t for t in leaves if _differentiable(t)]
        dloss = torch.linspace(0.5, 1, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, wanted, dloss)))
    return results


def _differentiable(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def assert_same(name: str, *inputs: Any, **options: Any) -> None:
    ours, theirs = both(name, *inputs, **options)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.fixture(params=["whole", "in chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of the fast paths: at once, and a few rows at a time."""
    if request.param == "in chunks":
        monkeypatch.setattr(ce, "CHUNK", 8)
        monkeypatch.setattr(ce, "SMALL", 0)
        monkeypatch.setattr(losses, "CHUNK", 5)


# Differences


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("name", [*ERROR_LOSSES, "binary_cross_entropy_with_logits"])
@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    reduction=REDUCTIONS,
    swapped=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape(name: str, shape: list[int], reduction: str, swapped: bool, dtype: torch.dtype) -> None:
    x, t = 2 * torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype)
    if swapped and len(shape) > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert_same(name, x, t, reduction=reduction)


@pytest.mark.parametrize("name", ERROR_LOSSES)
def test_broadcast_warns_as_torch_does(name: str) -> None:
    for shapes in (((4, 3), (3,)), ((3,), (4, 3)), ((4, 1), (4, 3))):
        x, t = (torch.randn(s, dtype=widest()) for s in shapes)
        with pytest.warns(UserWarning, match="Using a target size"):
            assert_same(name, x, t)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_weight_of_differences(name: str, reduction: str) -> None:
    x, t, w = torch.randn(3, 4, 3, dtype=widest()).unbind()
    ours, theirs = [], []
    for module, found in ((bpF, ours), (F, theirs)):
        leaves = [u.clone().requires_grad_() for u in (x, t, w.abs())]
        loss = getattr(module, name)(leaves[0], leaves[1], weight=leaves[2], reduction=reduction)
        found += [loss, *torch.autograd.grad(loss.square().sum(), leaves)]  # a sine of many is known to few digits
    torch.testing.assert_close(ours, theirs)
    # A weight has the input's shape, and the input may be the one that broadcasts.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [getattr(m, name)(x[0], t, weight=w[0].abs(), reduction=reduction) for m in (bpF, F)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "options", "point"),
    [("l1_loss", {}, 0.0), ("smooth_l1_loss", {"beta": 0.5}, 0.5), ("smooth_l1_loss", {"beta": 0.0}, 0.0),
     ("huber_loss", {"delta": 0.7}, 0.7)],
)  # fmt: skip
def test_kinks_are_torchs(name: str, options: dict[str, float], point: float) -> None:
    x = torch.tensor([point, -point, 0.0, INF, -INF, float("nan"), 1e20])
    assert_same(name, x, torch.zeros(7), reduction="none", **options)


def test_bce_tails() -> None:
    x = torch.tensor([1e4, -1e4, 100.0, -100.0, INF, -INF, float("nan"), 0.0]).repeat(2)
    t = torch.tensor([0.0, 1.0]).repeat_interleave(8)
    assert_same("binary_cross_entropy_with_logits", x, t, reduction="none")
    assert_same("binary_cross_entropy_with_logits", x, t, reduction="none", pos_weight=torch.tensor(3.0))
    assert bpF.binary_cross_entropy_with_logits(torch.tensor([-1e4, 1e4]), torch.tensor([0.0, 1.0])) == 0


@pytest.mark.parametrize("options", [{}, {"pos_weight": torch.tensor([3.0])}], ids=["", "pos_weight"])
def test_bce_slope_of_what_is_surely_not_so_keeps_its_digits(options: dict[str, Tensor]) -> None:
    """dx = σ(x), which 1 - σ(-x) rounds to 0."""
    x = torch.linspace(-60, -5, 12).requires_grad_()
    loss = bpF.binary_cross_entropy_with_logits(x, torch.zeros(12), reduction="sum", **options)
    (dx,) = torch.autograd.grad(loss, x)
    rtol = 16 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(dx.double(), x.detach().double().sigmoid(), rtol=rtol, atol=0.0)


def test_bce_weights_broadcast() -> None:
    x, t = torch.randn(2, 3, 4, dtype=widest()), torch.rand(2, 3, 4, dtype=widest())
    for shape in ((), (4,), (3, 1), (2, 3, 4)):
        w, pi = torch.rand(2, *shape, dtype=widest()).unbind()
        for reduction in ("none", "mean", "sum"):
            assert_same("binary_cross_entropy_with_logits", x, t, weight=w, pos_weight=pi, reduction=reduction)


def test_integer_and_mixed_dtypes() -> None:
    x = torch.randn(6)
    for name in ERROR_LOSSES:
        # torch refuses the backward of some of these.
        for t in (torch.arange(6), torch.randn(6).bfloat16(), torch.randn(6).double()):
            torch.testing.assert_close(getattr(bpF, name)(x, t), getattr(F, name)(x, t))
        leaves = [x.clone().requires_grad_(), torch.zeros(6, dtype=torch.float64, requires_grad=True)]
        dx, dt = torch.autograd.grad(getattr(bpF, name)(*leaves), leaves)
        assert (dx.dtype, dt.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(dx, -dt.float())
    ints = torch.arange(6), torch.zeros(6, dtype=torch.long)
    assert torch.equal(bpF.l1_loss(*ints, reduction="sum"), F.l1_loss(*ints, reduction="sum"))
    assert_same("cross_entropy", torch.randn(4, 3), torch.rand(4, 3).double())


# What all share


def test_second_backward_of_a_retained_graph_agrees() -> None:
    for name in ERROR_LOSSES:
        x, t = torch.randn(2, 50, 40).requires_grad_().unbind()
        loss = getattr(bpF, name)(x, t)
        first = torch.autograd.grad(loss, (x, t), retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, (x, t)), first, rtol=0, atol=0)


def test_one_gradient_for_each_input() -> None:
    x, q, w = torch.randn(4, 3), torch.rand(4, 3), torch.rand(3)
    assert_same("cross_entropy", x, q, w)
    for name in ("mse_loss", "l1_loss"):
        assert_same(name, x, q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"weight": True}, {"ignore_index": 1}])
@pytest.mark.usefixtures("_chunks")
def test_fast_paths_equal_the_formula(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A graph recorded in backward selects the formula; without one the fast path runs."""
    x, t = torch.randn(30, 6).to(dtype).requires_grad_(), torch.randint(0, 6, (30,))
    options = {**options, **({"weight": torch.rand(6).to(dtype)} if "weight" in options else {})}
    calls: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda x: bpF.cross_entropy(x, t, **options), x),
        (lambda x: bpF.cross_entropy(x, torch.full((30, 6), 0.2, dtype=dtype)), x),
        *((lambda x, name=name: getattr(bpF, name)(x, torch.zeros_like(x)), x) for name in ERROR_LOSSES),
        (lambda x: bpF.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.3)), x),
    ]
    if "label_smoothing" not in options:
        calls.append((lambda x: bpF.nll_loss(x, t, **options), x))
    for f, leaf in calls:
        loss = f(leaf)
        (fast,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (formula,) = torch.autograd.grad(loss, leaf, create_graph=True)
        torch.testing.assert_close(fast, formula)
        # Under a transform, forward is the formula too.
        torch.testing.assert_close(torch.func.vmap(f)(leaf.unsqueeze(0)).squeeze(0), loss)


def test_forward_over_reverse_without_a_recorded_graph() -> None:
    """Tangents reach a backward that records no graph; a fast path would drop them."""
    t, q = torch.randint(0, 4, (5,)), torch.rand(5, 4, dtype=torch.float64)
    x, v = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    calls: list[Callable[[Any], Callable[[Tensor], Tensor]]] = [
        lambda m: lambda x: m.cross_entropy(x, t),
        lambda m: lambda x: m.cross_entropy(x, t, label_smoothing=0.1),
        lambda m: lambda x: m.cross_entropy(x, q),
        lambda m: lambda x: m.nll_loss(x.sin(), t),
        lambda m: lambda x: m.mse_loss(x, q),
        lambda m: lambda x: m.huber_loss(x, q),
        lambda m: lambda x: m.binary_cross_entropy_with_logits(x, q),
        lambda m: lambda x: m.log_softmax(x, 1).sin().sum(),
        lambda m: lambda x: m.softmax(x, 1).sin().sum(),
    ]
    for make in calls:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
            (dx,) = torch.autograd.grad(make(bpF)(dual), dual)
            tangent = forward_ad.unpack_dual(dx).tangent
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(make(F)(leaf), leaf, create_graph=True)
        (expected,) = torch.autograd.grad(dx, leaf, v)
        torch.testing.assert_close(tangent, expected)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_former_names_of_reduction(size_average: bool | None, reduce: bool | None) -> None:
    options = {"size_average": size_average, "reduce": reduce, "reduction": "sum"}
    x, q = torch.randn(4, 3), torch.rand(4, 3)
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "cross_entropy", "binary_cross_entropy_with_logits"):
        assert_same(name, x, q, **options)
    assert_same("nll_loss", x, torch.randint(0, 3, (4,)), **options)


def test_elementwise_mean_warns() -> None:
    x = torch.randn(3)
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert bpF.mse_loss(x, x + 1, reduction="elementwise_mean") == F.mse_loss(x, x + 1)


X, Q, CLASSES = torch.ones(4, 3), torch.full((4, 3), 0.3), torch.tensor([0, 1, 2, 1])
MISUSE: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("cross_entropy", (X, torch.tensor([0, 1, 2, 3])), {}),
    ("cross_entropy", (X, torch.tensor([0, 1, 2, -3])), {"label_smoothing": 0.1}),
    ("cross_entropy", (torch.ones(2, 3, 2, 2), torch.full((2, 2, 2), 3)), {}),
    ("cross_entropy", (torch.ones(2, 3, 2), torch.full((2, 2), -1)), {}),
    ("cross_entropy", (torch.ones(3), torch.tensor(5)), {}),
    ("cross_entropy", (X, CLASSES.int()), {}),
    ("cross_entropy", (X, CLASSES.float()), {}),
    ("cross_entropy", (torch.ones(2, 3, 2, 2), torch.ones(2, 2, 2, dtype=torch.uint8)), {}),
    ("cross_entropy", (X, torch.ones(4, 3, dtype=torch.long)), {}),
    ("cross_entropy", (X, Q), {"ignore_index": 1}),
    ("cross_entropy", (X, CLASSES), {"label_smoothing": 1.5}),
    ("cross_entropy", (X, CLASSES, torch.ones(4)), {}),
    ("cross_entropy", (X, Q, torch.ones(4)), {}),
    ("cross_entropy", (X, CLASSES, torch.ones(3).double()), {}),
    ("cross_entropy", (X, CLASSES, torch.ones(3, requires_grad=True)), {}),
    ("cross_entropy", (X, CLASSES[:3]), {}),
    ("cross_entropy", (X, CLASSES[:, None]), {}),
    ("cross_entropy", (torch.ones(3), CLASSES), {}),
    ("cross_entropy", (torch.ones(4, 3, 5), torch.zeros(4, 6, dtype=torch.long)), {}),
    ("cross_entropy", (torch.ones(()), torch.tensor(0)), {}),
    ("cross_entropy", (torch.ones(()), torch.tensor(0.5)), {}),
    ("cross_entropy", (torch.ones(4, 3, dtype=torch.long), CLASSES), {}),
    ("cross_entropy", (X, CLASSES), {"reduction": "avg"}),
    ("cross_entropy", (X, None), {}),
    ("nll_loss", (X, torch.tensor([0, 1, 2, 3])), {}),
    ("nll_loss", (torch.ones(2, 3, 2), torch.full((2, 2), 3)), {}),
    ("nll_loss", (X, CLASSES.int()), {}),
    ("nll_loss", (X, CLASSES[:3]), {}),
    ("nll_loss", (torch.ones(()), torch.tensor(0)), {}),
    ("nll_loss", (X, CLASSES, torch.ones(3, requires_grad=True)), {}),
    *((name, (torch.ones(3), torch.ones(3)), {"reduction": "avg"}) for name in ERROR_LOSSES),
    *((name, (X, torch.ones(4)), {}) for name in ERROR_LOSSES),
    *((name, (CLASSES, CLASSES), {}) for name in ERROR_LOSSES),
    *((name, (X, X), {"weight": torch.ones(3)}) for name in ("mse_loss", "l1_loss", "huber_loss")),
    ("smooth_l1_loss", (X, X), {"beta": -1.0}),
    ("huber_loss", (X, X), {"delta": 0.0}),
    ("binary_cross_entropy_with_logits", (X, torch.ones(3)), {}),
    ("binary_cross_entropy_with_logits", (X, X, torch.ones(4)), {}),
    ("binary_cross_entropy_with_logits", (X, X, torch.ones(2, 4, 3)), {}),
    ("binary_cross_entropy_with_logits", (X, X, torch.ones(3, requires_grad=True)), {}),
    ("binary_cross_entropy_with_logits", (X, X), {"pos_weight": torch.ones(3, requires_grad=True)}),
    ("binary_cross_entropy_with_logits", (X.long(), X), {}),
    ("binary_cross_entropy_with_logits", (X, X.long()), {}),
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(("name", "args", "options"), MISUSE)
def test_misuse_raises_what_torch_raises(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    leaves = [a.clone().requires_grad_() if i == 0 and _differentiable(a) else a for i, a in enumerate(args)]
    with pytest.raises(Exception) as theirs:
        getattr(F, name)(*leaves, **options)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(bpF, name)(*leaves, **options)
    assert type(ours.value) is type(theirs.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True])
def test_dtypes_of_autocast_are_torchs(dtype: torch.dtype, cast: bool) -> None:
    x, q, w = torch.randn(4, 3).to(dtype), torch.rand(4, 3).to(dtype), torch.rand(3).to(dtype)
    t = torch.randint(0, 3, (4,))
    with torch.autocast("cpu", dtype, enabled=cast):
        for name, args in {"cross_entropy": (x, t), "nll_loss": (x, t)}.items():
            ours, theirs = both(name, *args, weight=w)
            assert [g.dtype for g in ours] == [g.dtype for g in theirs]
        for name in ("cross_entropy", *ERROR_LOSSES, "binary_cross_entropy_with_logits"):
            for other in (q, q.float()):
                if name == "huber_loss" and other.dtype != x.dtype and not cast:
                    continue  # torch refuses the backward
                ours, theirs = both(name, x, other)
                assert [g.dtype for g in ours] == [g.dtype for g in theirs], name
        for name in ("mse_loss", "l1_loss", "huber_loss"):
            ours, theirs = both(name, x, q, weight=q.clone())
            assert [g.dtype for g in ours] == [g.dtype for g in theirs], name
        for name in ("softmax", "log_softmax"):
            assert getattr(bpF, name)(x, 1).dtype == getattr(F, name)(x, 1).dtype


WEIGHT = torch.tensor([0.5, 2.0, 1.0])
MODULES: list[tuple[str, dict[str, Any]]] = [
    ("CrossEntropyLoss", {"weight": WEIGHT, "ignore_index": 1, "label_smoothing": 0.1, "reduction": "sum"}),
    ("NLLLoss", {"weight": WEIGHT, "ignore_index": 1}),
    ("MSELoss", {"reduction": "sum"}),
    ("L1Loss", {}),
    ("SmoothL1Loss", {"beta": 0.3}),
    ("HuberLoss", {"delta": 0.3}),
    ("BCEWithLogitsLoss", {"weight": WEIGHT, "pos_weight": WEIGHT.flip(0)}),
]


@pytest.mark.parametrize(("name", "options"), MODULES, ids=[name for name, _ in MODULES])
def test_modules(name: str, options: dict[str, Any]) -> None:
    ours, theirs = getattr(nn, name)(**options), getattr(torch.nn, name)(**options)
    assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(4, 3)
    t = CLASSES if name in ("CrossEntropyLoss", "NLLLoss") else Q
    loaded = getattr(nn, name)(**{k: torch.ones(3) if isinstance(v, Tensor) else v for k, v in options.items()})
    loaded.load_state_dict(theirs.state_dict())
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        torch.testing.assert_close(module(x, t), theirs(x, t))


@pytest.mark.one_backend("torch", "under transforms the formulas run")
@pytest.mark.parametrize("weight", ["weight", "pos_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(3, 4), (3,), (3, 1)], ids=str)
def test_bce_weights_in_transforms(weight: str, reduction: str, shape: tuple[int, ...]) -> None:
    """There torch's operator is made of others, in all of which the weights are differentiable."""
    x, t, w = torch.randn(3, 4).double(), torch.rand(3, 4).double(), torch.rand(shape).double()

    def value(module: Any, x: Tensor, w: Tensor) -> Tensor:
        form = module.binary_cross_entropy_with_logits
        return torch.func.vmap(lambda x, t, w: form(x, t, reduction=reduction, **{weight: w}).sum())(x, t, w).sum()

    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, w),
        lambda f: torch.func.jacfwd(f, (0, 1))(x, w),
        lambda f: torch.func.hessian(f, (0, 1))(x, w),
        lambda f: torch.autograd.grad(f(*(leaves := [x.clone().requires_grad_(), w.clone().requires_grad_()])), leaves),
    ):
        ours, theirs = transform(lambda *given: value(bpF, *given)), transform(lambda *given: value(F, *given))
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="expected a constant"):
        bpF.binary_cross_entropy_with_logits(x[0], t[0], **{weight: torch.rand(4, requires_grad=True).double()})


@pytest.mark.parametrize("chosen", ["weight", "pos_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bce_by_one_of_its_weights_alone(chosen: str, reduction: str) -> None:
    """Where the logits and the target are constants."""
    x, t = torch.randn(3, 4, dtype=widest()), torch.rand(3, 4, dtype=widest())
    given = {name: torch.rand(4, dtype=widest()) + 0.5 for name in ("weight", "pos_weight")}

    def by(f) -> Tensor:
        def loss(w: Tensor) -> Tensor:
            options = {**given, chosen: w, "reduction": reduction}
            return f.binary_cross_entropy_with_logits(x, t, **options).sin().sum()

        return torch.func.grad(loss)(given[chosen])

    torch.testing.assert_close(by(bpF), by(F))
