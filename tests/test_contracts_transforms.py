"""The contracts of what transforms a call, for every case: forward mode, torch.func, torch.compile, export."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from case_runs import contract, every_case, leaves, outputs, run, scalar, upstream
from cases import CASES, Case
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

ONE_BACKEND = "in float64 and under transforms the torch formulas run"


@contract("forward mode")
@every_case
def test_forward_mode_and_batched(case: Case) -> None:
    assert gradcheck(
        case.ours, leaves(case), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@contract("forward mode")
@every_case
def test_forward_over_reverse(case: Case) -> None:
    inputs = leaves(case)
    assert gradgradcheck(
        case.ours, inputs, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@contract("forward mode")
@every_case
def test_all_tangents_at_once_are_those_one_by_one(case: Case) -> None:
    """gradcheck's come one by one, so that how a rule adds them up does not show there."""
    inputs = case.inputs()
    tangents = upstream(inputs)

    def along(*chosen: int) -> tuple[Tensor, ...]:
        def f(*moved: Tensor) -> tuple[Tensor, ...]:
            at = dict(zip(chosen, moved, strict=True))
            return outputs(case.ours(*(at.get(i, t) for i, t in enumerate(inputs))))

        return jvp(f, tuple(inputs[i] for i in chosen), tuple(tangents[i] for i in chosen))[1]

    one_by_one = [along(i) for i in range(len(inputs))]
    for at_once, terms in zip(along(*range(len(inputs))), zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(at_once, sum(terms))


@contract("forward mode")
@every_case
def test_the_tangent_of_an_upstream_gradient(case: Case) -> None:
    """Where no input has one, forward knows nothing of it: the gradient's is that of a backward by itself."""
    inputs = leaves(case)
    with forward_ad.dual_level():
        ys = outputs(case.ours(*inputs))
        dys = upstream(ys)
        tangents = tuple(torch.cos(dy) for dy in dys)
        moved = tuple(forward_ad.make_dual(dy, t) for dy, t in zip(dys, tangents, strict=True))
        pulled = torch.autograd.grad(ys, inputs, moved, retain_graph=True)
        found = [forward_ad.unpack_dual(g).tangent for g in pulled]
    torch.testing.assert_close(found, list(torch.autograd.grad(ys, inputs, tangents)))


@contract("torch.func")
@every_case
def test_the_gradient_by_one_input_alone(case: Case) -> None:
    inputs, f = case.inputs(), scalar(case.ours)
    whole = grad(f, tuple(range(len(inputs))))(*inputs)
    for i, expected in enumerate(whole):
        torch.testing.assert_close(grad(f, i)(*inputs), expected)


@contract("torch.func")
@every_case
def test_nested_transforms(case: Case) -> None:
    inputs = case.inputs()
    f = scalar(case.ours)
    expected = hessian(scalar(case.theirs))(*inputs)
    for outer, inner in itertools.product((jacrev, jacfwd), repeat=2):
        torch.testing.assert_close(outer(inner(f))(*inputs), expected)


@contract("torch.func")
@every_case
def test_per_sample_gradients(case: Case) -> None:
    if case.batch_dim is None:
        pytest.skip("the case is not independent along a dimension")
    x, *rest = case.inputs()
    dim = case.batch_dim

    def loss(sample: Tensor, *others: Tensor) -> Tensor:
        return scalar(case.ours)(sample.unsqueeze(dim), *others)

    wanted = tuple(range(1 + len(rest)))
    ours = vmap(grad(loss, wanted), in_dims=(dim, *(None for _ in rest)))(x, *rest)
    one_by_one = [grad(loss, wanted)(sample, *rest) for sample in x.unbind(dim)]
    for got, expected in zip(ours, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@contract("compile")
@every_case
def test_compile_aot_eager(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, leaves(case)), run(case.ours, leaves(case)))


FUNCTIONS = sorted({case.function for case in CASES})


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [pytest.param(f, marks=contract("compile", function=f)) for f in FUNCTIONS]
)  # fmt: skip
def test_compile_inductor(function: str) -> None:
    """All cases of a Function in one graph."""
    cases = [case for case in CASES if case.function == function]
    counts = [len(case.inputs()) for case in cases]

    def together(*flat: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        start = 0
        for case, count in zip(cases, counts, strict=True):
            results += outputs(case.ours(*flat[start : start + count]))
            start += count
        return tuple(results)

    def inputs() -> tuple[Tensor, ...]:
        return tuple(t for case in cases for t in leaves(case))

    torch._dynamo.reset()
    compiled = torch.compile(together, fullgraph=True, backend="inductor")
    torch.testing.assert_close(run(compiled, inputs()), run(together, inputs()))


@contract("export, fx")
@every_case
def test_export(case: Case) -> None:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return case.ours(*inputs)

    exported = torch.export.export(Model(), case.inputs())
    torch.testing.assert_close(exported.module()(*case.inputs()), case.ours(*case.inputs()))
