"""Tensors with a ``__torch_function__`` of their own, and nested tensors, get torch's functions, which they know."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import bp_torch
import bp_torch.functional as bpF
from bp_torch import nn


class Knowing(Tensor):
    """Refuses what torch does not have, and computes on plain tensors: what is ours would not be."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(getattr(func, "__module__", "")).startswith("bp_torch"):
            raise TypeError(f"no implementation of {func}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(Tensor):
    """With Tensor's own rule."""


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, b, r = t(3, 5), t(3, seed=1), t(4, 3, seed=2)
classes = torch.tensor([0, 4, 2, 1])
ACTIVATIONS = [name for name in bpF._activation.__all__ if name != "activation"]
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(bpF, name) for name in ACTIVATIONS},
    **{name: partial(getattr(bpF, name), target=t(4, 5)) for name in ("mse_loss", "l1_loss", "huber_loss")},
    "smooth_l1_loss": lambda x: bpF.smooth_l1_loss(x, t(4, 5), beta=0.5),
    "activation": lambda x: bpF.activation(x, "elu", {"alpha": 0.5}),
    "gelu-tanh": lambda x: bpF.gelu(x, "tanh"),
    "linear": lambda x: bpF.linear(x, W, b),
    "dense": lambda x: bpF.dense(x, W, b, r, activation="leaky_relu", activation_parameters={"negative_slope": 0.2}),
    "mlp": lambda x: bpF.mlp(x, [W, t(2, 3)], [b, None], activation="tanh"),
    "batch_norm": lambda x: bpF.batch_norm(x, None, None, t(5), None, True),
    "batch_norm_act": lambda x: bpF.batch_norm_act(x, None, None, None, t(5), t(4, 5), True, activation="silu"),
    "residual": lambda x: bpF.residual(x, t(4, 5), activation="gelu"),
    "dropout_add": lambda x: bpF.dropout_add(x, t(4, 5), training=False),
    "dropout": lambda x: bpF.dropout(x, 0.5, False),
    "softmax": lambda x: bpF.softmax(x, 1),
    "log_softmax": lambda x: bpF.log_softmax(x, 0),
    "softmin": lambda x: bpF.softmin(x, 1),
    "cross_entropy": lambda x: bpF.cross_entropy(x, classes, label_smoothing=0.1),
    "nll_loss": lambda x: bpF.nll_loss(x, classes, t(5).abs(), reduction="sum"),
    "binary_cross_entropy_with_logits": lambda x: bpF.binary_cross_entropy_with_logits(x, t(4, 5).sigmoid()),
    "l1_penalty": lambda x: bpF.l1_penalty([x, W], 0.1),
    "l2_penalty": lambda x: bpF.l2_penalty([x, W], 0.1),
    "elastic_net_penalty": lambda x: bpF.elastic_net_penalty([x, W], 0.1, 0.3),
}


@pytest.mark.one_backend("torch", "torch's operators")
@pytest.mark.parametrize("name", FORMS)
def test_a_subclass_with_a_rule_of_its_own(name: str) -> None:
    x = t(4, 5, seed=3).requires_grad_()
    y = FORMS[name](x.as_subclass(Knowing))
    expected = FORMS[name](x)
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    for a, e in zip(*(torch.autograd.grad(z.sum(), x) for z in (y, expected)), strict=True):
        torch.testing.assert_close(a.as_subclass(Tensor), e)


@pytest.mark.one_backend("torch", "torch's operators")
@pytest.mark.parametrize("name", [n for n in bpF.__all__ if n not in FORMS and n != "sync_batch_norm"])
def test_a_subclass_draws_torchs_mask(name: str) -> None:
    x = t(4, 5, 3) if name in ("dropout1d", "feature_alpha_dropout", "alpha_dropout") else t(4, 5, 3, 2)
    x = t(4, 5, 3, 2, 2) if name == "dropout3d" else x
    torch.manual_seed(0)
    expected = getattr(F, name)(x, 0.5, True)
    torch.manual_seed(0)
    torch.testing.assert_close(getattr(bpF, name)(x.as_subclass(Knowing), 0.5, True).as_subclass(Tensor), expected)
    with pytest.raises(RuntimeError, match=f"{name}\\(\\): 'generator': expected None .* got Generator"):
        getattr(bpF, name)(x.as_subclass(Knowing), 0.5, True, generator=torch.Generator())


@pytest.mark.one_backend("torch", "a transform runs the formulas")
@pytest.mark.parametrize("name", FORMS)
def test_functionalize(name: str) -> None:
    """torch takes no custom Function there."""
    x = t(4, 5, seed=3)

    def loss(x: Tensor) -> Tensor:
        return torch.func.functionalize(FORMS[name])(x).square().sum()

    torch.testing.assert_close(torch.func.functionalize(FORMS[name])(x), FORMS[name](x))
    expected = torch.func.grad(lambda x: FORMS[name](x).square().sum())(x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.functionalize(torch.func.grad(loss))(x), expected)


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_and_a_subclass_with_tensors_rule_get_ours() -> None:
    x = t(4, 5).requires_grad_()
    with Functions() as mode:
        y = bpF.linear(x, W, b)
        bpF.relu(x)
    assert [f for f in mode.seen if str(f.__module__).startswith("bp_torch")] == [bpF.linear, bpF.activation]
    assert "LinearFunction" in y.grad_fn.name()
    y = bpF.linear(x.as_subclass(Plain), W, b)
    assert type(y) is Plain
    assert "LinearFunction" in str([node[0] for node in y.grad_fn.next_functions] + [y.grad_fn])


@pytest.mark.one_backend("torch", "runs nothing")
def test_torch_fx_sees_one_call_with_all_arguments() -> None:
    graph = torch.fx.symbolic_trace(lambda x, r: bpF.residual(x, residual=r, activation="elu")).graph
    x, r, call, _ = graph.nodes
    assert call.target is bpF.residual
    assert call.args == (x, r)
    rest = {"activation": "elu", "activation_parameters": None, "p": 0.0, "training": True, "generator": None}
    assert call.kwargs == rest


@pytest.mark.one_backend("torch", "runs nothing")
@pytest.mark.parametrize("name", bpF.__all__)
def test_a_form_is_what_its_source_says(name: str) -> None:
    form = getattr(bpF, name)
    assert pickle.loads(pickle.dumps(form)) is form
    assert form.__doc__
    signature = inspect.signature(form)
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    if hasattr(F, name):  # and ours may have a generator beside
        theirs = inspect.signature(getattr(F, name)).parameters if inspect.isfunction(getattr(F, name)) else {}
        ours = {key: p.default for key, p in signature.parameters.items() if key != "generator"}
        assert list(theirs) in ([], list(ours))
        with pytest.raises(TypeError, match=f"^{name}\\(\\) got an unexpected keyword argument 'inptu'"):
            form(inptu=t(2))


WARNING: dict[str, Callable[[], Tensor]] = {
    "softmax": lambda: bpF.softmax(t(2, 3)),
    "mse_loss": lambda: bpF.mse_loss(t(2, 3), t(3)),
    "l1_loss": lambda: bpF.l1_loss(t(3), t(3), size_average=False),
    "huber_loss": lambda: bpF.huber_loss(t(3), t(3), reduction="elementwise_mean"),
    "cross_entropy": lambda: bpF.cross_entropy(t(4, 5), classes, reduce=True),
    "dropout2d": lambda: bpF.dropout2d(t(4, 5)),
    "dropout3d": lambda: bpF.dropout3d(t(4, 5)),
}


@pytest.mark.one_backend("torch", "the other warns of float64")
@pytest.mark.parametrize("name", WARNING)
def test_a_warning_names_the_place_of_the_call(name: str, recwarn: pytest.WarningsRecorder) -> None:
    WARNING[name]()
    (warning,) = recwarn
    assert (warning.filename, warning.lineno) == (__file__, WARNING[name].__code__.co_firstlineno)


class Quantized(Tensor):
    """A weight of whole numbers and a scale that knows F.linear alone, as those of quantization packages."""

    @staticmethod
    def __new__(cls, whole: Tensor, scale: float) -> Quantized:
        made: Quantized = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)
        made.whole, made.scale = whole, scale
        return made

    whole: Tensor
    scale: float

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.whole * weight.scale, *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale)
        raise NotImplementedError(f"no implementation of {func}")


@pytest.mark.parametrize("name", ["Linear", "Dense", "converted", "fused"])
def test_a_weight_that_knows_linear_alone(name: str) -> None:
    if name == "Linear":
        model: torch.nn.Module = nn.Linear(5, 3)
    elif name == "Dense":
        model = nn.Dense(5, 3, activation="gelu")
    else:
        model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.GELU(), torch.nn.Dropout(0.5)).eval()
        bp_torch.convert(model, fuse=name == "fused")
    layer: Any = model[0] if isinstance(model, torch.nn.Sequential) else model
    whole = torch.arange(15).reshape(3, 5) - 7
    layer.weight = torch.nn.Parameter(Quantized(whole, 0.25), requires_grad=False)
    x = torch.randn(4, 5, requires_grad=True)
    z = F.linear(x, whole * 0.25, layer.bias)
    expected = z if name == "Linear" else F.gelu(z)
    y = model(x)
    torch.testing.assert_close(y, expected)
    for a, e in zip(*(torch.autograd.grad(o.sum(), [x, layer.bias]) for o in (y, expected)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["Linear", "Dense", "Sequential", "MLP"])
def test_torchs_per_sample_gradients(name: str) -> None:
    models: dict[str, Callable[[], torch.nn.Module]] = {
        "Linear": lambda: nn.Linear(5, 3),
        "Dense": lambda: nn.Dense(5, 3, activation="gelu"),
        "Sequential": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        "MLP": lambda: nn.MLP(5, [4, 4], 3, activation="silu"),
    }
    model, x = models[name](), torch.randn(4, 5)
    call_for_per_sample_grads(model, loss_reduction="sum")(x).square().sum().backward()
    for i in range(4):
        expected = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(model.parameters()))
        for parameter, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad_sample[i], e)  # type: ignore[attr-defined]


NESTED: dict[str, Callable[[Any], torch.nn.Module]] = {
    "Linear": lambda m: m.Linear(6, 4),
    "no bias": lambda m: m.Linear(6, 4, bias=False),
    "ReLU": lambda m: m.ReLU(),
    "GELU": lambda m: m.GELU(),
    "SiLU": lambda m: m.SiLU(),
    "Softmax": lambda m: m.Softmax(-1),
    "Dropout": lambda m: m.Dropout(0.5),
    "Sequential": lambda m: m.Sequential(m.Linear(6, 4), m.ReLU(), m.Dropout(0.1), m.Linear(4, 6)),
}


def nested(layout: torch.layout) -> Tensor:
    parts = [t(3, 6).float(), t(5, 6, seed=1).float()]
    return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)


def values(y: Tensor) -> list[Tensor]:
    return [part.detach() for part in y.unbind()]


def nested_step(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    y = model(x)
    (dx, *others) = torch.autograd.grad(sum(part.square().sum() for part in y.unbind()), [x, *model.parameters()])
    return [*values(y), *values(dx), *others]


LAYOUTS = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
PROTOTYPE = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


@LAYOUTS
@PROTOTYPE
@pytest.mark.parametrize("name", NESTED)
def test_nested_tensors(name: str, layout: torch.layout) -> None:
    theirs, ours, fused = (NESTED[name](m) for m in (torch.nn, nn, torch.nn))
    fused = bp_torch.convert(torch.nn.Sequential(fused))[0]
    expected = nested_step(theirs, nested(layout))
    for model in (ours, fused):
        model.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(nested_step(model, nested(layout)), expected)


@LAYOUTS
@PROTOTYPE
def test_nested_tensors_through_our_own_layers(layout: torch.layout) -> None:
    """They are the sum of their parts."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = [
        nn.Dense(6, 6, activation="gelu"),
        nn.MLP(6, [6, 6], 6),
        nn.Residual(nn.Linear(6, 6), activation="relu"),
    ]
    for layer in layers:
        ours = nested_step(layer, nested(layout))
        parts = [part.detach().requires_grad_() for part in nested(layout).unbind()]
        ys = [layer(part) for part in parts]
        grads = torch.autograd.grad(sum(y.square().sum() for y in ys), [*parts, *layer.parameters()])
        torch.testing.assert_close(ours, [*(y.detach() for y in ys), *grads])
    x = nested(layout)
    W = t(6, 6).float()
    y = bpF.mlp(x, [W, W], activation="tanh")
    torch.testing.assert_close(values(y), [F.linear(F.linear(part, W).tanh(), W) for part in values(x)])
    y = bpF.dense(x, W, residual=x, activation="relu", p=0.5, training=False)
    torch.testing.assert_close(values(y), [F.linear(part, W).relu() + part for part in values(x)])
