"""MLP: what it builds, that it computes what torch.nn's layers compute, and how it is configured."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import jsonargparse
import pytest
import torch
from cases import torch_activation, widest
from exact import assert_as_good_as_torch
from torch import Tensor

from bp_torch import nn
from bp_torch.functions.activation import ACTIVATIONS

WIDTHS = [6, 6, 4]


def by_torch(mlp: nn.MLP, x: Tensor, key: str, norm: str | None, residual: bool) -> Tensor:
    """The same network of torch's operators, without dropout, on ``mlp``'s parameters."""
    F, state = torch.nn.functional, dict(mlp.named_parameters())

    def f(z: Tensor) -> Tensor:
        return torch_activation(key)(z, *ACTIVATIONS[key].parameters.values())

    for index in range(1, len(WIDTHS) + 1):
        own = {name.split(".", 1)[1]: p for name, p in state.items() if name.startswith(f"hidden{index}.")}
        block = residual and index > 1 and WIDTHS[index - 1] == WIDTHS[index - 2]
        if norm:
            z = F.linear(x, own["linear.weight"])
            z = F.batch_norm(z, None, None, own["norm.weight"], own["norm.bias"], training=True)
        else:
            prefix = "branch." if block else ""
            z = F.linear(x, own[prefix + "weight"], own.get(prefix + "bias"))
        x = f(x + z) if block else f(z)
    return F.linear(x, state["output.weight"], state.get("output.bias"))


@pytest.mark.parametrize("key", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torchs_layers(key: str, norm: str | None, residual: bool, bias: bool) -> None:
    mlp = nn.MLP(5, WIDTHS, 3, activation=key, norm=norm, residual=residual, bias=bias, dtype=widest())

    in_double = copy.deepcopy(mlp).double()

    def results(f: Callable[[nn.MLP, Tensor], Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
        """y and the gradients of x and of each parameter."""
        model, x = in_double if x.dtype == torch.float64 else mlp, x.detach().requires_grad_()
        y = f(model, x)
        return [y, *torch.autograd.grad(y, [x, *model.parameters()], dy)]

    def ours(x: Tensor, dy: Tensor) -> list[Tensor]:
        return results(lambda model, x: model(x), x, dy)

    def theirs(x: Tensor, dy: Tensor) -> list[Tensor]:
        return results(lambda model, x: by_torch(model, x, key, norm, residual), x, dy)

    def draw(rows: int = 128) -> tuple[Tensor, Tensor]:
        # Of few rows a batch's variance may be near 0, where luck decides how far off float32 is.
        return torch.randn(rows, 5, dtype=widest()), torch.randn(rows, 3, dtype=widest())

    if widest() == torch.float64:
        given = draw(7)
        torch.testing.assert_close(ours(*given), theirs(*given))
    else:
        assert_as_good_as_torch(ours, theirs, draw)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("residual", [False, True])
def test_dropout_acts_in_every_hidden_layer_and_in_training_alone(norm: str | None, residual: bool) -> None:
    options = {"norm": norm, "residual": residual, "activation": "tanh"}
    mlp, plain = nn.MLP(5, WIDTHS, 3, dropout=0.5, **options), nn.MLP(5, WIDTHS, 3, **options)
    plain.load_state_dict(mlp.state_dict())
    x = torch.randn(64, 5)
    for index in range(1, len(WIDTHS) + 1):
        layer, other = mlp.get_submodule(f"hidden{index}"), plain.get_submodule(f"hidden{index}")
        torch.manual_seed(index)
        y, again, bare = layer(x), layer(x), other(x)
        assert not torch.equal(y, again)
        if not (residual and index == 2):
            low, high = (int(y.numel() * share) for share in (0.35, 0.65))
            assert low < int((y == 0).sum()) < high
            torch.testing.assert_close(y[y != 0], 2 * bare[y != 0])
        else:  # dropout comes before the sum
            dropped = torch.isclose(y, torch.tanh(x))
            assert 0.35 < dropped.double().mean() < 0.65
        x = bare.detach()
    x = torch.randn(8, 5)
    plain.load_state_dict(mlp.state_dict())  # batch norm has seen more in training
    torch.testing.assert_close(mlp.eval()(x), plain.eval()(x))
    assert torch.equal(mlp(x), mlp(x))


def test_hidden_layers_without_norm_are_one_function_each() -> None:
    mlp = nn.MLP(5, WIDTHS, 3, dropout=0.1)
    assert [type(layer) for layer in mlp] == [nn.Dense, nn.Dense, nn.Dense, nn.Linear]
    node, names = mlp(torch.randn(2, 5)).grad_fn, []
    while node is not None:
        names.append(type(node).__name__)
        node = next((n for n, _ in node.next_functions if n is not None and "Accumulate" not in type(n).__name__), None)
    assert names == ["LinearFunctionBackward", *["DenseFunctionBackward"] * 3]


@pytest.mark.contract("frozen", function="DenseFunction")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_frozen_first_layer(norm: str | None) -> None:
    """The input needs no gradient and the first layer is frozen: the others' gradients are as before."""
    mlp = nn.MLP(5, WIDTHS, 3, norm=norm)
    x = torch.randn(7, 5)
    mlp(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in mlp.named_parameters()}
    mlp.zero_grad()
    mlp.get_submodule("hidden1").requires_grad_(False)
    mlp(x).sum().backward()
    for name, p in mlp.named_parameters():
        if name.startswith("hidden1."):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, expected[name])


def test_widths() -> None:
    assert repr(nn.MLP(4, 8, 2)) == repr(nn.MLP(4, [8], 2)) == repr(nn.MLP(4, (8,), 2))
    assert list(nn.MLP(4, [], 2).state_dict()) == ["output.weight", "output.bias"]
    shapes = [tuple(p.shape) for p in nn.MLP(4, [3, 2], 1, bias=False).parameters()]
    assert shapes == [(3, 4), (2, 3), (1, 2)]
    assert nn.MLP(4, [3], 2)(torch.randn(2, 5, 4)).shape == (2, 5, 2)
    assert nn.MLP(4, [3], 2)(torch.randn(0, 4)).shape == (0, 2)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("residual", [False, True])
def test_checkpoint_names_do_not_depend_on_dropout_or_activation(norm: str | None, residual: bool) -> None:
    names = {
        tuple(nn.MLP(5, WIDTHS, 3, norm=norm, residual=residual, dropout=p, activation=f).state_dict())
        for p in (0.0, 0.3)
        for f in ("relu", "gelu", None)
    }
    assert len(names) == 1


def test_repr_shows_the_configuration() -> None:
    assert repr(nn.MLP(4, [3], 2, activation="gelu", dropout=0.1)) == (
        "MLP(\n"
        "  (hidden1): Dense(in_features=4, out_features=3, bias=True, activation='gelu', dropout=0.1)\n"
        "  (output): Linear(in_features=3, out_features=2, bias=True)\n"
        ")"
    )


def test_slice_copy_pickle() -> None:
    mlp = nn.MLP(5, WIDTHS, 3, norm="batch", residual=True, dropout=0.2).eval()
    x = torch.randn(7, 5)
    features = mlp[:-1]
    assert features[0] is mlp[0]
    torch.testing.assert_close(mlp[-1](features(x)), mlp(x))
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert torch.equal(other(x), mlp(x))


@pytest.mark.contract("compile", function="ResidualFunction")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_compiled(norm: str | None) -> None:
    mlp = nn.MLP(5, WIDTHS, 3, norm=norm, residual=True, dropout=0.2, activation="gelu")
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 5)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in mlp.parameters())
    torch.testing.assert_close(compiled.eval()(x), mlp.eval()(x))


@pytest.mark.contract("compile", function="ResidualFunction")
@pytest.mark.parametrize("residual", [False, True])
def test_compiled_for_any_batch_size(residual: bool) -> None:
    mlp = nn.MLP(5, [6, 6, 6], 3, residual=residual, dropout=0.2, activation="gelu")
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (7, 4):
        compiled(torch.randn(rows, 5)).sum().backward()
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled.eval()(x), mlp.eval()(x))


@pytest.mark.contract("export, fx", function="ResidualFunction")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_exported_and_traced(norm: str | None) -> None:
    mlp, x = nn.MLP(5, WIDTHS, 3, norm=norm, residual=True, dropout=0.2), torch.randn(7, 5)
    traced = torch.fx.symbolic_trace(copy.deepcopy(mlp))
    torch.manual_seed(1)
    expected = copy.deepcopy(mlp)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(x), expected)
    mlp.eval()
    exported = torch.export.export(mlp, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(exported.module()(x[:4]), mlp(x[:4]))


def test_device_and_dtype() -> None:
    for norm in (None, "batch"):
        mlp = nn.MLP(5, WIDTHS, 3, norm=norm, residual=True, device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in mlp.parameters()} == {("meta", torch.float64)}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, [3], 2), {}, ValueError, "'in_features': expected a positive width, got 0"),
        ((4, [3, -1], 2), {}, ValueError, r"'hidden_features\[1\]': expected a positive width, got -1"),
        ((4, -3, 2), {}, ValueError, r"'hidden_features\[0\]'"),
        ((4, [3], 0), {}, ValueError, "'out_features'"),
        ((4.0, [3], 2), {}, TypeError, "'in_features': expected an integer, got 4.0"),
        ((4, [3.5], 2), {}, TypeError, r"'hidden_features\[0\]': expected an integer, got 3.5"),
        ((4, "33", 2), {}, TypeError, "'hidden_features': expected an integer or a sequence"),
        ((4, 3.5, 2), {}, TypeError, "'hidden_features': expected an integer or a sequence"),
        ((4, [True], 2), {}, TypeError, r"'hidden_features\[0\]'"),
        ((4, True, 2), {}, TypeError, r"'hidden_features\[0\]'"),
        ((4, [3], None), {}, TypeError, "'out_features'"),
        ((4, [3], 2), {"activation": "rleu"}, ValueError, "'activation'.*rleu"),
        (
            (4, [3], 2),
            {"activation_parameters": (0.1,)},
            TypeError,
            "'activation_parameters': expected a mapping.*tuple",
        ),
        ((4, [3], 2), {"activation_parameters": {"slope": 1}}, ValueError, "'activation_parameters'.*slope"),
        ((4, [3], 2), {"dropout": 1.5}, ValueError, "'dropout'.*got 1.5"),
        ((4, [3], 2), {"norm": "layer"}, ValueError, "'norm': expected None or 'batch', got 'layer'"),
    ],
)
def test_bad_arguments(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"MLP\(\): " + message):
        nn.MLP(*arguments, **options)


def test_configured_from_yaml() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(nn.MLP, "mlp")
    text = (
        "mlp: {in_features: 4, hidden_features: [8, 8], out_features: 2, activation: leaky_relu, norm: batch, "
        "dropout: 0.1, residual: true, activation_parameters: {negative_slope: 0.2}}"
    )
    mlp = parser.instantiate(parser.parse_string(text)).mlp
    assert mlp(torch.randn(3, 4)).shape == (3, 2)
    assert mlp.hidden2.residual
    assert mlp.hidden2.activation_parameters == {"negative_slope": 0.2}
    number = parser.parse_string("mlp: {in_features: 4, hidden_features: 8, out_features: 2}")
    assert len(parser.instantiate(number).mlp) == 2
