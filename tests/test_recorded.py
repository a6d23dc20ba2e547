"""What torch.export, torch.jit.trace and torch.compile make of these layers: torch's nodes, in one graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

import bp_torch
import bp_torch.functional as bpF
from bp_torch import nn

ONE_BACKEND = "what is recorded is the formulas"

MODULES: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
    "Linear": (torch.nn.Linear(4, 4), (2, 3, 4)),
    "BatchNorm1d": (torch.nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (torch.nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "Dropout": (torch.nn.Dropout(), (3, 4)),
    "Dropout2d": (torch.nn.Dropout2d(), (2, 3, 4, 4)),
    "AlphaDropout": (torch.nn.AlphaDropout(), (3, 4)),
    "Hardsigmoid": (torch.nn.Hardsigmoid(), (3, 4)),
    "Softmax": (torch.nn.Softmax(1), (3, 4)),
    "Sequential": (torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Dropout()), (3, 4)),
}


def nodes(module: torch.nn.Module, x: Tensor) -> list[str]:
    return [str(n.target) for n in torch.export.export(module, (x,)).graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_exported_nodes_are_torchs(name: str, training: bool) -> None:
    """So that others find and fold them: ONNX a batch norm into the convolution before it."""
    module, shape = MODULES[name]
    module = copy.deepcopy(module).train(training)
    x = torch.randn(shape)
    expected = nodes(module, x)
    converted = bp_torch.convert(copy.deepcopy(module), fuse=not training)
    if not training:
        expected = [node for node in expected if "dropout" not in node]
    assert [node for node in nodes(converted, x) if training or "dropout" not in node] == expected
    if not training:
        torch.testing.assert_close(torch.export.export(converted, (x,)).module()(x), module(x))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and tracing warns of the shape checks
@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(),
        nn.AlphaDropout(),
        nn.Dense(16, 16, dropout=0.5),
        nn.Dense(16, 16, activation="relu", dropout=0.5),
        nn.BatchNormAct1d(16, activation="relu", dropout=0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_traced_dropout_draws_anew(layer: torch.nn.Module) -> None:
    traced = torch.jit.trace(layer, torch.randn(8, 16), check_trace=False)
    x = torch.randn(5, 16)
    assert traced(x).shape == (5, 16)
    assert not torch.equal(traced(x), traced(x))


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager", **options)


def test_compiled_where_eager_mode_warns() -> None:
    """A warning would break the graph."""
    x, t = torch.randn(2, 3, 4), torch.randn(3, 4)
    for f in (
        lambda x, t: bpF.dropout2d(x),
        lambda x, t: bpF.dropout3d(x),
        lambda x, t: bpF.softmax(x),
        lambda x, t: bpF.mse_loss(x, t),
        lambda x, t: bpF.l1_loss(x, x + 1, size_average=False),
    ):
        with pytest.warns(UserWarning, match="dimension|target size|size_average"):
            expected = f(x, t)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert compiled(f)(x, t).shape == expected.shape


@pytest.mark.parametrize("module", [nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)], ids=str)
def test_compiled_alpha_dropout_of_any_size(module: torch.nn.Module) -> None:
    f = compiled(module, dynamic=True)
    for rows in (64, 65):
        x = torch.randn(rows, 60, 5, requires_grad=True)
        y = f(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert abs(float((dx == 0).float().mean()) - 0.3) < 0.05
        torch.testing.assert_close(y[dx == 0], y[dx == 0][:1].expand(int((dx == 0).sum())))


@pytest.mark.parametrize("loss", ["nll_loss", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_class_losses_of_one_row_without_values(loss: str, reduction: str) -> None:
    """With class weights; where a tensor has no values, no index may be read from one."""
    x, t, w = torch.randn(4), torch.tensor(2), torch.rand(4)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
            return getattr(bpF, loss)(x, t, w, reduction=reduction)

    expected = getattr(F, loss)(x, t, w, reduction=reduction)
    torch.testing.assert_close(torch.export.export(Model(), (x, t, w)).module()(x, t, w), expected)
    torch.testing.assert_close(compiled(Model())(x, t, w), expected)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (x, t, w)]
        assert Model()(fakes[0].requires_grad_(), *fakes[1:]).shape == ()
    y = Model()(x.to("meta").requires_grad_(), t.to("meta"), w.to("meta"))
    y.backward()
    assert y.shape == ()
