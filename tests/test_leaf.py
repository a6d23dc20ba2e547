"""Modules stay modules in a graph that torch.fx traces, as torch.nn's do, with their mode and their buffers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import bp_torch
from bp_torch import nn
from bp_torch.nn._leaf import Leaf

DROPOUT: dict[str, torch.nn.Module] = {
    "Dropout": nn.Dropout(0.5),
    "Dropout1d": nn.Dropout1d(0.5),
    "AlphaDropout": nn.AlphaDropout(0.5),
    "FeatureAlphaDropout": nn.FeatureAlphaDropout(0.5),
    "Dense": nn.Dense(4, 4, activation="relu", dropout=0.5),
    "Residual": nn.Residual(nn.Linear(4, 4), dropout=0.5),
    "MLP": nn.MLP(4, [8, 8], 4, dropout=0.5, residual=True),
    "MLP with batch norm": nn.MLP(4, [8, 8], 4, dropout=0.5, norm="batch", residual=True),
    "converted": bp_torch.convert(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4))
    ),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_mode_is_that_of_the_traced_model(name: str) -> None:
    x = torch.randn(6, 4)
    model = torch.nn.Sequential(copy.deepcopy(DROPOUT[name]))
    traced = torch.fx.symbolic_trace(model)  # in training mode
    for training in (False, True):
        outputs = []
        for m in (model, traced):
            torch.manual_seed(0)
            outputs.append(m.train(training)(x))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert not torch.equal(traced(x), traced(x))


def test_second_input() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = nn.DropoutAdd(0.5)
            self.dense = nn.Dense(4, 4, dropout=0.5)
            self.norm = nn.BatchNormAct1d(4, activation="relu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.add(self.dense(x, residual=x), x), residual=x)

    x, model = torch.randn(6, 4), Model()
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 3
    torch.testing.assert_close(traced.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # torch.jit's, of what it records and that it is deprecated
def test_jit_trace_of_batch_norm() -> None:
    x, model = torch.randn(6, 4), nn.BatchNorm1d(4).eval()
    traced = torch.jit.trace(model, x)  # raises if a second trace, without gradients, differs
    torch.testing.assert_close(traced(x), model(x))


NAMES = [name for name in nn.__all__ if isinstance(getattr(nn, name), type) and issubclass(getattr(nn, name), Leaf)]
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("Linear", "Dense"), (4, 4)),
    **{name: (4,) for name in NAMES if "BatchNorm" in name},
    **dict.fromkeys(("L1Penalty", "L2Penalty", "ElasticNetPenalty"), (0.1,)),
    "Residual": (torch.nn.Linear(4, 4),),
}


class Around(torch.nn.Module):
    """A model that calls one module, which it finds under its name, twice."""

    def __init__(self, package: Any, name: str) -> None:
        super().__init__()
        self.inner = getattr(package, name)(*ARGUMENTS.get(name, ()))
        self.more = name.endswith("Loss") or name == "DropoutAdd"

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return (self.inner(x, t), self.inner(x, t)) if self.more else (self.inner(x), self.inner(t))


@pytest.mark.parametrize("name", NAMES)
def test_graph_has_torchs_nodes(name: str) -> None:
    ours = str(torch.fx.symbolic_trace(Around(nn, name)).graph)
    assert ours.count("call_module[target=inner]") == 2
    assert "call_function" not in ours
    if hasattr(torch.nn, name):
        assert ours == str(torch.fx.symbolic_trace(Around(torch.nn, name)).graph)


def test_a_users_class_is_traced_through() -> None:
    """As one that is derived from torch's: its forward may do more than ours."""

    class Twice(nn.Dropout):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    x, model = torch.randn(3, 4), torch.nn.Sequential(Twice(0.5)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert not any(node.op == "call_module" for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), 2 * x)


def test_copies_are_leaves_of_their_own_class() -> None:
    for linear in (copy.deepcopy(nn.Linear(4, 4)), pickle.loads(pickle.dumps(nn.Linear(4, 4)))):
        assert type(linear) is nn.Linear
        assert "call_module[target=0]" in str(torch.fx.symbolic_trace(torch.nn.Sequential(linear)).graph)


def test_what_torch_does_with_leaves_is_the_tracers_choice() -> None:
    class Through(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
            return False

    graph = Through().trace(torch.nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert not any(node.op == "call_module" for node in graph.nodes)
