"""Every contract, for every case of the table; those of transforms are in test_contracts_transforms.py."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import device
import pytest
import torch
from case_runs import contract, every_case, inputs_of, leaves, outputs, run, scalar, upstream
from cases import CASES, Case, on_device
from exact import assert_as_good_as_torch, cancelled, carried
from seeds import other_inputs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import bp_torch
import bp_torch.functions
from bp_torch import triton_kernels as kernels
from bp_torch.backends import current_backend
from bp_torch.functions.function import Function

ONE_BACKEND = "its own fixture `backend` runs every case on both"

every_backend = pytest.mark.parametrize(
    "backend", ["torch", "triton", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)  # fmt: skip
WITH_KERNELS = {
    "ActivationBackwardFunction",
    "ActivationFunction",
    "BCEWithLogitsFunction",
    "BatchNormFunction",
    "CrossEntropyFunction",
    "CrossEntropyProbabilitiesFunction",
    "DenseFunction",
    "LinearFunction",
    "DropoutFunction",
    "ErrorLossFunction",
    "LogSoftmaxFunction",
    "MLPFunction",
    "NLLLossFunction",
    "NormalizeFunction",
    "PenaltyFunction",
    "ResidualFunction",
    "SoftmaxFunction",
}
"""The Functions that have Triton kernels: the others run the same formulas whatever the backend."""
LOW = [torch.float32, torch.bfloat16, torch.float16]
"""dtypes and the relative error of one rounding."""


@dataclass(frozen=True)
class Setting:
    """One way to run a case: the torch formulas in float64, or the kernels in float32."""

    name: str
    dtype: torch.dtype

    def on(self, case: Case) -> Case:
        return on_device("cuda")[case.name] if self.name == "gpu" else case


@pytest.fixture
def backend(request: pytest.FixtureRequest, case: Case) -> Iterator[Setting]:
    name = request.param
    if name == "torch":
        yield Setting(name, torch.float64)
        return
    if case.function not in WITH_KERNELS:
        pytest.skip("no kernels: the torch formulas run")
    if name == "triton" and device.DEVICE == "cuda":
        pytest.skip("the kernels run on the GPU here, not in the interpreter")
    # Left to itself a dense layer may take torch's product, which shows nothing about the kernel's.
    with bp_torch.backend("triton"), kernels.dense.using("triton"):
        yield Setting(name, torch.float32)


def closeness(case: Case, backend: Setting) -> dict[str, float]:
    """In float64 nearly all digits, so that a constant that went through float32 shows."""
    # torch's backward of celu holds 1/α in float32.
    return {"rtol": 1e-10, "atol": 1e-11} if backend.dtype == torch.float64 and "celu" not in case.name else {}


@contract("backward")
@every_case
@every_backend
def test_equals_torch(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    ours, our_grads = run(case.ours, leaves(case, backend.dtype))
    theirs, their_grads = run(case.theirs, leaves(case, backend.dtype))
    torch.testing.assert_close(ours, theirs, **closeness(case, backend))
    torch.testing.assert_close(our_grads, their_grads, **closeness(case, backend))


@contract("backward")
@every_case
def test_gradcheck(case: Case) -> None:
    assert gradcheck(case.ours, leaves(case), check_undefined_grad=True)


@contract("double backward")
@every_case
def test_gradgradcheck(case: Case) -> None:
    assert gradgradcheck(case.ours, leaves(case))


@contract("double backward")
@every_case
@every_backend
def test_gradient_penalty_equals_torch(case: Case, backend: Setting) -> None:
    """In float64 by its digits; in float32 as near to float64 as torch is, for here roundings add up."""
    case = backend.on(case)

    def penalty(f: Callable[..., Any], *given: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(t.detach().requires_grad_() for t in given)
        first = torch.autograd.grad(scalar(f)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    def in_two_steps(f: Callable[..., Any], *given: Tensor) -> tuple[Tensor, ...]:
        """As autograd takes them where f is one Function: through its gradient, then through its result, and the sum.

        torch adds what reaches the z between two of its layers before it goes on, so that the layer before never sees
        the two large parts of a small sum. A Function of both has no such z.
        """
        inputs = tuple(t.detach().requires_grad_() for t in given)
        ys = outputs(f(*inputs))
        slopes = torch.autograd.grad(sum(torch.sin(y * 0.7).sum() for y in ys), ys, create_graph=True)
        dys = tuple(dy.detach().requires_grad_() for dy in slopes)
        first = torch.autograd.grad(ys, inputs, dys, create_graph=True)
        size = sum((g**2).sum() for g in first)
        direct = torch.autograd.grad(size, (*inputs, *dys), retain_graph=True, materialize_grads=True)
        through = torch.autograd.grad(slopes, inputs, direct[len(inputs) :])
        return tuple(a + b for a, b in zip(direct, through, strict=False))

    if backend.dtype == torch.float64:
        ours, theirs = (penalty(f, *case.inputs()) for f in (case.ours, case.theirs))
        torch.testing.assert_close(ours, theirs, **closeness(case, backend))
        return
    draws = itertools.count()

    def draw() -> tuple[Tensor, ...]:
        with other_inputs(next(draws)):
            return inputs_of(case, backend.dtype)

    def slack(*given: Tensor) -> list[Tensor | float]:
        """Two roundings of each number that goes in: a sum may have large parts in one order and none in another."""
        terms = carried(functools.partial(penalty, case.theirs), given)
        return [torch.finfo(torch.float32).eps * t + lost_in_tails(case, given[0]) for t in terms]

    ours, theirs = functools.partial(penalty, case.ours), functools.partial(in_two_steps, case.theirs)
    assert_as_good_as_torch(ours, theirs, draw, slack=slack)


def lost_in_tails(case: Case, x: Tensor) -> Tensor | float:
    """What an activation's formula, on which the exact answer rests, loses in float64, times derivatives up to 4."""
    activation, _, key = case.name.partition("-")
    return 4 * cancelled(key, x) if activation == "activation" else 0.0


@contract("checkpoint")
@every_case
@every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case: Case, backend: Setting, reentrant: bool) -> None:
    case = backend.on(case)
    recomputed = run_backward(
        lambda *i: checkpoint(case.ours, *i, use_reentrant=reentrant), leaves(case, backend.dtype)
    )
    torch.testing.assert_close(recomputed, run_backward(case.ours, leaves(case, backend.dtype)))


def run_backward(f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    ys = outputs(f(*inputs))
    torch.autograd.backward(ys, upstream(ys))
    return [t.grad for t in inputs]


@contract("dtypes")
@every_case
@every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_at_most_twice_torch(case: Case, backend: Setting, dtype: torch.dtype) -> None:
    """Of each output and gradient, against float64 at the same (rounded) inputs, which are others in each draw."""
    case, draws = backend.on(case), itertools.count()
    count = len(case.inputs())

    def draw() -> tuple[Tensor, ...]:
        with other_inputs(next(draws)):
            rounded = inputs_of(case, dtype)
        return *rounded, *(dy.to(dtype) for dy in upstream(outputs(case.theirs(*rounded))))

    def both(f: Callable[..., Any], *given: Tensor) -> list[Tensor]:
        """Outputs and gradients."""
        inputs, dys = tuple(t.detach().requires_grad_() for t in given[:count]), given[count:]
        ys = outputs(f(*inputs))
        grads = torch.autograd.grad(ys, inputs, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)])
        return [t.detach() for t in (*ys, *grads)]

    def slack(*given: Tensor) -> list[Tensor | float]:
        """Statistics, and gradients of parameters in the kernels, are sums over rows in float32, as ATen's batch norm
        has them; torch's side of a case has them summed in float64. Two roundings of each term are allowed besides.
        """
        ys = outputs(case.theirs(*given[:count]))
        float32 = [y.dtype == torch.float32 for y in ys] + [t.dtype == torch.float32 for t in given[:count]]
        smaller = [t.numel() < given[0].numel() for t in (*ys, *given[:count])]
        in_float32 = [True] * len(ys) + [current_backend() == "triton"] * count
        sums = [all(which) for which in zip(float32, smaller, in_float32, strict=True)]
        terms = carried(functools.partial(both, case.theirs), given) if any(sums) else [0.0] * len(sums)
        lost = lost_in_tails(case, given[0])
        return [torch.finfo(torch.float32).eps * t if is_sum else lost for t, is_sum in zip(terms, sums, strict=True)]

    ours, theirs = (functools.partial(both, f) for f in (case.ours, case.theirs))
    assert_as_good_as_torch(ours, theirs, draw, slack=slack)


def sliced(t: Tensor) -> Tensor:
    """The same values as every other element of a larger buffer that is otherwise NaN."""
    if t.dim() == 0:
        return t.clone()
    buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[..., 1::2]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The same values, stored in the reverse order of dimensions."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


@contract("layouts")
@every_case
@every_backend
@pytest.mark.parametrize("layout", [sliced, transposed])
def test_strided_inputs_and_gradients(case: Case, backend: Setting, layout: Callable[[Tensor], Tensor]) -> None:
    case = backend.on(case)
    plain = leaves(case, backend.dtype)
    ys, grads = run(case.ours, plain)
    awkward = tuple(layout(t.detach()).requires_grad_() for t in plain)
    awkward_ys = outputs(case.ours(*awkward))
    awkward_grads = torch.autograd.grad(awkward_ys, awkward, tuple(layout(dy) for dy in upstream(ys)))
    torch.testing.assert_close(awkward_ys, ys)
    torch.testing.assert_close(awkward_grads, grads)


@contract("layouts")
@every_case
@every_backend
def test_zero_stride_gradients(case: Case, backend: Setting) -> None:
    """What ``.sum().backward()`` sends."""
    case = backend.on(case)
    ours, theirs = leaves(case, backend.dtype), leaves(case, backend.dtype)
    sum(y.sum() for y in outputs(case.ours(*ours))).backward()
    sum(y.sum() for y in outputs(case.theirs(*theirs))).backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


@contract("layouts")
@every_case
@every_backend
def test_zero_stride_inputs(case: Case, backend: Setting) -> None:
    """Every input is one row, expanded."""
    case = backend.on(case)

    def expanded() -> tuple[Tensor, ...]:
        return tuple(
            t[:1].expand(t.shape).requires_grad_() if t.dim() else t.requires_grad_()
            for t in inputs_of(case, backend.dtype)
        )

    torch.testing.assert_close(run(case.ours, expanded()), run(case.theirs, expanded()))


@contract("edges")
@every_case
@every_backend
def test_empty_batch(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    if not case.empty or case.batch_dim is None:
        pytest.skip("the case has a fixed batch, or torch refuses an empty one")
    x, *rest = inputs_of(case, backend.dtype)

    def inputs() -> tuple[Tensor, ...]:
        return tuple(t.clone().requires_grad_() for t in (x.narrow(case.batch_dim, 0, 0), *rest))

    torch.testing.assert_close(run(case.ours, inputs()), run(case.theirs, inputs()), equal_nan=True)


@contract("edges")
@every_case
@every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_pass_as_torch_passes_them(case: Case, backend: Setting, value: float) -> None:
    case = backend.on(case)

    def poisoned() -> tuple[Tensor, ...]:
        x, *rest = inputs_of(case, backend.dtype)
        x.view(-1)[1] = value
        return x, *rest

    ours, theirs = case.ours(*poisoned()), case.theirs(*poisoned())
    if abs(value) == float("inf") and "gelu" in case.name and backend.name == "triton":
        # torch's vectorized CPU kernel gives NaN for gelu(inf), its CUDA kernel inf.
        theirs = torch.where(theirs.isnan() & ours.isposinf(), ours, theirs)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@contextlib.contextmanager
def expect_in_place_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            pytest.fail(f"another error: {error}")
        raise


@contract("safety")
@every_case
@every_backend
def test_in_place_change_is_refused_or_harmless(case: Case, backend: Setting) -> None:
    """After an input or an output was overwritten, backward raises or still gives the right gradient."""
    case = backend.on(case)
    right = run(case.ours, leaves(case, backend.dtype))[1]
    count = len(inputs_of(case, backend.dtype))
    for changed in range(count + 1):
        roots = leaves(case, backend.dtype)
        inputs = tuple(t * 1 for t in roots)
        ys = outputs(case.ours(*inputs))
        dys = upstream(ys)
        # The copy keeps backward's start independent of the tensor that is overwritten.
        out = tuple(y * 1 for y in ys)
        with torch.no_grad():
            (inputs[changed] if changed < count else ys[0]).add_(7.0)
        grads = None
        with contextlib.suppress(RuntimeError), expect_in_place_error():
            grads = torch.autograd.grad(out, roots, dys)
        if grads is not None:
            torch.testing.assert_close(grads, right)


@contract("safety")
@every_case
@every_backend
def test_nothing_passed_in_is_overwritten(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    inputs = leaves(case, backend.dtype)
    ys = outputs(case.ours(*inputs))
    kept = [y.detach().clone() for y in ys]
    dys = upstream(ys)
    sent = [dy.clone() for dy in dys]
    torch.autograd.grad(ys, inputs, dys)
    torch.testing.assert_close(list(inputs), list(inputs_of(case, backend.dtype)), rtol=0, atol=0)
    torch.testing.assert_close(list(dys), sent, rtol=0, atol=0)
    torch.testing.assert_close(list(ys), kept, rtol=0, atol=0)


@contract("safety")
@every_case
@every_backend
def test_second_backward_agrees(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    inputs = leaves(case, backend.dtype)
    ys = outputs(case.ours(*inputs))
    first = torch.autograd.grad(ys, inputs, upstream(ys), retain_graph=True)
    second = torch.autograd.grad(ys, inputs, upstream(ys))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@contract("frozen")
@every_case
@every_backend
def test_each_choice_of_frozen_inputs(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    full = run(case.ours, leaves(case, backend.dtype))[1]
    count = len(inputs_of(case, backend.dtype))
    for chosen in itertools.product([False, True], repeat=count):
        inputs = tuple(t.requires_grad_(need) for t, need in zip(inputs_of(case, backend.dtype), chosen, strict=True))
        if not any(chosen):
            assert not any(y.requires_grad for y in outputs(case.ours(*inputs)))
            continue
        grads = run(case.ours, inputs)[1]
        expected = tuple(g for g, need in zip(full, chosen, strict=True) if need)
        torch.testing.assert_close(grads, expected)


@contract("determinism")
@every_case
@every_backend
def test_same_bits_again(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    reference = run(case.ours, leaves(case, torch.float32))
    for _ in range(3):
        torch.testing.assert_close(run(case.ours, leaves(case, torch.float32)), reference, rtol=0, atol=0)


def saved_bytes(f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> int:
    """Bytes of the storages kept for backward beyond inputs and outputs, which the neighbours keep anyway."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = f(*inputs)
    for t in (*inputs, *outputs(result)):
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@contract("memory")
@every_case
@every_backend
def test_saves_no_more_than_torch(case: Case, backend: Setting) -> None:
    case = backend.on(case)
    assert saved_bytes(case.ours, leaves(case, backend.dtype)) <= saved_bytes(case.theirs, leaves(case, backend.dtype))


def test_every_function_has_cases() -> None:
    """Those that need processes are tested in test_sync_batch_norm.py."""
    for module in pkgutil.iter_modules(bp_torch.functions.__path__):
        importlib.import_module(f"bp_torch.functions.{module.name}")
    functions = {f.__name__ for f in Function.__subclasses__() if f.__module__.startswith("bp_torch.")}
    assert functions - {"AllReduceFunction", "SyncStatisticsFunction"} == {case.function for case in CASES}
