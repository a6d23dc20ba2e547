"""bp_torch.batch_invariant(): a row's result has the same bits whatever the batch around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from device import DEVICE
from exact import assert_as_good_as_torch, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import bp_torch
from bp_torch import backends, nn
from bp_torch import functional as bpF
from bp_torch.functions import batch_invariant
from bp_torch.functions.activation import ACTIVATIONS

ONE_BACKEND = "its own fixture `backend` runs every layer on both"

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = 40


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with bp_torch.backend(request.param), bp_torch.batch_invariant(), torch.no_grad():
        yield request.param


def skip_without_kernels(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("there are no float64 kernels: the torch formulas run, which the other backend tests")


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_rows_stand_alone(f: Callable[..., Tensor], *given: Tensor, every: int = 7) -> None:
    """f(x)[j:k] has the bits of f(x[j:k]): rows alone, beginnings of several lengths, and slices from the middle.

    Every so many of them; in Triton's interpreter, which is slow, fewer.
    """
    whole = f(*given)
    rows = given[0].shape[0]
    every = 17 if backends.current_backend() == "triton" else every
    slices = [(i, i + 1) for i in range(0, rows, every)] + [(0, m) for m in range(2, rows, every)]
    slices += [(j, rows) for j in range(1, rows, 2 * every)] + [(rows // 2, rows // 2 + 3)]
    for j, k in slices:
        part = f(*(t[j:k] for t in given))
        torch.testing.assert_close(part, whole[j:k], rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize(("inner", "outer", "bias"), [(1, 1, True), (33, 7, False), (127, 64, True), (513, 70, False)])
def test_linear(backend: str, dtype: torch.dtype, inner: int, outer: int, bias: bool) -> None:
    """And the values are right."""
    skip_without_kernels(backend, dtype)
    W, b = make(outer, inner, dtype=dtype), make(outer, dtype=dtype) if bias else None
    x = make(ROWS, inner, dtype=dtype)
    assert_rows_stand_alone(lambda x: bpF.linear(x, W, b), x, every=1)

    assert_as_good_as_torch(
        lambda x, W: bpF.linear(x, W, b),
        lambda x, W: torch.nn.functional.linear(x, W, b),
        lambda: (make(ROWS, inner, dtype=dtype), make(outer, inner, dtype=dtype)),
        exact=lambda x, W: wide(x) @ wide(W).T + (0 if b is None else wide(b)),
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's products on the CPU")
def test_torchs_product_is_not_invariant_which_is_why_the_mode_exists() -> None:
    x, W = make(ROWS, 513), make(64, 513)
    whole = torch.nn.functional.linear(x, W)
    alone = torch.cat([torch.nn.functional.linear(row, W) for row in x.split(1)])
    if torch.equal(whole, alone):
        pytest.skip("here torch's product is invariant")
    with bp_torch.batch_invariant():
        whole, alone = bpF.linear(x, W), torch.cat([bpF.linear(row, W) for row in x.split(1)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=0)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 150), inner=st.integers(1, 70), outer=st.integers(1, 70), cut=st.integers(0, 149),
    transposed=st.booleans(), dtype=st.sampled_from(DTYPES), threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_any_shape_and_stride_with_any_number_of_threads(
    rows: int, inner: int, outer: int, cut: int, transposed: bool, dtype: torch.dtype, threads: int
) -> None:
    x = make(inner, rows, dtype=dtype).mT if transposed else make(rows, inner, dtype=dtype)
    W = make(inner, outer, dtype=dtype).mT if transposed else make(outer, inner, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with bp_torch.backend("torch"), bp_torch.batch_invariant():
            whole = bpF.dense(x, W, activation="silu")
            for j, k in ((cut % rows, cut % rows + 1), (cut % rows, rows), (0, cut % rows + 1)):
                torch.testing.assert_close(bpF.dense(x[j:k], W, activation="silu"), whole[j:k], rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize("key", ["relu", "gelu", "tanh", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_dense(backend: str, dtype: torch.dtype, key: str, with_residual: bool) -> None:
    skip_without_kernels(backend, dtype)
    layer = nn.Dense(33, 7, activation=key, device=DEVICE, dtype=dtype)
    given = [make(ROWS, 33, dtype=dtype)] + ([make(ROWS, 7, dtype=dtype)] if with_residual else [])
    assert_rows_stand_alone(layer, *given)


@every_dtype
@pytest.mark.parametrize(
    "options", [{}, {"activation": "mish", "residual": True}, {"norm": "batch", "activation": "gelu_tanh"}], ids=str
)
def test_mlp(backend: str, dtype: torch.dtype, options: dict) -> None:
    skip_without_kernels(backend, dtype)
    mlp = nn.MLP(13, [21, 21], 3, dropout=0.1, device=DEVICE, dtype=dtype, **options).eval()
    assert_rows_stand_alone(mlp, make(ROWS, 13, dtype=dtype))


@every_dtype
@pytest.mark.parametrize("key", ACTIVATIONS)
def test_activations(backend: str, dtype: torch.dtype, key: str) -> None:
    skip_without_kernels(backend, dtype)
    assert_rows_stand_alone(lambda x: bpF.activation(x, key), 3 * make(ROWS, 7, dtype=dtype))


def test_activations_beyond_one_thread_and_one_chunk() -> None:
    before = torch.get_num_threads()
    x = make(5, batch_invariant.CHUNK // 2 - 3)
    torch.set_num_threads(2)
    try:
        with bp_torch.batch_invariant():
            for key in ("silu", "elu", "softplus", "tanh"):
                y = bpF.activation(x, key)
                torch.testing.assert_close(y, ACTIVATIONS[key].f(x, *ACTIVATIONS[key].parameters.values()))
                for i in range(5):
                    torch.testing.assert_close(bpF.activation(x[i : i + 1], key), y[i : i + 1], rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_channels_last_stays_so() -> None:
    x = make(2, 3, 4, 5).to(memory_format=torch.channels_last)
    with bp_torch.batch_invariant():
        y = bpF.silu(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, torch.nn.functional.silu(x))


@every_dtype
def test_residual(backend: str, dtype: torch.dtype) -> None:
    skip_without_kernels(backend, dtype)
    x, r = make(ROWS, 7, dtype=dtype), make(ROWS, 7, dtype=dtype)
    assert_rows_stand_alone(lambda x, r: bpF.residual(x, r, activation="silu"), x, r)


@every_dtype
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((ROWS, 7), 1), ((ROWS, 301), 1), ((ROWS, 5, 6), 1), ((ROWS, 3, 5), 2), ((ROWS, 4, 3, 7), -2)]
)
def test_softmax(backend: str, dtype: torch.dtype, name: str, shape: tuple[int, ...], dim: int) -> None:
    skip_without_kernels(backend, dtype)
    f = getattr(bpF, name)
    assert_rows_stand_alone(lambda x: f(x, dim), 3 * make(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_along_the_first_dimension(backend: str, dtype: torch.dtype, name: str) -> None:
    """Where the rows, which lie beside each other in the last, are ATen's to divide."""
    f = getattr(bpF, name)
    assert_rows_stand_alone(lambda x: f(x.mT.contiguous(), 0).mT, 3 * make(ROWS, 7, dtype=dtype))


@every_dtype
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize(("classes", "positions"), [(7, ()), (301, ()), (7, (5,)), (3, (2, 3))])
def test_cross_entropy(backend: str, dtype: torch.dtype, options: dict, classes: int, positions: tuple) -> None:
    skip_without_kernels(backend, dtype)
    target = torch.randint(classes, (ROWS, *positions), device=DEVICE)
    target[3] = -100
    assert_rows_stand_alone(
        lambda x, t: bpF.cross_entropy(x, t, reduction="none", **options),
        3 * make(ROWS, classes, *positions, dtype=dtype), target,
    )  # fmt: skip


@every_dtype
@pytest.mark.parametrize("key", ["relu", "silu"])
@pytest.mark.parametrize("shape", [(ROWS, 7), (ROWS, 3, 5)])
def test_batch_norm_in_evaluation(backend: str, dtype: torch.dtype, key: str, shape: tuple[int, ...]) -> None:
    skip_without_kernels(backend, dtype)
    layer = nn.BatchNormAct1d(shape[1], activation=key, device=DEVICE, dtype=dtype)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    assert_rows_stand_alone(layer.eval(), make(*shape, dtype=dtype))


def test_gradients_are_torchs() -> None:
    """The mode changes forward alone; tangents and second derivatives go through it."""
    x, W, b = (make(*s, dtype=torch.float64).requires_grad_() for s in ((19, 5), (3, 5), (3,)))
    with bp_torch.backend("torch"), bp_torch.batch_invariant():
        assert torch.autograd.gradcheck(
            lambda *t: bpF.dense(*t, activation="tanh"), (x[:3], W, b), check_forward_ad=True
        )
        assert torch.autograd.gradgradcheck(lambda *t: bpF.dense(*t, activation="tanh"), (x[:2], W, b))
        y = bpF.linear(x, W, b)
        found = torch.autograd.grad(y, (x, W, b), torch.ones_like(y))
    y = torch.nn.functional.linear(x, W, b)
    torch.testing.assert_close(found, torch.autograd.grad(y, (x, W, b), torch.ones_like(y)))


def test_the_triton_kernels_serve_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the Triton backend it is the GEMM that runs, whatever :func:`choose` says, and with p = 1 too."""
    from bp_torch import triton_kernels

    calls = []
    forward = triton_kernels.dense.forward
    monkeypatch.setattr(triton_kernels.dense, "forward", lambda *args: calls.append(args[5].name) or forward(*args))
    with bp_torch.backend("triton"):
        bpF.linear(make(3, 4), make(5, 4))
        assert calls == []
        with bp_torch.batch_invariant():
            bpF.linear(make(3, 4), make(5, 4))
            bpF.dense(make(3, 4), make(5, 4), activation="relu", p=0.5)
            bpF.dense(make(3, 4), make(5, 4), activation="relu", p=1.0)
    assert calls == ["identity", "relu", "identity"]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (3, 0)])
@pytest.mark.parametrize("outer", [0, 5])
def test_empty_and_vectors(backend: str, shape: tuple[int, ...], outer: int) -> None:
    x, W, b = make(*shape), make(outer, shape[-1]), make(outer)
    torch.testing.assert_close(bpF.linear(x, W, b), torch.nn.functional.linear(x, W, b))
    torch.testing.assert_close(bpF.silu(x), torch.nn.functional.silu(x))


def test_transforms_and_compilers_are_refused() -> None:
    """They would choose the order of sums themselves: the promise would be broken without a word."""
    x, W = make(3, 4), make(5, 4)
    with bp_torch.batch_invariant():
        for f in (lambda x: bpF.linear(x, W), bpF.silu, lambda x: bpF.softmax(x, -1), lambda x: bpF.residual(x, x)):
            with pytest.raises(RuntimeError, match=r"batch_invariant\(\): expected ordinary tensors in eager mode"):
                torch.func.vmap(f)(x)
        with pytest.raises(Exception, match=r"batch_invariant\(\): expected ordinary tensors in eager mode"):
            torch.compile(lambda x: bpF.linear(x, W), fullgraph=True, backend="eager")(x)


@pytest.mark.parametrize("with_tangent", [True, False])
def test_forward_mode_keeps_the_promise(backend: str, with_tangent: bool) -> None:
    x, tangent, W, b = make(ROWS, 65), make(ROWS, 65), make(33, 65), make(33)

    def f(x: Tensor, tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(x, tangent) if with_tangent else x
            return forward_ad.unpack_dual(bpF.silu(bpF.dense(x, W, b, activation="tanh"))).primal

    assert_rows_stand_alone(f, x, tangent)


@pytest.mark.skipif(DEVICE == "cuda", reason="the search for a block on the CPU")
def test_where_no_block_treats_all_places_alike_rows_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose later rows differ in the last bit is found out, and then each row is a call of its own."""
    linear, shapes = torch.nn.functional.linear, []

    def uneven(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        shapes.append(tuple(x.shape))
        y = linear(x, W, b)
        return torch.cat([y[:9], torch.nextafter(y[9:], torch.tensor(torch.inf))])

    monkeypatch.setattr(batch_invariant.F, "linear", uneven)
    batch_invariant.block_of.cache_clear()
    try:
        with bp_torch.batch_invariant():
            W = make(5, 4)
            assert_rows_stand_alone(lambda x: bpF.linear(x, W), make(11, 4))
    finally:
        batch_invariant.block_of.cache_clear()
    assert shapes[-1] == (1, 4)


def test_the_mode_ends_with_the_block() -> None:
    assert not backends.is_batch_invariant()
    with bp_torch.batch_invariant():
        with bp_torch.batch_invariant():
            pass
        assert backends.is_batch_invariant()
    with pytest.raises(RuntimeError), bp_torch.batch_invariant():
        bpF.linear(make(2, 3), make(2, 2))
    assert not backends.is_batch_invariant()
