"""Every module that has a torch.nn namesake is a drop-in replacement for it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import saved_bytes
from bp_torch import convert, nn
from bp_torch.functions.activation_table import ACTIVATIONS


@dataclass(frozen=True)
class ModuleCase:
    """How to make one module, and what to call it with."""

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (torch.randn(4, 3),)
    stochastic: bool = False
    """Draws random numbers in training: values are compared with torch's in evaluation mode alone."""

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items() if not isinstance(value, Tensor))
        return f"{self.name}({','.join(map(str, self.arguments))}{options})"


def images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def pair(target: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(4, 3), target())


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 1])


MODULES = {row.module: row.torch_module is not None for row in ACTIVATIONS.values() if row.module is not None}
"""The activations, and whether torch.nn has them."""

CASES = [
    *(ModuleCase(name, "ActivationFunction") for name, torchs in MODULES.items() if torchs),
    ModuleCase("LeakyReLU", "ActivationFunction", (0.3,)),
    ModuleCase("GELU", "ActivationFunction", ("tanh",)),
    ModuleCase("Softplus", "ActivationFunction", (2.0, 5.0)),
    ModuleCase("Linear", "LinearFunction", (3, 5)),
    ModuleCase("Linear", "LinearFunction", (3, 5), {"bias": False}),
    ModuleCase("Dropout", "DropoutFunction", (0.4,), stochastic=True),
    ModuleCase("Dropout1d", "DropoutFunction", (0.4,), inputs=images(2, 3, 4), stochastic=True),
    ModuleCase("Dropout2d", "DropoutFunction", (0.4,), inputs=images(2, 3, 4, 4), stochastic=True),
    ModuleCase("Dropout3d", "DropoutFunction", (0.4,), inputs=images(2, 3, 2, 2, 2), stochastic=True),
    ModuleCase("AlphaDropout", "AlphaDropoutFunction", (0.4,), stochastic=True),
    ModuleCase("FeatureAlphaDropout", "AlphaDropoutFunction", (0.4,), inputs=images(2, 3, 4), stochastic=True),
    ModuleCase("BatchNorm1d", "BatchNormFunction", (3,)),
    ModuleCase("BatchNorm1d", "BatchNormFunction", (3,), {"affine": False}),
    ModuleCase("BatchNorm1d", "BatchNormFunction", (3,), {"momentum": None}),
    ModuleCase("BatchNorm1d", "BatchNormFunction", (3,), {"track_running_stats": False}),
    ModuleCase("BatchNorm2d", "BatchNormFunction", (3,), inputs=images(2, 3, 4, 4)),
    ModuleCase("BatchNorm3d", "BatchNormFunction", (3,), inputs=images(2, 3, 2, 2, 2)),
    ModuleCase("Softmax", "SoftmaxFunction", (1,)),
    ModuleCase("Softmax2d", "SoftmaxFunction", inputs=images(2, 3, 2, 2)),
    ModuleCase("Softmin", "SoftmaxFunction", (1,)),
    ModuleCase("LogSoftmax", "LogSoftmaxFunction", (1,)),
    ModuleCase("CrossEntropyLoss", "CrossEntropyFunction", inputs=pair(classes)),
    ModuleCase(
        "CrossEntropyLoss",
        "CrossEntropyFunction",
        (),
        {"weight": torch.tensor([0.5, 1.0, 2.0]), "label_smoothing": 0.1, "ignore_index": 2, "reduction": "sum"},
        pair(classes),
    ),
    ModuleCase("NLLLoss", "NLLLossFunction", inputs=pair(classes)),
    ModuleCase("MSELoss", "ErrorLossFunction", inputs=pair(lambda: torch.randn(4, 3))),
    ModuleCase("L1Loss", "ErrorLossFunction", inputs=pair(lambda: torch.randn(4, 3))),
    ModuleCase("SmoothL1Loss", "ErrorLossFunction", (), {"beta": 0.5}, pair(lambda: torch.randn(4, 3))),
    ModuleCase("HuberLoss", "ErrorLossFunction", (), {"delta": 0.5}, pair(lambda: torch.randn(4, 3))),
    ModuleCase(
        "BCEWithLogitsLoss",
        "BCEWithLogitsFunction",
        (),
        {"pos_weight": torch.tensor([1.0, 2.0, 3.0])},
        pair(lambda: torch.rand(4, 3)),
    ),
]
OWN = [
    *(ModuleCase(name, "ActivationFunction") for name, torchs in MODULES.items() if not torchs),
    ModuleCase("Dense", "DenseFunction", (3, 5), {"activation": "gelu", "dropout": 0.5}, stochastic=True),
    ModuleCase("Dense", "DenseFunction", (3, 5), {"activation": "relu"}),
    ModuleCase("BatchNormAct1d", "BatchNormFunction", (3,), {"activation": "silu"}),
    ModuleCase("BatchNormAct1d", "BatchNormFunction", (3,), {"activation": "relu", "dropout": 0.4}, stochastic=True),
    ModuleCase("BatchNormAct2d", "BatchNormFunction", (3,), {"activation": "relu"}, images(2, 3, 4, 4)),
    ModuleCase("BatchNormAct3d", "BatchNormFunction", (3,), {"activation": "relu"}, images(2, 3, 2, 2, 2)),
    ModuleCase("DropoutAdd", "DropoutFunction", (0.4,), {}, lambda: (torch.randn(4, 3), torch.randn(4, 3)), True),
    ModuleCase("MLP", "DenseFunction", (3, [4, 4], 2)),
    ModuleCase("MLP", "BatchNormFunction", (3, [4, 4], 2), {"norm": "batch", "residual": True}),
    ModuleCase("MLP", "BatchNormFunction", (3, [4, 4], 2), {"norm": "batch", "dropout": 0.3}, stochastic=True),
    ModuleCase("MLP", "ResidualFunction", (3, [4, 4], 2), {"residual": True, "dropout": 0.3}, stochastic=True),
]
# Made of processes or of other modules: tested in their own files.
ELSEWHERE = {"DistributedBatchNorm", "SyncBatchNorm", "Residual", "L1Penalty", "L2Penalty", "ElasticNetPenalty"}

drop_in = pytest.mark.parametrize("case", CASES, ids=str)
any_module = pytest.mark.parametrize("case", [*CASES, *OWN], ids=str)
contract = pytest.mark.contract


def make(case: ModuleCase, namespace: Any, training: bool = True) -> Any:
    torch.manual_seed(0)
    return getattr(namespace, case.name)(*case.arguments, **case.options).train(training)


def inputs(case: ModuleCase) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    made = case.inputs()
    return (made[0].requires_grad_(), *made[1:])


def step(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output and every gradient."""
    torch.manual_seed(2)
    y = module(*given)
    torch.sin(y * 0.7).sum().backward()
    return (y, given[0].grad, *(p.grad for p in module.parameters()))


def test_every_module_has_a_case() -> None:
    assert set(nn._OURS) - ELSEWHERE == {case.name for case in [*CASES, *OWN]}


@contract("modules")
@drop_in
def test_is_its_namesake(case: ModuleCase) -> None:
    ours, theirs = make(case, nn), make(case, torch.nn)
    assert isinstance(ours, type(theirs))
    assert type(ours) is not type(theirs)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@contract("modules")
@drop_in
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_its_namesake_computes(case: ModuleCase, training: bool) -> None:
    if training and case.stochastic:
        pytest.skip("torch draws another mask")
    ours, theirs = make(case, nn, training), make(case, torch.nn, training)
    torch.testing.assert_close(step(ours, inputs(case)), step(theirs, inputs(case)))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@contract("modules")
@any_module
def test_deepcopy_pickle_and_checkpoint(case: ModuleCase) -> None:
    module = make(case, nn)
    module(*inputs(case))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(case, nn)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    expected = step(copy.deepcopy(module), inputs(case))
    for twin in (pickle.loads(pickle.dumps(module)), loaded):
        torch.testing.assert_close(step(twin, inputs(case)), expected, rtol=0, atol=0)


@contract("export, fx")
@any_module
def test_fx_traces_it_to_one_graph(case: ModuleCase) -> None:
    module = make(case, nn)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x)

        def forward2(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x, y)

    given = inputs(case)
    if len(given) == 2:
        Model.forward = Model.forward2  # type: ignore[method-assign]
    traced = torch.fx.symbolic_trace(Model().eval())
    module.eval()
    torch.testing.assert_close(traced(given[0], given[-1]), module(*given))


@contract("dtypes")
@drop_in
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_input", [False, True])
def test_autocast_gives_torchs_dtypes(
    case: ModuleCase, dtype: torch.dtype, low_input: bool, on_backend: str
) -> None:  # fmt: skip
    found = []
    for namespace in (nn, torch.nn):
        module = make(case, namespace, training=not case.stochastic)
        x, *rest = inputs(case)
        x = x.to(dtype) if low_input else x
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = module(x, *rest)
        y.float().sum().backward()
        found.append((y, x.grad, *(p.grad for p in module.parameters())))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
    ours, theirs = found[0][0], found[1][0]
    if on_backend == "triton" and low_input and isinstance(module, torch.nn.Tanhshrink):
        # Where torch rounds tanh to 16 bits before it subtracts, the kernel rounds the difference alone.
        exact = x.double() - x.double().tanh()
        rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(torch.float32).eps * x.abs()
        assert ((ours - exact).abs() <= rounding).all()
    else:
        torch.testing.assert_close(ours, theirs)


@contract("compile")
@pytest.mark.parametrize("case", OWN, ids=str)
def test_module_compiles_fullgraph(case: ModuleCase) -> None:
    module = make(case, nn, training=not case.stochastic)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, inputs(case)), step(module, inputs(case)))


@contract("memory", function="BatchNormFunction")
@pytest.mark.parametrize("norm", [True, False])
def test_a_hidden_layer_keeps_its_input_and_output_alone(norm: bool) -> None:
    """Bytes an element of float32 hidden layers with relu and dropout: 4 each for batch norm's input and for y."""
    rows, width = 256, 32
    layers: list[torch.nn.Module] = []
    for _ in range(2):
        layers += [torch.nn.Linear(width, width), *([torch.nn.BatchNorm1d(width)] if norm else [])]
        layers += [torch.nn.ReLU(), torch.nn.Dropout(0.3)]
    torchs = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))
    mlp = nn.MLP(width, [width, width], 2, norm="batch" if norm else None, dropout=0.3)
    x = torch.randn(rows, width)

    def kept(model: torch.nn.Module) -> float:
        return saved_bytes(lambda: model(x), (x, *model.parameters())) / (2 * rows * width)

    before = kept(torchs)
    for model in (convert(torchs), mlp):
        assert kept(model) <= (8.1 if norm else 4.1) < before - 4


@pytest.mark.parametrize("name", ["Conv2d", "Sequential", "Module", "Parameter", "LayerNorm", "init", "utils"])
def test_other_names_are_torchs_own(name: str) -> None:
    assert getattr(nn, name) is getattr(torch.nn, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        nn.NoSuchLayer  # noqa: B018
    with pytest.raises(AttributeError, match="no_such_function"):
        nn.functional.no_such_function  # noqa: B018


def test_star_import_gives_ours_and_torchs() -> None:
    names: dict[str, Any] = {}
    exec("from bp_torch.nn import *", names)
    assert names["Linear"] is nn.Linear
    assert names["Conv2d"] is torch.nn.Conv2d
