"""The residual connection against its parts in torch."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import torch_activation, widest, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.dropout import draw_mask

FUNCTION = "ResidualFunction"


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (y, *torch.autograd.grad(y, inputs, torch.cos(torch.arange(y.numel()).to(y)).reshape(y.shape)))


def parts(branch: Tensor, residual: Tensor, mask: Tensor | None, p: float, key: str) -> Tensor:
    if mask is not None:
        branch = branch * (mask.to(branch.dtype) / (1 - p)) if p < 1 else branch * 0
    return torch_activation(key)(residual + branch, *ACTIVATIONS[key].parameters.values())


@settings(max_examples=25)
@given(
    key=st.sampled_from(sorted(ACTIVATIONS)),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    training=st.booleans(),
    shape=st.lists(st.integers(0, 4), max_size=4),
    transposed=st.booleans(),
)
def test_residual_equals_its_parts(key: str, p: float, training: bool, shape: list[int], transposed: bool) -> None:
    branch = torch.randn(shape, dtype=widest())
    branch = (branch.mT.contiguous().mT if transposed and branch.dim() > 1 else branch).requires_grad_()
    residual = torch.randn(shape, dtype=widest(), requires_grad=True)
    torch.manual_seed(5)
    mask = written_out(draw_mask(branch, p), shape, p) if training and p else None
    torch.manual_seed(5)
    y = bpF.residual(branch, residual, activation=key, p=p, training=training)
    torch.testing.assert_close(
        gradients(y, branch, residual), gradients(parts(branch, residual, mask, p, key), branch, residual)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_dropout_add_equals_its_parts(p: float, training: bool) -> None:
    x, r = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    torch.manual_seed(2)
    mask = written_out(draw_mask(x, p), x.shape, p) if training and p else None
    module = nn.DropoutAdd(p).train(training)
    for form in (lambda: bpF.dropout_add(x, r, p, training), lambda: module(x, r)):
        torch.manual_seed(2)
        torch.testing.assert_close(gradients(form(), x, r), gradients(parts(x, r, mask, p, "identity"), x, r))


@pytest.mark.contract("dtypes", function=FUNCTION)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("key", ["identity", "relu", "gelu"])
def test_mixed_dtypes_give_torchs_dtypes(
    key: str, p: float, swapped: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    first, second = reversed(dtypes) if swapped else dtypes
    branch = torch.randn(4, 3).to(first).requires_grad_()
    residual = torch.randn(4, 3).to(second).requires_grad_()
    y = bpF.residual(branch, residual, activation=key, p=p)
    assert y.dtype == torch.promote_types(*dtypes)
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (branch, residual))] == [first, second]


@pytest.mark.contract("frozen", function=FUNCTION)
@pytest.mark.parametrize("key", ["identity", "relu", "gelu"])
def test_frozen_branch_keeps_no_mask(key: str, on_backend: str) -> None:
    mask = torch.int64 if on_backend == "triton" else torch.bool  # a seed, or the mask itself

    def saved(branch_needs: bool) -> list[torch.dtype]:
        found: list[torch.dtype] = []
        branch, residual = torch.randn(4, 3, requires_grad=branch_needs), torch.randn(4, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.dtype) or t, lambda t: t):
            bpF.residual(branch, residual, activation=key, p=0.5)
        return found

    assert mask in saved(True)
    assert mask not in saved(False)


@pytest.mark.contract("randomness", function=FUNCTION)
def test_gradient_agrees_with_the_output_under_a_checkpoint() -> None:
    block = nn.Residual(nn.Identity(), dropout=0.5)
    x = torch.ones(64, 64, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=False)  # 1, or 3 where the branch is kept
    torch.rand(3)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert set(y.unique().tolist()) == {1.0, 3.0}


def test_generator_decides_alone() -> None:
    x = torch.ones(32, 32)
    state = torch.get_rng_state()
    one, two = (bpF.dropout_add(x, x, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_relu_at_zero_and_nan() -> None:
    """relu′(0) = 0, and relu does not swallow NaN."""
    branch = torch.tensor([1.0, 1.0, math.nan], requires_grad=True)
    y = bpF.residual(branch, torch.tensor([-1.0, 1.0, 0.0]), activation="relu")
    assert y[:2].tolist() == [0.0, 2.0]
    assert y[2].isnan()
    y.sum().backward()
    assert branch.grad.tolist()[:2] == [0.0, 1.0]


def test_nothing_passed_in_is_overwritten() -> None:
    branch, residual = torch.randn(4, 3), torch.randn(4, 3)
    copies = branch.clone(), residual.clone()
    for p in (0.0, 0.5):
        with torch.no_grad():
            bpF.residual(branch, residual, activation="relu", p=p)
    assert torch.equal(branch, copies[0])
    assert torch.equal(residual, copies[1])


@pytest.mark.contract("modules", function=FUNCTION)
def test_residual_module() -> None:
    block = nn.Residual(nn.Linear(3, 3), "leaky_relu", 0.2, activation_parameters={"negative_slope": 0.3})
    assert list(block.state_dict()) == ["branch.weight", "branch.bias"]
    expected = "activation='leaky_relu', dropout=0.2, activation_parameters={'negative_slope': 0.3}"
    assert expected in repr(block)
    assert repr(nn.DropoutAdd(0.3)) == "DropoutAdd(p=0.3)"
    x = torch.randn(5, 3)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other.eval()(x), block.eval()(x))
    torch.testing.assert_close(block(x), torch.nn.functional.leaky_relu(x + block.branch(x), 0.3))
    compiled = torch.compile(block.train(), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert block.branch.weight.grad.abs().sum() > 0


def test_errors_name_the_argument() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"'residual'.*\(4, 3\).*got \(3,\)"):
        bpF.residual(x, torch.randn(3))
    with pytest.raises(RuntimeError, match=r"'input', \(4, 3\).*got \(4, 1\)"):
        nn.DropoutAdd()(x, torch.randn(4, 1))
    with pytest.raises(RuntimeError, match=r"\(4, 2\).*\(4, 3\)"):
        nn.Residual(nn.Linear(3, 2))(x)
    with pytest.raises(RuntimeError, match="'branch': expected a floating dtype"):
        bpF.residual(x.long(), x)
    with pytest.raises(RuntimeError, match="device"):
        bpF.residual(x, x.to("meta"))
    with pytest.raises(TypeError, match=r"'residual'.*got list"):
        bpF.residual(x, [1.0])
    for build in (lambda: nn.Residual(nn.Identity(), "swiglu"), lambda: bpF.residual(x, x, activation="swiglu")):
        with pytest.raises(ValueError, match=r"'activation'.*swiglu"):
            build()
    for build in (
        lambda: nn.Residual(nn.Identity(), dropout=1.5),
        lambda: nn.DropoutAdd(1.5),
        lambda: bpF.residual(x, x, p=1.5),
        lambda: bpF.dropout_add(x, x, 1.5),
    ):
        with pytest.raises(ValueError, match=r"between 0 and 1, got 1.5"):
            build()
