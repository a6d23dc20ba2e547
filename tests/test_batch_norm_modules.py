"""Batch normalization as torch.nn has it: state, repr, errors, traces, compiled and exported steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_batch_norm import ranked, step
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch import nn

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ONES, X = torch.ones(3), torch.ones(4, 3)
ERRORS: dict[str, tuple[Any, ...]] = {
    "not-a-tensor": ([1.0], ONES, ONES),
    "one-dimension": (torch.ones(3), ONES, ONES),
    "integers": (X.long(), ONES, ONES),
    "complex": (X + 0j, ONES, ONES),
    "mean-alone": (X, ONES, None, None, None, True),
    "no-statistics": (X, None, None),
    "no-mean": (X, None, ONES),
    "no-variance": (X, ONES, None),
    "mean-size": (X, torch.ones(4), torch.ones(4)),
    "weight-size": (X, ONES, ONES, torch.ones(4)),
    "bias-size": (X, ONES, ONES, ONES, torch.ones(2)),
    "weight-dtype": (X, ONES, ONES, ONES.double()),
    "low-weight": (X, ONES, ONES, ONES.bfloat16()),
    "mixed-parameters": (X.bfloat16(), ONES, ONES, ONES.bfloat16(), ONES.bfloat16()),
    "statistics-dtype": (X, ONES.double(), ONES.double()),
    "input-dtype": (X.double(), ONES, ONES),
    "device": (X, ONES.to("meta"), ONES.to("meta")),
    "one-row": (X[:1], ONES, ONES, None, None, True),
    "eps-zero": (X, None, None, None, None, True, 0.1, 0.0),
    "eps-negative": (X, ONES, ONES, None, None, False, 0.1, -1.0),
}


def test_counter_and_cumulative_average() -> None:
    """momentum=None: running statistics are means over all batches, which are counted."""
    bn = nn.BatchNorm1d(2, momentum=None).double()
    batches = [torch.randn(5, 2).double() + i for i in range(3)]
    for i, batch in enumerate(batches):
        bn(batch)
        assert bn.num_batches_tracked.item() == i + 1
    torch.testing.assert_close(bn.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), **EXACT)
    torch.testing.assert_close(bn.running_var, torch.stack([b.var(0) for b in batches]).mean(0), **EXACT)


@ranked
def test_one_value_a_channel_is_refused_in_training(rank: str, shape: tuple[int, ...]) -> None:
    """n/(n - 1) with n = 1."""
    x = torch.randn(1, 3, *[1] * (len(shape) - 2))
    for cls in (getattr(torch.nn, f"BatchNorm{rank}"), getattr(nn, f"BatchNorm{rank}")):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            cls(3)(x)
        assert cls(3).eval()(x).shape == x.shape


@pytest.mark.parametrize("args", ERRORS.values(), ids=ERRORS)
def test_refuses_what_torch_refuses(args: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as expected:
        F.batch_norm(*args)
    with pytest.raises(expected.type, match=r"batch_norm\(\): .*(expected|argument)"):
        bpF.batch_norm(*args)


def test_refuses_a_residual_of_another_shape_and_unknown_names() -> None:
    with pytest.raises(RuntimeError, match=r"'residual': expected shape \(4, 3\) of 'input', got \(1, 3\)"):
        bpF.batch_norm_act(X, None, None, None, None, X[:1], True)
    with pytest.raises(ValueError, match=r"'activation': expected one of identity, relu.*got 'rely'"):
        nn.BatchNormAct1d(3, activation="rely")
    with pytest.raises(ValueError, match=r"'activation_parameters': relu takes none, got 'slope'"):
        nn.BatchNormAct1d(3, activation="relu", activation_parameters={"slope": 1.0})


@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
def test_refuses_the_dimensions_that_torch_refuses(rank: str) -> None:
    for dims in range(1, 7):
        x = torch.randn([2, 3, 2, 2, 2, 2][:dims])
        theirs, ours = getattr(torch.nn, f"BatchNorm{rank}")(3), getattr(nn, f"BatchNorm{rank}")(3)
        allowed = dims in {"1d": (2, 3), "2d": (4,), "3d": (5,)}[rank]
        for bn in (theirs, ours):
            if allowed:
                bn(x)
            else:
                with pytest.raises(ValueError, match=rf"expected .* input \(got {dims}D input\)"):
                    bn(x)


def test_act_module_has_torchs_state_and_shows_its_activation() -> None:
    bn = nn.BatchNormAct2d(3, 1e-3, None, activation="leaky_relu", activation_parameters={"negative_slope": 0.2})
    assert isinstance(bn, (nn.BatchNorm2d, torch.nn.BatchNorm2d))
    torch.nn.BatchNorm2d(3).load_state_dict(bn.state_dict())
    assert repr(bn).endswith("activation='leaky_relu', activation_parameters={'negative_slope': 0.2})")
    x, r = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = F.leaky_relu(F.batch_norm(x, None, None, training=True, eps=1e-3) + r, 0.2)
    torch.testing.assert_close(copy.deepcopy(bn)(x, r), expected)


def test_traced_graph_moves_the_buffers_when_it_runs() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNormAct1d(3, momentum=None, activation="relu")

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            return self.bn(x, r)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert model.bn.num_batches_tracked == 0
    x, r = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(traced(x, r), copy.deepcopy(model)(x, r))
    assert traced.bn.num_batches_tracked == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_step_compiles_to_one_graph(backend: str, momentum: float | None) -> None:
    module = nn.BatchNormAct2d(3, momentum=momentum, activation="gelu").double()
    compiled = torch.compile(copy.deepcopy(module), backend=backend, fullgraph=True)
    for _ in range(2):
        x, dy = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
        torch.testing.assert_close(step(compiled._orig_mod, x, dy), step(module, x, dy))
        results = []
        for f in (compiled, module):
            leaf = x.clone().requires_grad_()
            f(leaf).backward(dy)
            results.append((leaf.grad, f.running_mean, f.running_var, f.num_batches_tracked))
        torch.testing.assert_close(*results)


def test_lazy_batch_norm_is_torchs() -> None:
    assert nn.LazyBatchNorm1d is torch.nn.LazyBatchNorm1d


def test_exported_training_detaches_the_statistics() -> None:
    model = torch.nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    program = torch.export.export(model, (torch.randn(6, 3),)).module()
    for _ in range(2):
        program(torch.randn(6, 3)).sum().backward()
    assert not any(buffer.requires_grad for buffer in program.buffers())
