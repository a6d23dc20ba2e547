"""Derivatives inside and of compiled code: those of each Function are what they are uncompiled, or are refused.

Dynamo's own trace of a Function tells it that nothing needs a gradient where a transform differentiates, and records no
graph in its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from case_runs import leaves, outputs, run, scalar
from cases import CASES, Case
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import bp_torch
import bp_torch.functional as bpF

ONE_BACKEND = "while compiling, the torch formulas run whatever the backend"

Transform = Callable[[Callable[..., Any], tuple[Tensor, ...]], Any]


def everywhere(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def vjp_of(f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    ys, pull = vjp(lambda *i: outputs(f(*i)), *inputs)
    return pull(tuple(torch.cos(y) for y in ys))


def two_samples(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = inputs
    return torch.stack([x, 0.9 * x]), *rest


TRANSFORMS: dict[str, Transform] = {
    "grad": lambda f, inputs: grad(scalar(f), everywhere(inputs))(*inputs),
    "vjp": vjp_of,
    "jacrev": lambda f, inputs: jacrev(f, everywhere(inputs))(*inputs),
    "jacfwd": lambda f, inputs: jacfwd(f, everywhere(inputs))(*inputs),
    "hessian": lambda f, inputs: hessian(scalar(f))(*inputs),
    "vmap(grad)": lambda f, inputs: vmap(grad(scalar(f)), (0, *(None for _ in inputs[1:])))(*two_samples(inputs)),
    "jvp": lambda f, inputs: jvp(f, inputs, tuple(torch.cos(t) for t in inputs)),
}


def derivatives(case: Case) -> Callable[..., dict[str, Any]]:
    """Every transform, by all inputs; and by the first one where the others are captured, as a model's parameters."""
    x, *others = case.inputs()
    parameters = [torch.nn.Parameter(t) for t in others]

    def closed(x: Tensor) -> Any:
        return case.ours(x, *parameters)

    def all_of_them(*inputs: Tensor) -> dict[str, Any]:
        found = {name: transform(case.ours, inputs) for name, transform in TRANSFORMS.items()}
        if parameters:
            reverse = ["grad", "jacrev", "vmap(grad)"]  # where Dynamo could think that nothing needs a gradient
            if case.function == "PenaltyFunction":
                reverse.remove("vmap(grad)")  # torch's generated vmap refuses saved None: see below
            found |= {f"{name}, parameters": TRANSFORMS[name](closed, inputs[:1]) for name in reverse}
        return found

    return all_of_them


def representatives() -> list[Case]:
    """Of each Function the last case, which has the most parts."""
    return list({case.function: case for case in CASES}.values())


each_function = pytest.mark.parametrize("case", representatives(), ids=lambda case: case.function)


@pytest.mark.contract("compile")
@each_function
def test_compiled_derivatives(case: Case) -> None:
    """All in one graph, because compiling takes the time."""
    f = derivatives(case)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.inputs()), f(*case.inputs()))


def test_per_sample_gradients_of_a_penalty_beside_captured_parameters() -> None:
    """An error of torch's generated vmap, in AOTAutograd alone; no wrong number."""
    case = next(case for case in CASES if case.name == "penalty-elastic-net")
    x, *others = case.inputs()
    parameters = [torch.nn.Parameter(t) for t in others]
    f = vmap(grad(lambda x: scalar(case.ours)(x, *parameters)))
    x = torch.stack([x, x])
    torch.testing.assert_close(torch.compile(f, backend="eager")(x), f(x))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="_add_batch_dim"):
        torch.compile(f, backend="aot_eager")(x)


@pytest.mark.filterwarnings("ignore:.*_prims_common.check. is deprecated:FutureWarning")  # of inductor's own code
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dense-gelu-dropout-residual", "linear"])
def test_compiled_derivatives_by_other_compilers(name: str, backend: str) -> None:
    case = next(case for case in CASES if case.name == name)
    f = derivatives(case)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*case.inputs()), f(*case.inputs()))


@pytest.mark.contract("compile")
@each_function
def test_gradient_penalty_of_compiled_code(case: Case) -> None:
    """Right where autograd runs what Dynamo found, and refused where AOTAutograd made one operator of it."""

    def penalty(f: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        inputs = leaves(case)
        first = torch.autograd.grad(scalar(f)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    compiled = torch.compile(case.ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(penalty(compiled), penalty(case.ours))
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(compiled)


def test_compiled_training_step_of_a_model() -> None:
    """By torch.func, and by a captured model's input: parameters of the last layer, and of batch norm."""
    model = torch.nn.Sequential(
        bp_torch.nn.Linear(3, 4), bp_torch.nn.BatchNormAct1d(4, track_running_stats=False, activation="tanh")
    )
    model.append(bp_torch.nn.Linear(4, 2))
    x, t = torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(parameters: dict[str, Tensor], x: Tensor) -> tuple[Any, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return bpF.cross_entropy(torch.func.functional_call(model, parameters, (x,)), t)

        return grad(loss)(parameters), grad(lambda x: model(x).square().sum())(x)

    expected = step(parameters, x)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(step, backend=backend)(parameters, x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_transform_outside_of_compiled_code(backend: str) -> None:
    x, W = torch.randn(4, 3), torch.nn.Parameter(torch.randn(2, 3))

    def f(x: Tensor) -> Tensor:
        return bpF.linear(x, W).sin().sum()

    torch.testing.assert_close(grad(torch.compile(f, backend=backend))(x), grad(f)(x))


def test_sizes_stay_symbols() -> None:
    """Whatever a Function does with a size, another size needs no other graph."""
    for case in representatives():
        if case.batch_dim is None or not case.empty:
            continue
        torch._dynamo.reset()
        x, *others = leaves(case)
        x = torch.cat([x, x, x], case.batch_dim).detach().requires_grad_()
        torch._dynamo.mark_dynamic(x, case.batch_dim)  # an error where the size became a constant
        run(torch.compile(case.ours, fullgraph=True, backend="aot_eager"), (x, *others))


def test_compiled_code_notices_the_batch_invariant_mode() -> None:
    x, W = torch.randn(4, 3), torch.randn(2, 3)
    compiled = torch.compile(lambda x: bpF.linear(x, W), backend="aot_eager", fullgraph=True)
    compiled(x)
    with (
        bp_torch.batch_invariant(),
        pytest.raises(Exception, match=r"batch_invariant\(\): expected ordinary tensors in eager mode"),
    ):
        compiled(x)
