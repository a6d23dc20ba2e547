"""torch.func inside torch.compile: the derivatives of each Function are those that it has uncompiled.

Dynamo's own trace of a Function tells it that nothing needs a gradient where a transform differentiates, and records no
graph in its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Case
from test_contracts import FUNCTIONS, outputs, scalar
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

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
            found |= {f"{name}, parameters": transform(closed, inputs[:1]) for name, transform in TRANSFORMS.items()}
        return found

    return all_of_them


def representatives() -> list[Case]:
    """Of each Function two cases, the first and the last; of each activation's row one would test the row alone."""
    of_function = {function: [case for case in CASES if case.function == function] for function in FUNCTIONS}
    ends = [{cases[0].name: cases[0], cases[-1].name: cases[-1]} for cases in of_function.values()]
    return [case for cases in ends for case in cases.values()]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", representatives(), ids=str)
def test_compiled_derivatives(case: Case, backend: str) -> None:
    f = derivatives(case)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*case.inputs()), f(*case.inputs()))
