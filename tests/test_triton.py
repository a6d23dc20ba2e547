"""The Triton path: its activation table, its masks, its elementwise kernels, and when it runs."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings

import pytest
import torch
import triton
import triton.language as tl
from cases import torch_activation
from device import DEVICE
from exact import assert_as_good_as_torch, cancelled
from seeds import INPUTS_SEED

import bp_torch
from bp_torch import backends, nn
from bp_torch import functional as bpF
from bp_torch import triton_kernels as kernels
from bp_torch.functions.activation import ACTIVATIONS, lookup

ONE_BACKEND = "about the kernels alone"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [(key, p) for key, row in ACTIVATIONS.items() for p in (tuple(row.parameters.values()), *row.examples)]
ROWS += [("celu", (-0.7,))]  # no case of the contracts: torch's backward holds 1/α in float32
ROWS = [(*row, fused) for row in ROWS for fused in (False, True) if not fused or lookup(*row, fused) != lookup(*row)]
every_row = pytest.mark.parametrize(
    ("key", "parameters", "fused"), ROWS, ids=[f"{key}{p}{'-fused' * fused}" for key, p, fused in ROWS]
)


@triton.jit
def _table(X, S, Y, D, C, n, a, b, KEY: tl.constexpr, OUTPUT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0)
    s = tl.load(S + i, mask=i < n, other=0.0)
    tl.store(Y + i, kernels.activation.forward(x, KEY, a, b), mask=i < n)
    tl.store(D + i, kernels.activation.derivative(s, KEY, OUTPUT, a, b), mask=i < n)
    tl.store(C + i, kernels.activation.curvature(s, KEY, OUTPUT, a, b), mask=i < n)


def test_the_tables_have_the_same_keys() -> None:
    assert set(kernels.activation.KEYS) == set(ACTIVATIONS)


@pytest.mark.to_the_last_digits
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@every_row
def test_the_tables_agree(key: str, parameters: tuple[float, ...], fused: bool) -> None:
    """f, f′ and the derivative of f′, in float32, at kinks, in tails, for NaN and Inf: error at most twice torch's.

    Parameters are the numbers that float32 has for them, lest at a kink float64 stands on the other side.
    """
    row, p = lookup(key, parameters, fused), torch.tensor(parameters).tolist()
    special = [0.0, -0.0, 1e-30, 1e-5, 1e-3, 3.0, 6.0, 0.5, 1.0, 20.0, 20.5, 88.0, 100.0, 1e4, float("inf")]
    special += [-x for x in special] + [float("nan"), *lookup(key, parameters).kinks(*p)]

    def formulas(x: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        return [row.f(x, *p), row.df(s, *p), row.ddf(s, *p)]

    def exact(x: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        return formulas(x.double(), s.double())

    def torchs(x: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        f, df, ddf = formulas(x, s)
        return [f, df if row.native is None else row.native(torch.ones_like(s), s, *p), ddf]

    def slack(x: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor | float]:
        return [0.0, *[cancelled(key, s)] * 2]

    def table(x: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(x) for _ in range(3)]
        _table[(1,)](x, s, *found, x.numel(), *(*p, 0.0, 0.0)[:2], key, row.saves == "output", 4096)
        return found

    def draw(finite: bool = True) -> list[torch.Tensor]:
        """x and what the derivative is computed from, where these and all results are finite, or where one is not."""
        x = torch.cat([torch.linspace(-12, 12, 2001) + 0.012 * torch.rand(2001), torch.tensor(special)]).to(DEVICE)
        s = x if row.saves == "input" else row.f(x, *p)
        results = [*torchs(x, s), *exact(x, s)]
        chosen = torch.stack([t.isfinite() for t in (x, *results)]).all(0) == finite
        return [x[chosen], s[chosen]]

    assert_as_good_as_torch(table, torchs, draw, exact, slack)
    # Where float32 gives an infinity it is the same one; NaN stays NaN.
    x, s = draw(finite=False)
    for ours, theirs, right in zip(table(x, s), torchs(x, s), exact(x, s), strict=True):
        infinite = right.isinf()
        torch.testing.assert_close(ours[infinite].double(), right[infinite])
        assert ours[x.isnan() & theirs.isnan()].isnan().all()
        finite = right.isfinite() & theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite])


@triton.jit
def _expm1(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, kernels.activation.expm1(tl.load(X + i, mask=i < n, other=0.0)), mask=i < n)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_expm1_is_right_to_1_6_units_of_the_last_place() -> None:
    x = torch.cat([torch.linspace(-40, 88.72, 40_001), torch.linspace(-1, 1, 20_001), torch.logspace(-30, 0, 2_001)])
    x = torch.cat([x, torch.tensor([-0.0, 88.8, 1e30, float("inf"), -float("inf"), -1e30, float("nan")])]).to(DEVICE)
    y = torch.empty_like(x)
    _expm1[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), 4096)
    exact = torch.expm1(x.double())
    torch.testing.assert_close(y[-7:], torch.expm1(x[-7:]), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit(), x.signbit())
    unit = 2.0 ** (torch.frexp(exact[:-7]).exponent.double() - 24)
    assert ((y[:-7] - exact[:-7]).abs() / unit).nan_to_num(0).max() < 1.6


@pytest.mark.parametrize("p", [0.5, 0.1, 1e-5])
@pytest.mark.parametrize("start", [0, 8, 4096, 2**33])
def test_the_mask_depends_on_the_index_alone(p: float, start: int) -> None:
    """Block by block, element by element, and beyond 32 bits: the same mask."""

    @triton.jit
    def both(A, B, SEED, START, THRESHOLD: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
        seed = tl.load(SEED)
        start = tl.load(START)
        i = tl.arange(0, BLOCK)
        tl.store(A + i, kernels.random.keep_contiguous(seed, start, THRESHOLD, BITS, BLOCK))
        tl.store(B + i, kernels.random.keep(seed, start + i, THRESHOLD, BITS))

    seed = kernels.dropout.new_seed(torch.device(DEVICE))
    results = []
    for block in (64, 256):
        a, b = (torch.empty(block, dtype=torch.bool, device=DEVICE) for _ in range(2))
        threshold, bits = kernels.random.threshold(p), kernels.random.bits_for(p)
        both[(1,)](a, b, seed, torch.tensor([start], device=DEVICE), threshold, bits, block)
        torch.testing.assert_close(a, b)
        results.append(a)
    torch.testing.assert_close(results[0], results[1][:64])


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 1e-3])
def test_the_mask_keeps_the_right_share_and_does_not_repeat(p: float) -> None:
    seed = kernels.dropout.new_seed(torch.device(DEVICE))
    mask = kernels.dropout.mask(seed, (512, 256), p)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * deviation
    if p == 0.5:
        rows = {tuple(row.tolist()) for row in mask}
        assert len(rows) == 512
        agreement = (mask[1:] == mask[:-1]).double().mean(1)
        assert (agreement - 0.5).abs().max() < 6 * (0.25 / 256) ** 0.5
    other = kernels.dropout.mask(kernels.dropout.new_seed(torch.device(DEVICE)), (512, 256), p)
    assert not torch.equal(mask, other)


@pytest.mark.parametrize("p", [2**-16, 1e-5, 0.003, 0.1, 1 / 3, 0.5, 0.999, 1 - 2**-16])
def test_the_bits_of_a_mask_are_enough_for_its_share(p: float) -> None:
    """Elements are dropped with p to a thousandth of p and of 1 - p, more exactly than any sample shows."""
    share = kernels.random.threshold(p) / 2 ** kernels.random.bits_for(p)
    assert abs(share - p) <= 1e-3 * min(p, 1 - p)


@triton.jit
def _cast(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, kernels.cast.cast(tl.load(X + i, mask=i < n, other=0.0), Y.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_halves_are_rounded_to_even(dtype: torch.dtype) -> None:
    """Between neighbours of the narrower dtype, at the middle and one float32 to each side of it."""
    low = torch.tensor([1.0, 1.5, -1.0, 3.0, 1e-3, 100.0], device=DEVICE).to(dtype)
    low = torch.cat([low, torch.nextafter(low, 2 * low)])
    middle = (low.double() + torch.nextafter(low, 2 * low).double()) / 2
    x = middle.float()
    assert torch.equal(x.double(), middle)
    x = torch.cat([x, torch.nextafter(x, 2 * x), torch.nextafter(x, 0 * x), x.new_tensor([float("inf"), -0.0])])
    y = torch.empty_like(x, dtype=dtype)
    _cast[(1,)](x, y, len(x), 64)
    assert torch.equal(y, x.to(dtype))


def test_seeds_come_from_torchs_generator() -> None:
    x = torch.ones(64, 64, device=DEVICE, requires_grad=True)

    def draw() -> torch.Tensor:
        torch.manual_seed(3)
        return bpF.dropout(x, 0.5)

    with bp_torch.backend("triton"):
        first, second = draw(), draw()
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        third = bpF.dropout(x, 0.5)
        assert not torch.equal(first, third)
        (grad,) = torch.autograd.grad(first, x, torch.ones_like(x))
        torch.testing.assert_close(grad, first.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", ["relu", "tanh", "gelu", "identity"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("with_residual", [False, True])
def test_dense_equals_its_parts(dtype: torch.dtype, key: str, p: float, with_residual: bool) -> None:
    """Forward, every gradient, and the gradient of a gradient penalty, with the mask that the kernels draw."""
    shapes = ((9, 5), (24, 5), (24,), (9, 24))[: 4 if with_residual else 3]

    def run(f, dy, *tensors):
        given = [t.detach().requires_grad_() for t in tensors]
        y = f(*given)
        grads = torch.autograd.grad(y, given, dy, create_graph=True)
        squares = sum((g.float() ** 2).sum() for g in grads[:2])
        second = torch.autograd.grad(squares, given, allow_unused=True)
        return [y, *grads, *(s if s is not None else torch.zeros(()) for s in second)]

    def ours(x, W, b, r=None):
        torch.manual_seed(7)
        with bp_torch.backend("triton"):
            return bpF.dense(x, W, b, r, activation=key, p=p)

    torch.manual_seed(7)
    seed = kernels.dropout.new_seed(torch.device(DEVICE))
    mask = kernels.dropout.mask(seed, (9, 24), p) if p else None

    def parts(x, W, b, r=None):
        a = torch_activation(key)(torch.nn.functional.linear(x, W, b))
        a = a if mask is None else a * mask / (1 - p)
        return a if r is None else a + r

    generator = torch.Generator(DEVICE).manual_seed(INPUTS_SEED)  # ``ours`` sets torch's

    def draw() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in ((9, 24), *shapes)]

    assert_as_good_as_torch(functools.partial(run, ours), functools.partial(run, parts), draw)


def test_relu_and_dropout_save_the_output_alone() -> None:
    layer = nn.Dense(8, 16, activation="relu", dropout=0.5).to(DEVICE)
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    shapes = []
    with (
        bp_torch.backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t),
    ):
        layer(x)
    assert sorted(shapes) == sorted([(4, 8), (16, 8), (4, 16)])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (3, 7)])
def test_empty_and_odd_shapes(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    with bp_torch.backend("triton"):
        y = bpF.gelu(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))
    assert dx.shape == x.shape


def test_backend_is_chosen_and_restored() -> None:
    assert backends.current_backend() == "auto"
    with bp_torch.backend("triton"):
        assert backends.current_backend() == "triton"
        with bp_torch.backend("torch"):
            assert backends.kernels(torch.ones(1, device=DEVICE)) is None
        assert backends.kernels(torch.ones(1, device=DEVICE)) is kernels
    assert backends.current_backend() == "auto"
    with (
        pytest.raises(ValueError, match=r"backend\(\): expected one of auto, torch, triton, got 'cuda'"),
        bp_torch.backend("cuda"),
    ):
        pass


@pytest.mark.skipif(DEVICE == "cuda", reason="what happens on the CPU")
def test_auto_leaves_the_cpu_to_torch() -> None:
    assert backends.kernels(torch.ones(1)) is None


def test_one_warning_says_why_triton_does_not_run() -> None:
    backends._warned.clear()
    x = torch.ones(3, dtype=torch.float64, device=DEVICE)
    with bp_torch.backend("triton"):
        with pytest.warns(UserWarning, match="there are no float64 kernels: the torch formulas run"):
            bpF.relu(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bpF.relu(x)


@pytest.mark.filterwarnings("ignore:bp_torch.+was asked for:UserWarning")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_complex_and_integer_tensors_get_torchs_answers(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(6, device=DEVICE)).to(dtype)
    with bp_torch.backend("triton"):
        torch.testing.assert_close(bpF.tanh(x), torch.tanh(x))
        if DEVICE == "cpu" or dtype.is_complex:  # CUDA has no product of integers
            torch.testing.assert_close(bpF.linear(x, torch.ones(2, 6).to(x)), torch.ones(2, 6).to(x) @ x)
        if dtype.is_complex:
            with pytest.raises(NotImplementedError, match="expected a floating dtype"):
                bpF.dropout(x, 0.5)


def test_import_needs_no_triton_and_does_not_load_it() -> None:
    for code in (
        "import sys; sys.modules['triton'] = None; import torch, bp_torch; bp_torch.nn.ReLU()(torch.ones(2))",
        "import sys, bp_torch; assert 'bp_torch.triton_kernels' not in sys.modules",
    ):
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_environment_variable_sets_the_backend() -> None:
    code = "import bp_torch.backends as b; print(b.current_backend())"
    for value, status in (("torch", 0), ("fast", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"BP_TORCH_BACKEND": value, "PATH": ""}, capture_output=True, text=True
        )
        assert done.returncode == status
        assert (value in done.stdout) if status == 0 else ("BP_TORCH_BACKEND: expected one of" in done.stderr)
