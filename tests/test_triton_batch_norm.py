"""The kernels of batch normalization: every layout, dtype, activation and option, against float64 and torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import torch_activation
from device import DEVICE
from exact import assert_as_good_as_torch, carried
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF
from bp_torch import nn
from bp_torch import triton_kernels as kernels
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.batch_norm import BatchNormFunction, NormalizeFunction
from bp_torch.functions.epilogue import Epilogue
from bp_torch.functions.function import call

ONE_BACKEND = "about the kernels alone"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = kernels.batch_norm
EPS = 1e-5

# (shape, memory format): rows and planes, in one program a group and in several.
WHOLE = {
    "one-column": ((9, 1), None),
    "rows": ((5, 70), None),  # two groups, the second not full
    "three-dimensions": ((3, 2, 5), None),
    "planes": ((3, 2, 5, 7), None),
    "channels-last": ((3, 5, 2, 3), torch.channels_last),
    "channels-last-3d": ((2, 3, 2, 1, 3), torch.channels_last_3d),
    "one-point": ((6, 3, 1, 1), None),
    "one-row": ((1, 2, 3, 3), None),
}
SPLIT = {
    "split-rows": ((2600, 3), None),  # the last tile of the last split not full
    "split-planes": ((5, 2, 33, 33), None),  # ragged both ways
    "split-channels-last": ((5, 2, 30, 31), torch.channels_last),
}
LAYOUTS = {**WHOLE, **SPLIT}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
split_layouts = pytest.mark.parametrize("layout", SPLIT)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with bp_torch.backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, in order."""
    names: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(KERNELS, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in ("_statistics", "_merge", "_apply", "_forward_whole", "_reduce", "_finish", "_backward_apply",
                 "_backward_whole"):  # fmt: skip
        monkeypatch.setattr(KERNELS, name, Recorded(name))
    return names


def made(layout: str, dtype: torch.dtype = torch.float32, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    shape, order = LAYOUTS[layout]
    x = (mean + scale * torch.randn(shape, device=DEVICE)).to(dtype)
    return x if order is None else x.contiguous(memory_format=order)


def inputs_like(x: Tensor, dtype: torch.dtype | None = None, residual: torch.dtype | None = None) -> list[Tensor]:
    """x, γ and β, and a residual where its dtype is given."""
    return [x, *parameters(x, dtype or x.dtype), *([] if residual is None else [torch.randn_like(x, dtype=residual)])]


def parameters(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """γ and β."""
    return [t.to(dtype) for t in torch.randn(2, x.shape[1], device=DEVICE)]


def ours(
    x: Tensor, gamma: Any, beta: Any, r: Any = None, key: str = "identity", statistics: Any = (None, None)
) -> Tensor:
    return bpF.batch_norm_act(x, *statistics, gamma, beta, r, statistics[0] is None, eps=EPS, activation=key)


def theirs(
    x: Tensor, gamma: Any, beta: Any, r: Any = None, key: str = "identity", statistics: Any = (None, None)
) -> Tensor:
    z = F.batch_norm(x, *statistics, gamma, beta, statistics[0] is None, 0.0, EPS)
    return torch_activation(key)(z if r is None else z + r, *ACTIVATIONS[key].parameters.values())


def results(f: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, *constants: Any) -> list[Tensor]:
    """y and the gradient of each input."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = f(*inputs, *constants)
    return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def check(
    make: Callable[[], list[Tensor]],
    key: str = "identity",
    statistics: Any = (None, None),
    f: Callable[..., Tensor] = ours,
    keep: Tensor | float = 1.0,
    once: bool = False,
) -> list[torch.dtype]:
    """y, dx, dγ, dβ and dr, for x, γ, β and perhaps r that ``make`` draws. Returns the dtypes of ours.

    torch's y is multiplied by ``keep``, as dropout in ``f`` does.

    dγ and dβ are sums in float32, as those of torch's CUDA kernel are, but its CPU kernel sums in float64. So two
    roundings of each of their terms are allowed besides, which at random add up as squares do; and where 1 - tanh²
    cancels even in float64, what remains of that.
    """
    dtypes: list[torch.dtype] = []

    def by(f: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        def run(dy: Tensor, *inputs: Tensor) -> list[Tensor]:
            given = statistics if dy.dtype != torch.float64 else [s if s is None else s.double() for s in statistics]
            return results(f, list(inputs), dy, *((key, given) if len(inputs) == 4 else (None, key, given)))

        return run

    def kept(*given: Any) -> Tensor:
        return theirs(*given) * keep

    def draw() -> list[Tensor]:
        x, *others = make()
        return [torch.randn(x.shape, dtype=torch.float64, device=DEVICE).to(x.dtype), x, *others]

    def slack(dy: Tensor, x: Tensor, *others: Tensor) -> list[Tensor | float]:
        r = others[2] if len(others) == 3 else torch.zeros_like(x)
        dz = by(kept)(*(t.double() for t in (dy, x, *others[:2], r)))[4]
        xhat = by(lambda x, *_: theirs(x, None, None, None, "identity", _[-1]))(dy.double(), x.double())[0]
        dims = [0, *range(2, x.dim())]
        sums = [2 * 2**-24 * terms.square().sum(dims).sqrt() for terms in (dz * xhat, dz)]
        rest = 2.0**-48 if key in ("gelu_tanh", "mish") else 0.0
        return [0.0, rest, *(s + rest for s in sums), rest][: 2 + len(others)]

    def seen(*inputs: Tensor) -> list[Tensor]:
        found = by(f)(*inputs)
        dtypes[:] = [t.dtype for t in found]
        return found

    assert_as_good_as_torch(seen, by(kept), draw, slack=slack, once=once)
    return dtypes


def of_sums(f: Callable[..., list[Tensor]], given: Sequence[Tensor]) -> list[Tensor | float]:
    """Two roundings of each term, as ``check`` allows, for those of f's results that are sums over rows."""
    sums = carried(f, given)
    return [2 * 2**-24 * s if s.dim() == 1 else 0.0 for s in sums]


@pytest.mark.to_the_last_digits
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES if layout in WHOLE or dtype != torch.float16],
    ids=str,
)
def test_training_equals_torch(layout: str, dtype: torch.dtype) -> None:
    check(lambda: inputs_like(made(layout, dtype)), "relu")


@layouts
@pytest.mark.parametrize("key", ["relu", "gelu"])
def test_a_residual_equals_torch(layout: str, key: str) -> None:
    check(lambda: inputs_like(made(layout), residual=torch.float32), key)


@layouts
@pytest.mark.parametrize("key", ["identity", "relu", "silu"])
def test_evaluation_equals_torch(layout: str, key: str) -> None:
    channels = LAYOUTS[layout][0][1]
    statistics = torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE) + 0.1
    check(lambda: inputs_like(made(layout)), key, statistics)


@pytest.mark.parametrize("key", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_every_activation(key: str, residual: bool) -> None:
    """Where y tells f′, the kernels compute it again without a residual, and read it with one."""
    check(lambda: inputs_like(made("rows"), residual=torch.float32 if residual else None), key)


@pytest.mark.parametrize("layout", ["planes", "channels-last", "split-rows"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("evaluation", [False, True])
def test_16_bit_inputs_with_float32_parameters(layout: str, dtype: torch.dtype, evaluation: bool) -> None:
    statistics = tuple(torch.rand(2, LAYOUTS[layout][0][1], device=DEVICE) + 0.1) if evaluation else (None, None)
    dtypes = check(lambda: inputs_like(made(layout, dtype), torch.float32), "relu", statistics)
    assert dtypes == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("layout", ["rows", "split-planes"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_evaluation_with_16_bit_statistics(layout: str, dtype: torch.dtype) -> None:
    statistics = tuple((torch.rand(2, LAYOUTS[layout][0][1], device=DEVICE) + 0.1).to(dtype))
    check(lambda: inputs_like(made(layout, dtype)), "gelu", statistics)


@pytest.mark.parametrize("layout", ["rows", "split-rows"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_residual_of_another_dtype(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """y has the wider dtype, and dx is not rounded to the narrower residual's."""
    found = check(lambda: inputs_like(made(layout, dtypes[0]), torch.float32, dtypes[1]), "relu")
    assert found == [torch.float32, dtypes[0], torch.float32, torch.float32, dtypes[1]]


@layouts
def test_a_mean_of_1e5_costs_no_accuracy(layout: str) -> None:
    """The statistics have the digits that float32 data has; y and gradients the accuracy of a float32 mean."""
    x = made(layout, mean=1e5)
    dims = [0, *range(2, x.dim())]
    mean, rest, var = KERNELS.statistics(x)
    torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=2**-24, atol=0)
    # Of several processes, whose means differ by little, the rest decides the variance.
    torch.testing.assert_close(mean.double() + rest.double(), x.double().mean(dims), rtol=0, atol=1e-6)
    torch.testing.assert_close(var.double(), x.double().var(dims, correction=0), rtol=1e-6, atol=0)
    check(lambda: inputs_like(made(layout, mean=1e5)), "tanh")


@layouts
def test_what_is_rounded_on_the_way_to_the_mean_averages_out(layout: str) -> None:
    """x - K is rounded the same way at every x between two powers of 2, unless K is a multiple of their last place."""

    def means(x: Tensor) -> list[Tensor]:
        return [x.mean([0, *range(2, x.dim())])]

    def ours(x: Tensor) -> list[Tensor]:
        return [KERNELS.statistics(x)[0]]

    for _ in range(4):
        assert_as_good_as_torch(ours, means, lambda: [made(layout)], slack=lambda *given: of_sums(means, given))


@split_layouts
def test_an_outlier_in_the_first_tile_costs_no_digits(layout: str) -> None:
    """The first tile's mean, from which the others' values count, is far from theirs."""
    x = made(layout)
    x[0] += 3000
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(KERNELS.statistics(x)[2].double(), x.double().var(dims, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["rows", "planes", "split-rows", "split-planes"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_statistics_of_non_finite_values(layout: str, value: float) -> None:
    x = made(layout)
    x[-1, -1] = value
    mean, _, var = KERNELS.statistics(x)
    dims = [0, *range(2, x.dim())]
    torch.testing.assert_close(mean, x.mean(dims), equal_nan=True)
    assert var[-1].isnan()
    torch.testing.assert_close(var[:-1], x.var(dims, correction=0)[:-1])


@layouts
def test_memory_format_is_torchs(layout: str) -> None:
    x = made(layout)
    inputs = [x, *parameters(x, x.dtype), torch.randn_like(x)]
    found, other = (results(f, inputs, torch.ones(x.shape, device=DEVICE), "relu") for f in (ours, theirs))
    for t, right in zip((found[0], found[1], found[4]), (other[0], other[1], other[4]), strict=True):
        assert t.stride() == right.stride()


@layouts
@pytest.mark.parametrize(
    ("p", "key", "evaluation", "residual"),  # 16 and 32 random bits an element
    [(0.5, "tanh", False, True), (0.003, "relu", False, False), (0.003, "identity", True, True)],
)
def test_dropout_draws_the_mask_of_the_elements_index(
    layout: str, p: float, key: str, evaluation: bool, residual: bool, launched: list[str]
) -> None:
    x = made(layout)
    seed = torch.tensor([7], device=DEVICE)
    mask = kernels.dropout.mask(seed, x.shape, p)
    statistics: Any = (None, None)
    if evaluation:
        statistics = torch.randn(x.shape[1], device=DEVICE), torch.rand(x.shape[1], device=DEVICE) + 0.3

    def f(x: Tensor, gamma: Tensor, beta: Tensor, r: Any, key: str, statistics: Any) -> Tensor:
        e = Epilogue(key, (), p)
        if statistics[0] is None:
            return call(BatchNormFunction, x, gamma, beta, r, seed, EPS, e)[0]
        return call(NormalizeFunction, x, gamma, beta, r, *statistics, seed, EPS, e)

    if key != "relu":
        assert torch.equal(f(*inputs_like(x), None, key, statistics) != 0, mask)
        launched.clear()
    make = lambda: inputs_like(made(layout), residual=x.dtype if residual else None)  # noqa: E731
    check(make, key, statistics, f, mask / (1 - p))
    assert launched, "the kernels ran"


@pytest.mark.parametrize(
    ("layout", "forward", "backward"),
    [
        ("rows", ["_forward_whole"], ["_backward_whole"]),
        ("planes", ["_forward_whole"], ["_backward_whole"]),
        ("split-rows", ["_statistics", "_merge", "_apply"], ["_reduce", "_finish", "_backward_apply"]),
        ("split-planes", ["_statistics", "_merge", "_apply"], ["_reduce", "_finish", "_backward_apply"]),
    ],
)
def test_which_kernels_run(layout: str, forward: list[str], backward: list[str], launched: list[str]) -> None:
    x = made(layout)
    gamma, beta = parameters(x, x.dtype)
    x.requires_grad_(), gamma.requires_grad_()
    y = ours(x, gamma, beta, None, "relu")
    assert launched == forward
    launched.clear()
    torch.autograd.grad(y.sum(), (x, gamma))
    assert launched == backward
    launched.clear()
    y = ours(x, gamma, beta, None, "relu", (torch.zeros_like(beta), torch.ones_like(beta)))
    torch.autograd.grad(y.sum(), (x, gamma), retain_graph=True)
    assert launched == ["_apply", "_reduce", "_finish"]
    launched.clear()
    # Frozen parameters, as in detection: dx alone takes no reduction.
    y = ours(x, gamma.detach(), beta, None, "relu", (torch.zeros_like(beta), torch.ones_like(beta)))
    torch.autograd.grad(y.sum(), x)
    assert launched == ["_apply", "_backward_apply"]


@pytest.mark.parametrize("layout", ["rows", "split-planes"])
def test_gradients_of_and_through_statistics(layout: str) -> None:
    x = made(layout)
    gamma, beta = parameters(x, x.dtype)
    mean, var = torch.randn_like(beta), torch.rand_like(beta) + 0.3
    dims = [0, *range(2, x.dim())]

    def kernel(*inputs):
        y, m, v = call(BatchNormFunction, *inputs[:4], None, EPS, Epilogue("gelu"))
        return y, m, v, call(NormalizeFunction, *inputs, None, EPS, Epilogue("silu"))

    def by_torch(x, gamma, beta, r, mean, var):
        mean, var, gamma, beta = (t.view(-1, *[1] * len(dims[1:])) for t in (mean, var, gamma, beta))
        z = F.silu(gamma * (x - mean) / (var + EPS).sqrt() + beta + r)
        return theirs(x, gamma.view(-1), beta.view(-1), r, "gelu"), x.mean(dims), x.var(dims, correction=0), z

    def gradients(f, *given):
        """Of y with its statistics, and of z."""
        inputs, sent = [t.detach().requires_grad_() for t in given[:6]], given[6:]
        y, m, v, z = f(*inputs)
        grads = torch.autograd.grad((y, m, v), inputs[:4], sent[:3]) + torch.autograd.grad(z, inputs, sent[3])
        return [t.detach() for t in (y, m, v, z, *grads)]

    def draw() -> list[Tensor]:
        given = [x, gamma, beta, torch.randn_like(x), mean, var]
        return [*given, torch.randn_like(x), torch.randn_like(mean), torch.randn_like(var), torch.randn_like(x)]

    ours, torchs = (functools.partial(gradients, f) for f in (kernel, by_torch))
    assert_as_good_as_torch(ours, torchs, draw, slack=lambda *given: of_sums(torchs, given), once=True)


def test_a_computed_again_y_is_the_rounded_one() -> None:
    """relu's output rounds to 0 in float16, so that f′ is 0, although z > 0."""
    x = torch.full((4, 2), 1e-9, device=DEVICE, dtype=torch.float32).add(torch.zeros(4, 2, device=DEVICE))
    x = (x * 1e9).to(torch.float16).requires_grad_()
    gamma = torch.full((2,), 1e-9, device=DEVICE)
    y = ours(x, gamma, None, None, "relu", (torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)))
    assert not y.any()
    beta = torch.zeros(2, device=DEVICE, requires_grad=True)
    y = ours(x, gamma, beta, None, "relu", (torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)))
    dx, dbeta = torch.autograd.grad(y.sum(), (x, beta))
    assert not dx.any()
    assert not dbeta.any()


@pytest.mark.parametrize("layout", ["rows", "split-planes"])
def test_a_row_in_evaluation_does_not_depend_on_the_batch(layout: str) -> None:
    x = made(layout)
    gamma, beta = parameters(x, x.dtype)
    statistics = torch.zeros_like(beta), torch.ones_like(beta)
    alone = ours(x[1:2].contiguous(), gamma, beta, None, "gelu", statistics)
    torch.testing.assert_close(ours(x, gamma, beta, None, "gelu", statistics)[1:2], alone, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_modules_keep_their_state(momentum: float | None) -> None:
    module = nn.BatchNorm2d(3, momentum=momentum, device=DEVICE)
    reference = torch.nn.BatchNorm2d(3, momentum=momentum, device=DEVICE)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5, device=DEVICE)
        torch.testing.assert_close(module(x), reference(x))
    torch.testing.assert_close(module.state_dict(), reference.state_dict())
    torch.testing.assert_close(module.eval()(x), reference.eval()(x))
