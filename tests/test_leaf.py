"""A module whose output depends on its mode stays a module in a graph that torch.fx traces, as torch.nn's do."""

from __future__ import annotations

import copy

import pytest
import torch

import bp_torch
from bp_torch import nn

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
