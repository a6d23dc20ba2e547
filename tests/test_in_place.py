"""Changing in place what a layer gave or was given: allowed, and refused, where torch.nn allows and refuses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, widest
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.activation import ACTIVATIONS

Form = Callable[..., Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(widest())


def last(*shape: int) -> Tensor:
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return randn(*shape).contiguous(memory_format=order)


def statistics() -> tuple[Tensor, Tensor]:
    return torch.zeros(3, dtype=widest()), torch.ones(3, dtype=widest())


def test_dense_and_linear_give_no_view() -> None:
    W, b = randn(3, 4).requires_grad_(), randn(3)
    for shape in ((4,), (2, 4), (2, 3, 4), (2, 2, 3, 4)):
        for x in (randn(*shape), randn(*shape).requires_grad_(), randn(*shape[:-1], 2, 4)[..., 0, :]):
            for bias in (b, None):
                for y in (bpF.linear(x, W, bias), bpF.dense(x, W, bias), bpF.dense(x, W, bias, activation="gelu")):
                    assert not y._is_view()
                    changed = (y * 1).detach()
                    y += 1
                    torch.testing.assert_close(y, changed + 1)
                    y.sum().backward()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_function_gives_back_a_view(case: Case) -> None:
    """Autograd refuses to change a view that a Function made."""
    outputs = case.ours(*(t.to(widest()).requires_grad_() for t in case.inputs()))
    for y in outputs if isinstance(outputs, tuple) else (outputs,):
        assert not y._is_view()
        y += 1


ON_IMAGES: dict[str, Form] = {
    "activation": lambda x: bpF.silu(x),
    "dropout": lambda x: bpF.dropout(x),
    "dropout2d": lambda x: bpF.dropout2d(x) if x.dim() == 4 else bpF.dropout3d(x),
    "alpha_dropout": lambda x: bpF.alpha_dropout(x, 0.5, True),
    "batch_norm": lambda x: bpF.batch_norm(x, *statistics(), training=True),
    "batch_norm evaluation": lambda x: bpF.batch_norm(x, *statistics()),
    "batch_norm_act": lambda x: bpF.batch_norm_act(x, *statistics(), residual=x, training=True, activation="gelu"),
    "batch_norm_act dropout": lambda x: bpF.batch_norm_act(x, *statistics(), training=True, activation="gelu", p=0.5),
    "residual": lambda x: bpF.residual(x, x, activation="relu", p=0.5),
    "softmax": lambda x: bpF.softmax(x, 1),
    "log_softmax": lambda x: bpF.log_softmax(x, 1),
    "mse_loss": lambda x: bpF.mse_loss(x, x.detach() + 1, reduction="none"),
}


@pytest.mark.parametrize("name", ON_IMAGES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("make", [randn, last])
def test_results_on_images_may_be_changed(name: str, shape: tuple[int, ...], make: Callable[..., Tensor]) -> None:
    x = make(*shape).requires_grad_()
    y = ON_IMAGES[name](x)
    assert not y._is_view()
    assert y.stride() == x.stride() or name in ("softmax", "log_softmax")
    y += 1
    y.mul_(2)
    if name not in ("softmax", "log_softmax", "residual"):  # refused in backward, as torch refuses it
        y.sum().backward()


class Changed(torch.nn.Module):
    """A layer, and what follows it in many models: ``y += x``."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += x
        return y.mul_(2)


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 4), (2, 3, 4)),
    "Dense": (lambda: nn.Dense(4, 4, activation="silu"), (2, 3, 4)),
    "MLP": (lambda: nn.MLP(4, [4], 4), (2, 3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 2)),
    "BatchNorm2d-eval": (lambda: nn.BatchNorm2d(3).eval(), (2, 3, 4, 2)),
    "LeakyReLU": (lambda: nn.LeakyReLU(), (2, 3, 4)),
    "Softplus": (lambda: nn.Softplus(), (2, 3, 4)),
    "Hardtanh": (lambda: nn.Hardtanh(), (2, 3, 4)),
    "Dropout-eval": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval(), (2, 3, 4)),
    "Dropout-0": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)), (2, 3, 4)),
}


@pytest.mark.one_backend("torch", "what compiles is the formulas")
@pytest.mark.parametrize("name", LAYERS)
def test_results_may_be_changed_where_compiled_and_exported(name: str) -> None:
    make, shape = LAYERS[name]
    model, x = Changed(make()), randn(*shape).float()
    exported = torch.export.export(model, (x,)).module()

    def step(f: Callable[..., Tensor]) -> list[Tensor]:
        given = x.clone().requires_grad_()
        y = f(given)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [given, *model.parameters()])]

    expected = step(model)
    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    torch.testing.assert_close(exported(x), expected[0])


def allowed(f: Form, *inputs: Tensor) -> list[bool]:
    """For each input and the output: whether backward runs after it was changed in place."""
    found = []
    for changed in range(len(inputs) + 1):
        given = [t.clone().requires_grad_() * 1 for t in inputs]
        y = f(*given)
        out = y * 1
        with torch.no_grad():
            [*given, y][changed].mul_(1)
        try:
            torch.autograd.grad(out.sum(), given)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            found.append(False)
        else:
            found.append(True)
    return found


@pytest.mark.parametrize("key", [key for key, row in ACTIVATIONS.items() if row.operator is not None])
def test_activations_allow_what_torch_allows(key: str) -> None:
    x, p, operator = randn(4, 3), tuple(ACTIVATIONS[key].parameters.values()), ACTIVATIONS[key].operator
    theirs = allowed(lambda x: operator(x, *p), x)
    if key == "tanhshrink":
        assert theirs == [True, True]
        theirs = [False, True]  # it keeps its input, and torch keeps tanh(x), which nobody else has
    assert allowed(lambda x: bpF.activation(x, key), x) == theirs


CLASSES = torch.tensor([0, 2, 1, 1])
FORMS: dict[str, tuple[Callable[[Any], Form], tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda f: f.linear, ((4, 5), (3, 5), (3,))),
    "linear 3d": (lambda f: f.linear, ((2, 4, 5), (3, 5), (3,))),
    "softmax": (lambda f: lambda x: f.softmax(x, 1), ((4, 3),)),
    "log_softmax": (lambda f: lambda x: f.log_softmax(x, 1), ((4, 3),)),
    "softmin": (lambda f: lambda x: f.softmin(x, 1), ((4, 3),)),
    "dropout": (lambda f: f.dropout, ((4, 3),)),
    "dropout2d": (lambda f: f.dropout2d, ((4, 3, 2, 2),)),
    "alpha_dropout": (lambda f: lambda x: f.alpha_dropout(x, 0.5, True), ((4, 3),)),
    "batch_norm": (lambda f: lambda x, g, b: f.batch_norm(x, *statistics(), g, b, training=True), ((4, 3), (3,), (3,))),
    "batch_norm evaluation": (lambda f: lambda x, g, b: f.batch_norm(x, *statistics(), g, b), ((4, 3), (3,), (3,))),
    "mse_loss": (lambda f: lambda x, t: f.mse_loss(x, t, reduction="none"), ((4, 3), (4, 3))),
    "l1_loss": (lambda f: lambda x, t: f.l1_loss(x, t, reduction="none"), ((4, 3), (4, 3))),
    "smooth_l1_loss": (lambda f: lambda x, t: f.smooth_l1_loss(x, t, reduction="none"), ((4, 3), (4, 3))),
    "huber_loss": (lambda f: lambda x, t: f.huber_loss(x, t, reduction="none"), ((4, 3), (4, 3))),
    "bce": (lambda f: f.binary_cross_entropy_with_logits, ((4, 3), (4, 3))),
    "nll_loss": (lambda f: lambda x: f.nll_loss(x, CLASSES), ((4, 3),)),
    "cross_entropy": (lambda f: lambda x: f.cross_entropy(x, CLASSES), ((4, 3),)),
}
OTHERWISE: dict[str, tuple[list[bool], list[bool]]] = {
    # Ours keeps x and t, torch another tensor of their size, sign(x - t).
    "l1_loss": ([False, False, True], [True, True, True]),
    # Ours keeps x and two numbers a row, torch all log-probabilities.
    "cross_entropy": ([False, True], [True, True]),
    "nll_loss": ([True, True], [False, True]),
}
"""What may be changed here, and with torch.nn, where they differ."""


@pytest.mark.parametrize("name", FORMS)
def test_functional_forms_allow_what_torch_allows(name: str) -> None:
    form, shapes = FORMS[name]
    inputs = [randn(*shape) for shape in shapes]
    ours, theirs = allowed(form(bpF), *inputs), allowed(form(F), *inputs)
    assert (ours, theirs) == OTHERWISE.get(name, (theirs, theirs))


@pytest.mark.parametrize("key", ["leaky_relu", "hardtanh", "relu6", "softplus", "logsigmoid", "hardshrink", "relu"])
def test_fused_layers_keep_their_output(key: str) -> None:
    """In exchange they keep no pre-activation: what is changed in place is refused, and never silently wrong."""
    x, W, b = randn(4, 5), randn(3, 5), randn(3)
    assert allowed(lambda *given: bpF.dense(*given, activation=key), x, W, b) == [False, False, True, False]


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.0, False), (1.0, False)])
def test_dropout_that_does_nothing_gives_its_input(p: float, training: bool) -> None:
    for form in (bpF.dropout, bpF.dropout3d, bpF.alpha_dropout, bpF.feature_alpha_dropout):
        x = randn(2, 3, 2, 2, 2).requires_grad_() * 1
        assert form(x, p, training) is x


DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


@pytest.mark.filterwarnings("ignore:.*dropout.d")
@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 2), (2, 3, 2, 2, 2), (2, 0, 4)], ids=str)
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (0.5, True), (1.0, True)])
def test_dropout_in_place_marks_its_input_as_torch_does(
    name: str, shape: tuple[int, ...], p: float, training: bool
) -> None:
    def outcome(form: Form, leaf: bool) -> Any:
        x = randn(*shape).requires_grad_()
        x = x if leaf else x * 1
        try:
            y = form(x, p, training, True)
        except RuntimeError:
            return RuntimeError
        return x._version > 0, y is x

    for leaf in (False, True):
        assert outcome(getattr(bpF, name), leaf) == outcome(getattr(F, name), leaf)
