"""Dropout and its kin against torch: masks, channels, alpha, generators, transforms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import widest, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.dropout import draw_mask

NAMES = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
CLASSES = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"]
DIMENSIONS = {"dropout1d": 3, "dropout2d": 4, "dropout3d": 5}
every_form = pytest.mark.parametrize("name", NAMES)


def example(name: str, size: int = 2) -> Tensor:
    """An input that ``name`` takes without a warning."""
    return torch.randn((size,) * DIMENSIONS.get(name, 4), dtype=widest())


def binomial_bounds(n: int, p: float, tail: float = 1e-9) -> tuple[int, int]:
    """The counts that a binomial variable leaves on either side with probability at most ``tail``."""
    k = torch.arange(n + 1, dtype=torch.float64)
    log_pmf = (
        math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    )
    below = log_pmf.exp().cumsum(0)
    return int((below < tail).sum()), int((below < 1 - tail).sum())


@pytest.mark.contract("randomness", function="DropoutFunction")
@pytest.mark.parametrize("p", [0.1, 1e-3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(300, 100), (512, 512)], ids=str)
def test_rate_of_dropped_elements(p: float, shape: tuple[int, int], on_backend: str) -> None:
    if on_backend == "triton":  # whose mask is one for all sizes
        shape = (shape[0], shape[1] // 8)
    low, high = binomial_bounds(math.prod(shape), p)
    for seed in range(3):
        torch.manual_seed(seed)
        dropped = int((bpF.dropout(torch.ones(shape), p) == 0).sum())
        assert low <= dropped <= high


@pytest.mark.one_backend("torch", "about the 16 bits that the formulas draw; the kernels' masks have test_triton.py")
@pytest.mark.parametrize("p", [0.0999, 0.25, 2**-8 + 2**-18, 0.7])
def test_threshold_of_large_masks_has_the_mean_p(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 bits an element the threshold is one of the two neighbours of p, at random: each 16-bit value comes once
    here, so that the elements dropped count the values below it."""
    every_value = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(Tensor, "random_", lambda self, *_, generator: self.copy_(every_value))
    x, calls = torch.empty(2**16), 400
    dropped = [x.numel() - int(draw_mask(x, p).sum()) for _ in range(calls)]
    below = math.floor(p * 2**16)
    rest = p * 2**16 - below
    if rest == 0:
        assert set(dropped) == {below}
    else:
        assert set(dropped) == {below, below + 1}
        low, high = binomial_bounds(calls, rest)
        assert low <= dropped.count(below + 1) <= high


@pytest.mark.parametrize("p", [1e-12, 1 - 1e-12])
def test_p_next_to_its_limits(p: float) -> None:
    kept = written_out(draw_mask(torch.empty(4096), p), (4096,), p)
    assert bool(kept.all()) if p < 0.5 else not bool(kept.any())


@pytest.mark.contract("randomness", function="DropoutFunction")
def test_mask_does_not_repeat_along_rows_or_columns() -> None:
    mask = written_out(draw_mask(torch.empty(512, 256), 0.5), (512, 256), 0.5)
    assert torch.unique(mask, dim=0).shape == mask.shape
    assert torch.unique(mask, dim=1).shape == mask.shape
    for period in (1, 2, 4, 8, 32, 64, 256, 4096, 65536):
        flat = mask.reshape(mask.numel())
        equal = int((flat[period:] == flat[:-period]).sum())
        low, high = binomial_bounds(flat.numel() - period, 0.5)
        assert low <= equal <= high


@pytest.mark.contract("randomness", function="DropoutFunction")
def test_manual_seed_governs_the_mask() -> None:
    x = torch.ones(64, 64)

    def masks(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [bpF.dropout(x) for _ in range(2)]

    first, again, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    agreements = [(first[0], first[1]), (first[0], other[0]), (first[1], other[1])]
    low, high = binomial_bounds(x.numel(), 0.5)
    for a, b in agreements:
        assert low <= int((a == b).sum()) <= high


@every_form
def test_generator_decides_alone(name: str) -> None:
    x, form = example(name, 6), getattr(bpF, name)
    state = torch.get_rng_state()
    one = form(x, 0.5, True, generator=torch.Generator().manual_seed(4))
    two = form(x, 0.5, True, generator=torch.Generator().manual_seed(4))
    other = form(x, 0.5, True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.contract("checkpoint", function="DropoutFunction")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_mask_is_the_same_when_a_checkpoint_runs_again(name: str, reentrant: bool) -> None:
    """The gradient of dropout at x = 1 is its output, if both come from one mask."""
    module = getattr(nn, name)(0.5)
    x = torch.ones_like(example(name.lower(), 6)).requires_grad_()
    y = checkpoint(module, x, use_reentrant=reentrant)
    torch.rand(7)  # moves the generator between forward and backward
    y.backward(torch.ones_like(y))
    kept = y == y.max()
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(x.grad != 0, kept)


@pytest.mark.parametrize(("name", "cls"), list(zip(NAMES, CLASSES, strict=True)))
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_values_are_torchs_for_the_same_mask(name: str, cls: str, p: float, inplace: bool) -> None:
    """torch's mask is read off its output at x = 0 and x = 1; ours likewise, so only the two values matter."""
    for form in (getattr(bpF, name), getattr(F, name)):
        x = torch.zeros_like(example(name, 6))
        y = form(x, p, True, inplace)
        assert (y is x) == (inplace or p == 0)
    x = example(name, 6)
    torch.manual_seed(0)
    ours = getattr(bpF, name)(x.clone(), p, True, inplace)
    if "alpha" in name:
        a = 1 / math.sqrt((1 - p) * (1 + p * 1.7580993408473766**2)) if p < 1 else 0.0
        b = a * p * 1.7580993408473766
        dropped = -a * 1.7580993408473766 + b
    else:
        a, b, dropped = (1 / (1 - p) if p < 1 else 0.0), 0.0, 0.0
    is_dropped = torch.isclose(ours, torch.full_like(ours, dropped))
    torch.testing.assert_close(ours, torch.where(is_dropped, torch.full_like(x, dropped), a * x + b))
    theirs = getattr(F, name)(x.clone(), p, True, inplace)
    their_dropped = torch.isclose(theirs, torch.full_like(theirs, dropped))
    torch.testing.assert_close(theirs, torch.where(their_dropped, torch.full_like(x, dropped), a * x + b))
    if name != "dropout" and name != "alpha_dropout":
        channels = is_dropped.reshape(*x.shape[:2], -1)
        assert torch.equal(channels.all(-1), channels.any(-1))


@every_form
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_goes_through_the_mask_of_forward(name: str, inplace: bool) -> None:
    x = example(name, 6).requires_grad_()
    p = 0.4
    y = getattr(bpF, name)(x * 1, p, True, inplace)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    a = 1 / math.sqrt((1 - p) * (1 + p * 1.7580993408473766**2)) if "alpha" in name else 1 / (1 - p)
    mask = dx != 0
    torch.testing.assert_close(dx, a * mask * dy)
    values = y.detach()[~mask]
    assert 0 < values.numel() < mask.numel()
    torch.testing.assert_close(values, values[:1].expand_as(values))


@every_form
def test_where_nothing_is_dropped_the_input_itself_comes_back(name: str) -> None:
    x, form = example(name), getattr(bpF, name)
    assert form(x, 0.5, False) is x
    assert form(x, 0.0, True) is x
    empty = x[:0]
    assert form(empty, 0.5, True) is empty


@pytest.mark.contract("edges", function="DropoutFunction")
@every_form
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_nan_stays_nan_where_it_is_dropped(name: str, p: float) -> None:
    x = torch.full_like(example(name), math.nan)
    assert getattr(bpF, name)(x, p, True).isnan().all()
    assert getattr(F, name)(x, p, True).isnan().all()


@pytest.mark.contract("layouts", function="DropoutFunction")
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout"])
def test_channels_last_stays(name: str) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = getattr(bpF, name)(x, 0.5, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    step=st.integers(1, 3),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    upstream=st.sampled_from(["dense", "expanded", "strided"]),
)
def test_any_layout_and_dtype(shape: list[int], step: int, transposed: bool, dtype: torch.dtype, upstream: str) -> None:
    x = torch.ones(*shape, 3 * step, dtype=dtype)[..., ::step]
    x = (x.mT if transposed and x.dim() > 1 else x).requires_grad_()
    dy = {
        "dense": lambda: torch.ones(x.shape, dtype=dtype),
        "expanded": lambda: torch.ones((), dtype=dtype).expand(x.shape),
        "strided": lambda: torch.ones(*x.shape, 2, dtype=dtype)[..., 0],
    }[upstream]()
    y = bpF.dropout(x, 0.5)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert bool(((y == 0) | (y == 2)).all())
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, y)


@pytest.mark.contract("torch.func", function="DropoutFunction")
@pytest.mark.parametrize("name", ["dropout", "dropout1d", "alpha_dropout"])
def test_vmap_randomness_modes(name: str) -> None:
    x = torch.ones(4, 16, 16, 2)

    def run(form: Callable[..., Tensor], randomness: str) -> Tensor:
        return vmap(lambda t: form(t, 0.5, True), randomness=randomness)(x)

    for form in (getattr(bpF, name), getattr(F, name)):
        same, different = run(form, "same"), run(form, "different")
        assert all(torch.equal(same[0], same[i]) for i in range(1, 4))
        assert not any(torch.equal(different[0], different[i]) for i in range(1, 4))
        with pytest.raises(RuntimeError, match="randomness"):
            run(form, "error")


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_vmap_drops_the_right_share(p: float, randomness: str) -> None:
    y = vmap(lambda t: bpF.dropout(t, p), randomness=randomness)(torch.ones(4, 4096))
    assert all(abs((row == 0).double().mean().item() - p) < 0.03 for row in y)  # six standard deviations


def test_vmap_uses_the_generator() -> None:
    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return vmap(lambda t: bpF.dropout(t, generator=generator), randomness="different")(torch.ones(4, 32))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.contract("compile", function="DropoutFunction")
@pytest.mark.parametrize("cls", CLASSES)
def test_compiled_module_drops_and_differentiates(cls: str) -> None:
    x = torch.ones_like(example(cls.lower(), 4)).requires_grad_()
    y = torch.compile(getattr(nn, cls)(0.5), fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y == y.max())
    assert 0 < int((dx != 0).sum()) < dx.numel()


@pytest.mark.contract("memory", function="DropoutFunction")
@pytest.mark.parametrize(("name", "per_channel"), [("dropout", False), ("alpha_dropout", False), ("dropout2d", True)])
def test_saves_one_byte_an_element_or_a_channel(name: str, per_channel: bool) -> None:
    saved: list[Tensor] = []
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        getattr(bpF, name)(x, 0.5, True)
    assert sum(t.untyped_storage().nbytes() for t in saved) <= (6 if per_channel else x.numel())


@pytest.mark.contract("dtypes", function="DropoutFunction")
def test_autocast_leaves_the_dtype_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(4, 3, dtype=dtype)
        with torch.autocast("cpu"):
            assert bpF.dropout(x).dtype == F.dropout(x).dtype == dtype


@every_form
def test_refuses_what_torch_refuses(name: str) -> None:
    for form in (getattr(bpF, name), getattr(F, name)):
        for p in (-0.1, 1.1):
            with pytest.raises(ValueError, match="between 0 and 1"):
                form(example(name), p)
        with pytest.raises(RuntimeError):
            form(example(name).long(), 0.5, True)
    with pytest.raises(TypeError, match=f"{name}.*'input'.*got list"):
        getattr(bpF, name)([1.0], 0.5, True)
    with pytest.raises(ValueError, match=f"{name}.*'p'.*got 1.5"):
        getattr(bpF, name)(example(name), 1.5)


@pytest.mark.parametrize(("name", "expected"), [("dropout2d", (3, 4)), ("dropout3d", (4, 5))])
def test_warns_of_dimensions_where_torch_warns(name: str, expected: tuple[int, ...]) -> None:
    for dim in range(2, 7):
        seen = []
        for form in (getattr(bpF, name), getattr(F, name)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                y = form(torch.ones((2,) * dim), 0.5)
            seen.append([w.category for w in caught])
            assert y.shape == (2,) * dim
            assert all(w.filename == __file__ for w in caught)
        assert seen[0] == seen[1], dim


def test_dropout1d_and_feature_forms_refuse_dimensions_that_torch_refuses() -> None:
    for shape in [(3,), (2, 2, 2, 2)]:
        for form in (bpF.dropout1d, F.dropout1d):
            with pytest.raises(RuntimeError):
                form(torch.ones(shape))
    for form in (bpF.feature_alpha_dropout, F.feature_alpha_dropout):
        with pytest.raises(RuntimeError):
            form(torch.ones(3), 0.5, True)


@pytest.mark.parametrize(("name", "shape"), [("dropout1d", (64, 5)), ("dropout3d", (64, 2, 2, 2))])
def test_single_sample_drops_its_channels(name: str, shape: tuple[int, ...]) -> None:
    y = getattr(bpF, name)(torch.ones(shape), 0.5).reshape(64, -1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert 0 < int((y[:, 0] == 0).sum()) < 64


@pytest.mark.contract("modules", function="DropoutFunction")
@pytest.mark.parametrize("cls", CLASSES)
def test_modules_have_torchs_arguments_and_repr(cls: str) -> None:
    ours, theirs = getattr(nn, cls)(0.3, inplace=True), getattr(torch.nn, cls)(0.3, inplace=True)
    assert isinstance(ours, getattr(torch.nn, cls))
    assert repr(ours) == repr(theirs)
    assert ours.state_dict() == theirs.state_dict()
    with pytest.raises(ValueError):
        getattr(nn, cls)(1.5)
    x = torch.ones_like(example(cls.lower(), 4))
    before = x.clone()
    assert ours.eval()(x) is x
    assert torch.equal(x, before)
    # torch's alpha modules do not look at inplace.
    assert (ours.train()(x) is x) == (theirs(x.clone()) is not None and "Alpha" not in cls)


def test_in_place_on_what_autograd_keeps_is_refused_as_torch_refuses_it() -> None:
    leaf = torch.ones(3, requires_grad=True)
    for form in (bpF.dropout, F.dropout):
        with pytest.raises(RuntimeError, match="leaf"):
            form(leaf, 0.5, True, True)
        kept = leaf.exp()  # exp keeps its output
        y = form(kept, 0.5, True, True)
        with pytest.raises(RuntimeError, match="inplace"):
            y.sum().backward()
