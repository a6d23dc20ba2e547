"""What a converted Sequential computes in one Function, and how it follows what is done to its parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from cases import widest, within
from conversion_models import AutoEncoder, mlp, run, statuses, tabular, vgg
from torch import Tensor, nn

import bp_torch
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.fusion import ACTIVATION_KEYS, HEADS


def fused_calls(f: Callable[[], object]) -> list[tuple[str, str | None, float]]:
    """What of dense and batch_norm_act ``f`` calls, with which activation and p."""
    calls: list[tuple[str, str | None, float]] = []

    def watched(name: str, function: Callable) -> Callable:
        def call(*args: object, activation: str | None, p: float, **options: object) -> object:
            calls.append((name, activation, p))
            return function(*args, activation=activation, p=p, **options)

        return call

    functions = {name: watched(name, getattr(bp_torch.functional, name)) for name in ("dense", "batch_norm_act")}
    with mock.patch.multiple(bp_torch.functional, **functions):
        f()
    return calls


# What becomes what


def test_every_activation_module_can_be_fused() -> None:
    keys = {key for key, row in ACTIVATIONS.items() if row.module is not None}
    assert set(ACTIVATION_KEYS.values()) == keys
    assert set(ACTIVATIONS) - keys == {"identity", "gelu_tanh"}
    names = {cls.__name__ for cls in ACTIVATION_KEYS}
    assert names == set(bp_torch.nn._activation.__all__)
    assert {getattr(nn, name) for name in names if hasattr(nn, name)} < set(ACTIVATION_KEYS)
    assert {cls.__name__ for cls in HEADS} == {"Linear", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    assert len(HEADS) == 8


def test_linear_activation_dropout_are_one() -> None:
    model, x = bp_torch.convert(mlp()), torch.randn(4, 5)
    expected = [("dense", "relu", 0.3), ("dense", "gelu_tanh", 0.0), ("dense", None, 0.5), ("dense", "leaky_relu", 0.1)]
    assert fused_calls(lambda: model(x)) == expected
    assert fused_calls(lambda: model.eval()(x)) == [(*call, 0.0) for *call, _ in expected]
    assert statuses(model) == ["fused"] * 10 + ["replaced"] * 2


def test_batch_norm_activation_dropout_are_one() -> None:
    model = bp_torch.convert(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Tanh(), nn.BatchNorm1d(8)))
    assert fused_calls(lambda: model(torch.randn(4, 8))) == [("batch_norm_act", "relu", 0.3)]
    model = bp_torch.convert(tabular())
    assert fused_calls(lambda: model(torch.randn(4, 5))) == [("batch_norm_act", "elu", 0.0)]
    model = bp_torch.convert(vgg())  # nested, and with convolutions between
    assert [call[1] for call in fused_calls(lambda: model(torch.randn(3, 3, 6, 6)))] == ["relu", "relu", "relu"]


@pytest.mark.parametrize("dropout", [nn.Dropout1d, nn.AlphaDropout], ids=lambda cls: cls.__name__)
def test_dropout_of_another_kind_stays_behind(dropout: type[nn.Module]) -> None:
    model = bp_torch.convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), dropout(0.5)))
    assert fused_calls(lambda: model(torch.randn(2, 3, 4))) == [("batch_norm_act", "relu", 0.0)]
    assert statuses(model) == ["fused", "fused", "replaced"]


@pytest.mark.parametrize("cls", [cls for cls, key in ACTIVATION_KEYS.items() if not ACTIVATIONS[key].float32])
def test_every_activation_fuses_to_the_same_values(cls: type[nn.Module]) -> None:
    plain = nn.Sequential(nn.Linear(5, 4).to(widest()), getattr(nn, cls.__name__, cls)())
    x = torch.randn(6, 5, dtype=widest())
    expected = run(plain, x)
    bp_torch.convert(plain)
    plain[1] = bp_torch.convert(cls())
    # torch's backward of hardsigmoid holds 1/6 in float32; ours does not.
    exact = 1e-7 if cls.__name__ == "Hardsigmoid" else 1e-12
    assert fused_calls(lambda: plain(x)) == [("dense", ACTIVATION_KEYS[cls], 0.0)]
    torch.testing.assert_close(run(plain, x), expected, **within(exact, 1e-14))


class MyBlock(nn.Sequential):
    """As torchvision's blocks: layers of a constructor, run by Sequential's own forward."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU())


def test_a_subclass_that_inherits_the_forward_is_fused() -> None:
    model = bp_torch.convert(nn.Sequential(MyBlock(4), MyBlock(4)))
    assert len(fused_calls(lambda: model(torch.randn(2, 4)))) == 2
    assert type(model[0]) is MyBlock
    assert "forward" not in vars(model)  # in which nothing can be fused


def test_parts_of_ours_are_fused_too() -> None:
    model = bp_torch.convert(nn.Sequential(bp_torch.nn.Linear(4, 4), nn.ReLU(), bp_torch.nn.Dropout(0.5)))
    assert fused_calls(lambda: model(torch.randn(2, 4))) == [("dense", "relu", 0.5)]


def test_dropout_obeys_seed_mode_and_probability() -> None:
    model = bp_torch.convert(nn.Sequential(nn.Linear(4, 1000), nn.Dropout(0.3)))
    x = torch.randn(8, 4)
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)
    assert abs((first == 0).double().mean().item() - 0.3) < 0.03
    assert not (model.eval()(x) == 0).any()
    kept = model.train()(x)
    expected = nn.functional.linear(x, model[0].weight, model[0].bias) / 0.7
    torch.testing.assert_close(kept, torch.where(kept == 0, 0.0, expected))


# What is done to the parts


def zeros(y: Tensor) -> float:
    return (y == 0).double().mean().item()


def test_each_part_has_its_own_mode() -> None:
    """Fine-tuning puts each batch norm into evaluation mode, Monte-Carlo dropout each Dropout into training."""
    model = bp_torch.convert(nn.Sequential(nn.BatchNorm1d(4), nn.Sigmoid(), nn.Dropout(0.3)))
    x = torch.randn(500, 4)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    assert abs(zeros(model(x)) - 0.3) < 0.05
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model.train()[2].eval()
    assert zeros(model(x)) == 0
    assert model[0].num_batches_tracked == 1
    dense = bp_torch.convert(nn.Sequential(nn.Linear(4, 40), nn.Sigmoid(), nn.Dropout(0.5)).eval())
    assert zeros(dense(x)) == 0
    dense[2].train()
    assert abs(zeros(dense(x)) - 0.5) < 0.05
    dense.train()[2].eval()
    assert zeros(dense(x)) == 0


def same_as_torch(model: nn.Sequential, change: Callable[[nn.Sequential], object]) -> None:
    """``change``, done to a model of torch's and to its converted copy, has the same effect."""
    theirs, ours, x = model, bp_torch.convert(copy.deepcopy(model)), torch.randn(4, 6)
    ours(x)
    change(theirs), change(ours)
    torch.testing.assert_close(run(ours, x), run(theirs, x))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "replace the activation": lambda m: m.__setitem__(1, nn.Tanh()),
    "replace it by one that is not in the table": lambda m: m.__setitem__(1, nn.Softmax(1)),
    "replace it by a layer": lambda m: m.__setitem__(1, nn.LayerNorm(8)),
    "delete the activation": lambda m: m.__delitem__(1),
    "replace the layer": lambda m: m.__setitem__(0, m[3]) or m.__setitem__(3, nn.Flatten()),
    "insert between": lambda m: m.insert(1, nn.Flatten()),
    "append": lambda m: m.append(nn.ELU()),
    "extend": lambda m: m.extend([nn.Tanh(), nn.Identity()]),
    "pop": lambda m: m.pop(1),
    "set_submodule": lambda m: m.set_submodule("1", nn.Sigmoid()),
    "no dropout": lambda m: setattr(m[2], "p", 0.0),
    "another slope": lambda m: m.__setitem__(1, nn.LeakyReLU(0.3)) or setattr(m[1], "negative_slope", 0.7),
    "in place": lambda m: setattr(m[1], "inplace", True),
    "a forward of its own": lambda m: setattr(m[1], "forward", lambda x: x * 2),
    "freeze": lambda m: m[0].weight.data.mul_(2),
    "a hook that changes the output": lambda m: m[0].register_forward_hook(lambda module, args, y: y * 3),
    "a hook that changes the input": lambda m: m[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "a backward hook": lambda m: m[1].register_full_backward_hook(lambda module, dx, dy: (dx[0] * 5,)),
    "weight norm": lambda m: parametrizations.weight_norm(m[0]),
    "an attribute of the same name": lambda m: setattr(m[0], "activation", "tanh") or setattr(m[0], "dropout", 0.9),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_converted_model_follows_what_is_done_to_it(name: str) -> None:
    torch.manual_seed(0)
    same_as_torch(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 6) if "layer" in name else nn.Tanh()),
        (lambda m: m.__setitem__(1, nn.GELU())) if name == "replace the layer" else CHANGES[name],
    )


def test_a_part_gives_by_itself_what_it_gives_in_torch() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(4, 6)
    expected = [model[0](x), model[1](x), model[:2](x), model[1:2](x)]
    bp_torch.convert(model)
    torch.testing.assert_close([model[0](x), model[1](x), model[:2](x), model[1:2](x)], expected)


def test_an_absorbed_dropout_can_be_turned_off() -> None:
    model, x = bp_torch.convert(nn.Sequential(nn.Linear(6, 80), nn.Sigmoid(), nn.Dropout(0.5))), torch.randn(40, 6)
    assert abs(zeros(model(x)) - 0.5) < 0.05
    model[2].p = 0.0
    assert zeros(model(x)) == 0
    model[2].p = 0.25
    assert abs(zeros(model(x)) - 0.25) < 0.05
    del model[2]
    assert zeros(model(x)) == 0


def test_global_hooks_see_every_module() -> None:
    model, x, seen = bp_torch.convert(mlp().eval()), torch.randn(4, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        expected = model(x)
    finally:
        handle.remove()
    assert seen == [type(module) for module in model] + [nn.Sequential]
    torch.testing.assert_close(model(x), expected)


def test_a_part_that_was_compiled_is_called() -> None:
    model, x, graphs = bp_torch.convert(nn.Sequential(nn.Linear(6, 8), nn.SiLU())), torch.randn(4, 6), []
    expected = model(x)
    model[1].compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.no_grad():  # else Dynamo warns of an input that is no leaf
        torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1


def test_what_is_no_tensor_goes_through() -> None:
    class Pair(nn.Module):
        def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
            return both[0] + both[1]

    model = bp_torch.convert(nn.Sequential(Pair(), nn.Linear(3, 3), nn.ReLU()))
    assert model((torch.ones(2, 3), torch.ones(2, 3))).shape == (2, 3)


def test_shared_modules_are_fused_wherever_they_stand() -> None:
    model, x = AutoEncoder(), torch.randn(4, 6)
    expected = run(model, x)
    bp_torch.convert(model)
    assert [call[1] for call in fused_calls(lambda: model(x))] == ["tanh", "sigmoid", "relu", "tanh"]
    torch.testing.assert_close(run(model, x), expected)


# What is called by itself, and what the report says of it


class MyReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class MySequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self[0](input).sum()


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda input: input + 3  # type: ignore[method-assign]
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def before(*following: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), *following)


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "subclass": (lambda: before(MyReLU()), ["replaced", "left"], "not fused: '1' (MyReLU) is a subclass"),
    "no row": (
        lambda: before(nn.PReLU()), ["replaced", "left"], "not fused: '1' (PReLU) is not in the activation table",
    ),
    "softplus": (
        lambda: before(nn.Softplus()), ["replaced"] * 2, "not fused: '1' (Softplus) is computed in float32 by autocast",
    ),
    "other sequential": (
        lambda: MySequential(nn.Linear(3, 3), nn.ReLU()), ["replaced"] * 2,
        "not fused: called by the code of the model (MySequential), only Sequential is fused",
    ),
    "patched sequential": (
        lambda: patched(before(nn.ReLU())), ["replaced"] * 2,
        "not fused: called by the code of the model (Sequential), only Sequential is fused",
    ),
    "patched part": (
        lambda: before(patched(nn.ReLU())), ["replaced", "left"], "not fused: '1' (ReLU) is not converted",
    ),
    "hooked part": (lambda: before(hooked(nn.ReLU())), ["replaced"] * 2, "not fused: '1' (ReLU) has hooks"),
    "hooked dropout": (
        lambda: before(nn.ReLU(), hooked(nn.Dropout(0.0))), ["fused", "fused", "replaced"],
        "with '1' (ReLU); not fused: '2' (Dropout) has hooks",
    ),
    "hooked layer": (
        lambda: nn.Sequential(hooked(nn.Linear(3, 3)), nn.ReLU()), ["replaced"] * 2, "not fused: has hooks",
    ),
    "order": (lambda: before(nn.Dropout(0.0), nn.ReLU()), ["fused", "fused", "replaced"], "with '1' (Dropout)"),
    "feature dropout": (lambda: before(nn.AlphaDropout(0.0)), ["replaced"] * 2, ""),
    "nothing follows": (lambda: before(), ["replaced"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_not_fused_computes_as_before_and_says_why(name: str) -> None:
    make, expected, why = OBSTACLES[name]
    model, x = make().eval(), torch.randn(4, 3)
    y = model(x)
    bp_torch.convert(model)
    assert statuses(model) == expected
    row = bp_torch.conversion_report(model)["0"]
    assert row.why.startswith(why)
    assert bool(why) == bool(row.why)
    torch.testing.assert_close(model(x), y)
    assert len(fused_calls(lambda: model(x))) == (row.status == "fused")


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_part_with_hooks_is_called(register: str, at: int) -> None:
    model, calls = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Dropout(0.2)), []
    bp_torch.convert(model)
    handle = getattr(model[at], f"register_{register}_hook")(lambda *_: calls.append(at))
    assert "has hooks" in bp_torch.conversion_report(model)["0"].why
    x = torch.randn(2, 3, requires_grad=True)
    model(x).sum().backward()
    assert calls == [at]
    handle.remove()
    model(x).sum().backward()
    assert calls == [at]
    assert statuses(model) == ["fused"] * 3
