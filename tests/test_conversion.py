"""convert, revert and conversion_report, on models as people write them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from cases import widest, within
from torch import Tensor, nn
from torch.nn.utils import prune

import bp_torch
from bp_torch.conversion import _ACTIVATION_KEYS, _FUSED, COUNTERPARTS
from bp_torch.functions.activation import ACTIVATIONS


class BasicBlock(nn.Module):
    """The residual block of a ResNet: its forward is code, and one ReLU object is called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([BasicBlock(4), BasicBlock(4)])
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class AutoEncoder(nn.Module):
    """One activation object in three places, and one layer in two."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        middle = nn.Linear(3, 3)
        self.encoder = nn.Sequential(nn.Linear(6, 3), self.act, middle, nn.Sigmoid())
        self.decoder = nn.Sequential(middle, nn.ReLU(), nn.Linear(3, 6), self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6), nn.GELU(approximate="tanh"),
        nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.LeakyReLU(0.2, inplace=True),
        nn.Dropout(0.1, inplace=True), nn.Linear(6, 3), nn.LogSoftmax(dim=1),
    )  # fmt: skip


def tabular() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ELU(0.7), nn.Dropout(0.0), nn.Linear(8, 2))


def vgg() -> nn.Sequential:
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    return nn.Sequential(features, nn.Flatten(), nn.Linear(6, 5), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(5, 2))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=nn.GELU(), batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4, 5)),
    "tabular": (tabular, (4, 5)),
    "vgg": (vgg, (3, 3, 6, 6)),
    "resnet": (ResNet, (2, 3, 5, 5)),
    "encoder": (encoder, (2, 3, 8)),
    "autoencoder": (AutoEncoder, (4, 6)),
}


@pytest.fixture(params=MODELS)
def model_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[request.param]
    return make().to(widest()), torch.randn(shape, dtype=widest())


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout draws other masks from the same generator when it is fused; p = 0 makes training comparable."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), list(torch.autograd.grad(y.sin().sum(), [x, *model.parameters()]))


def types(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules(remove_duplicate=False)]


def state(model: nn.Module) -> tuple[list[str], dict]:
    state_dict = model.state_dict()
    return list(state_dict), state_dict._metadata


# What becomes what


def test_every_module_of_ours_that_extends_torchs_is_a_counterpart() -> None:
    expected = {
        getattr(nn, name): getattr(bp_torch.nn, name)
        for name in bp_torch.nn._OURS
        if hasattr(nn, name) and issubclass(getattr(bp_torch.nn, name), getattr(nn, name))
    }
    assert expected == COUNTERPARTS
    assert {nn.Linear, nn.ReLU, nn.Dropout, nn.BatchNorm2d, nn.CrossEntropyLoss, nn.LogSoftmax} <= set(COUNTERPARTS)
    for theirs, ours in COUNTERPARTS.items():
        assert theirs.__name__ == ours.__name__
        assert theirs is not ours


def test_every_activation_module_can_be_absorbed() -> None:
    assert {*_ACTIVATION_KEYS.values(), "identity", "gelu_tanh"} == set(ACTIVATIONS)
    assert {cls.__name__ for cls in _ACTIVATION_KEYS} == set(bp_torch.nn._activation.__all__)
    assert {cls.__name__ for cls in _FUSED} == {"Linear", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}


@pytest.mark.parametrize("theirs", COUNTERPARTS, ids=lambda cls: cls.__name__)
def test_a_counterpart_sets_the_same_attributes(theirs: type[nn.Module]) -> None:
    """So that changing the class of an object is enough."""
    arguments = {"Linear": (3, 4)}.get(theirs.__name__, (4,) if "Norm" in theirs.__name__ else ())
    module, ours = theirs(*arguments), COUNTERPARTS[theirs](*arguments)
    assert vars(module).keys() == vars(ours).keys()
    assert repr(module) == repr(ours)
    converted = bp_torch.convert(module)
    assert converted is module
    assert type(module) is type(ours)
    assert type(bp_torch.revert(module)) is theirs
    assert vars(module).keys() == vars(ours).keys()


def test_linear_activation_dropout_become_dense() -> None:
    model = mlp()
    bp_torch.convert(model)
    names = ["Dense", "Identity", "Identity", "Dense", "Identity", "Dense", "Identity", "Dense", "Identity", "Identity"]
    assert [type(module).__name__ for module in model] == [*names, "Linear", "LogSoftmax"]
    assert all(type(module) is nn.Identity for module in model if isinstance(module, nn.Identity))
    assert [(m.activation, m.dropout) for m in model if isinstance(m, bp_torch.nn.Dense)] == [
        ("relu", 0.3), ("gelu_tanh", 0.0), (None, 0.5), ("leaky_relu", 0.1)
    ]  # fmt: skip
    assert model[7].activation_parameters == {"negative_slope": 0.2}
    fresh = bp_torch.nn.Dense(6, 6, activation="leaky_relu", dropout=0.1, activation_parameters={"negative_slope": 0.2})
    assert repr(fresh) == repr(model[7])
    assert vars(fresh).keys() == vars(model[7]).keys() - {"_bp_torch_from", "_bp_torch_absorbed"}


def test_batch_norm_and_activation_become_one() -> None:
    model = bp_torch.convert(nn.Sequential(vgg(), tabular()))
    features = model[0][0]
    assert type(features[1]) is type(features[5]) is bp_torch.nn.BatchNormAct2d
    assert features[1].activation == "relu"
    assert type(features[2]) is nn.Identity
    assert type(model[1][1]) is bp_torch.nn.BatchNormAct1d
    assert model[1][1].activation_parameters == {"alpha": 0.7}
    assert type(model[1][3]) is nn.Identity
    volume = bp_torch.convert(nn.Sequential(nn.BatchNorm3d(2), nn.SiLU()))
    assert type(volume[0]) is bp_torch.nn.BatchNormAct3d


def test_batch_norm_activation_and_dropout_become_one() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.0))
    before, attributes = types(model), [vars(module).keys() for module in model]
    bp_torch.convert(model)
    names = ["BatchNormAct1d", "Identity", "Identity", "Tanh", "BatchNormAct1d", "Identity"]
    assert [type(module).__name__ for module in model] == names
    assert [(model[i].activation, model[i].dropout) for i in (0, 4)] == [("relu", 0.3), (None, 0.0)]
    assert bp_torch.conversion_report(model)["0"].why == "with '1' (ReLU), '2' (Dropout)"
    model[0].dropout = 0.45
    model[4].dropout = 0.2
    bp_torch.revert(model)
    assert types(model) == before
    assert [vars(module).keys() for module in model] == attributes
    assert (model[2].p, model[5].p) == (0.45, 0.2)


@pytest.mark.parametrize("dropout", [nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout], ids=lambda cls: cls.__name__)
def test_dropout_of_another_kind_stays_behind_batch_norm(dropout: type[nn.Module]) -> None:
    model = bp_torch.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), dropout(0.5)))
    assert [type(module).__name__ for module in model] == ["BatchNormAct2d", "Identity", dropout.__name__]
    assert model[0].dropout == 0


def test_frozen_batch_norm_still_drops_out() -> None:
    """Fine-tuning puts each batch norm into evaluation mode, and leaves every Dropout in training."""
    model = bp_torch.convert(nn.Sequential(nn.BatchNorm1d(4), nn.Sigmoid(), nn.Dropout(0.3)))
    x = torch.randn(500, 4)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    assert abs((model(x) == 0).double().mean().item() - 0.3) < 0.05
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    twin[2].eval()
    assert not (twin(x) == 0).any()
    assert (model(x) == 0).any()
    assert not (model.eval()(x) == 0).any()
    assert (model.train()(x) == 0).any()


@pytest.mark.parametrize("cls", [cls for cls in _ACTIVATION_KEYS if cls is not bp_torch.nn.Softplus])
def test_every_activation_fuses_to_the_same_values(cls: type[nn.Module]) -> None:
    linear = nn.Linear(5, 4).to(widest())
    plain = nn.Sequential(linear, getattr(nn, cls.__name__, cls)())
    x = torch.randn(6, 5, dtype=widest())
    expected = run(plain, x)
    bp_torch.convert(plain)
    assert type(plain[0]) is bp_torch.nn.Dense
    assert plain[0].activation == _ACTIVATION_KEYS[cls]
    # torch's backward of hardsigmoid holds 1/6 in float32; ours does not.
    exact = 1e-7 if cls is bp_torch.nn.Hardsigmoid else 1e-12
    torch.testing.assert_close(run(plain, x), expected, **within(exact, 1e-14))


# Nothing else changes


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_same_outputs_gradients_and_state(
    model_and_input: tuple[nn.Module, Tensor], training: bool, fuse: bool
) -> None:
    original, x = model_and_input
    without_dropout(original).train(training)
    model = copy.deepcopy(original)
    parameters, modules = list(model.parameters()), [id(module) for module in model.modules()]
    before = state(model)

    assert bp_torch.convert(model, fuse=fuse) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [id(module) for module in model.modules()] == modules
    assert [module.training for module in model.modules()] == [training] * len(modules)
    assert state(model) == before
    if not fuse:
        assert not any(isinstance(m, bp_torch.nn.Dense) or "Act" in type(m).__name__ for m in model.modules())
    for _ in range(2):  # the second step sees what the first did to the running statistics
        torch.testing.assert_close(run(model, x), run(original, x), **within(1e-12, 1e-13))
    torch.testing.assert_close(model.state_dict(), original.state_dict(), **within(1e-13, 0))
    for module, other in zip(model.train().modules(), model.eval().modules(), strict=True):
        assert module is other
        assert not module.training
    with torch.no_grad():
        torch.testing.assert_close(model(x), original.eval()(x), **within(1e-12, 1e-13))


def test_state_dict_loads_both_ways(model_and_input: tuple[nn.Module, Tensor]) -> None:
    plain, _ = model_and_input
    converted = bp_torch.convert(copy.deepcopy(plain))
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.normal_()
    plain.load_state_dict(converted.state_dict(), strict=True)
    torch.testing.assert_close(plain.state_dict(), converted.state_dict(), rtol=0, atol=0)
    other = bp_torch.convert(copy.deepcopy(plain))
    other.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(plain.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_random_numbers_are_not_consumed() -> None:
    model, before = mlp(), torch.get_rng_state()
    bp_torch.revert(bp_torch.convert(model))
    assert torch.equal(before, torch.get_rng_state())


def test_fused_dropout_obeys_seed_mode_and_probability() -> None:
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


def test_an_optimizer_goes_on_in_the_middle_of_training() -> None:
    def train(change_at: dict[int, Callable[[nn.Module], nn.Module]]) -> Tensor:
        torch.manual_seed(3)
        model = without_dropout(mlp()).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for step in range(9):
            change_at.get(step, lambda m: m)(model)
            optimizer.zero_grad()
            model(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    changed = train({3: bp_torch.convert, 6: bp_torch.revert})
    torch.testing.assert_close(changed, train({}), rtol=1e-9, atol=1e-12)


def test_hooks_flags_and_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU(), nn.Tanh())
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[0].register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    model[0].register_state_dict_post_hook(lambda *_: seen.append("state"))
    model[0].register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    model[1].register_forward_pre_hook(lambda *_: seen.append("pre 1"))
    model[2].register_state_dict_post_hook(lambda *_: seen.append("state 2"))
    model[3].register_forward_hook(lambda *_: seen.append("forward 3"))
    model[0].weight.requires_grad_(False)
    model[3].eval()
    bp_torch.convert(model)
    assert [type(module).__name__ for module in model] == ["Linear", "Dense", "Identity", "Tanh"]
    assert not model[0].weight.requires_grad
    assert not model[3].training
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "pre 1", "forward 3", "backward pre", "backward"]
    model.load_state_dict(model.state_dict())
    assert seen[6:] == ["state", "state 2", "load"]


def test_a_second_convert_changes_nothing() -> None:
    model = bp_torch.convert(nn.Sequential(mlp(), vgg()))
    before, attributes = types(model), [dict(vars(module)) for module in model.modules()]
    assert bp_torch.convert(model) is model
    assert types(model) == before
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_fusing_may_come_after_replacing() -> None:
    model = mlp()
    before = types(model)
    bp_torch.convert(model, fuse=False)
    assert {type(module).__name__ for module in model} >= {"Linear", "ReLU", "Dropout", "LeakyReLU"}
    assert type(model[0]) is bp_torch.nn.Linear
    bp_torch.convert(model)
    assert type(model[0]) is bp_torch.nn.Dense
    assert types(bp_torch.revert(model)) == before


# What is left alone


def test_shared_modules_stay_shared_and_are_not_fused() -> None:
    model = bp_torch.convert(AutoEncoder())
    assert model.act is model.encoder[1] is model.decoder[3]
    assert type(model.act) is bp_torch.nn.Tanh
    assert model.encoder[2] is model.decoder[0]
    assert type(model.decoder[0]) is bp_torch.nn.Linear
    report = bp_torch.conversion_report(model)
    assert report["encoder.0"].why == "not fused: '1' (Tanh) is used elsewhere too"
    assert report["decoder.0"].why == "not fused: is used elsewhere too"
    twice = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    both = bp_torch.convert(nn.Sequential(twice, twice))
    assert both[0] is both[1]
    assert type(twice[0]) is bp_torch.nn.Dense


@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_absorbed_module_with_hooks_is_not_fused(register: str, at: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Dropout(0.2))
    calls = []
    getattr(model[at], f"register_{register}")(lambda *_: calls.append(at))
    bp_torch.convert(model)
    assert type(model[at]) in (bp_torch.nn.SiLU, bp_torch.nn.Dropout)
    assert "has hooks" in bp_torch.conversion_report(model)["0"].why
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert calls == [at]


@pytest.mark.parametrize("of_linear", [True, False])
def test_mixed_training_flags_are_not_fused(of_linear: bool) -> None:
    """Monte-Carlo dropout trains the Dropout of a model that evaluates."""
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Dropout(0.5))
    model[0].train(of_linear)
    model[2].train(not of_linear)
    bp_torch.convert(model)
    assert [type(module).__name__ for module in model] == ["Dense", "Identity", "Dropout"]
    flags = f"training={not of_linear}, the layer before it training={of_linear}"
    assert bp_torch.conversion_report(model)["0"].why == f"with '1' (ReLU); not fused: '2' (Dropout) has {flags}"
    x = torch.ones(4, 3)
    assert torch.equal(model(x), model(x)) == of_linear
    bp_torch.convert(model.train())  # no longer mixed, but fused already
    assert [type(module).__name__ for module in model] == ["Dense", "Identity", "Dropout"]
    assert model[0].activation == "relu"
    assert bp_torch.conversion_report(model)["0"].why.endswith("after revert, could be fused with '2' (Dropout)")
    assert [type(module).__name__ for module in bp_torch.convert(bp_torch.revert(model))[1:]] == ["Identity"] * 2


class MyReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class MySequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self[0](input).sum()


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda input: input + 3  # type: ignore[method-assign]
    return module


def named(module: nn.Module, name: str) -> nn.Module:
    setattr(module, name, 7)
    return module


OBSTACLES: dict[str, tuple[Callable[[], nn.Sequential], list[str], str]] = {
    "subclass": (
        lambda: nn.Sequential(nn.Linear(3, 3), MyReLU()), ["Linear", "MyReLU"],
        "not fused: '1' (MyReLU) is a subclass",
    ),
    "subclassed-head": (lambda: nn.Sequential(MyLinear(3, 3), nn.ReLU()), ["MyLinear", "ReLU"], "subclass of Linear"),
    "no-row": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU()), ["Linear", "PReLU"],
        "not fused: '1' (PReLU) is not in the activation table",
    ),
    "softplus": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Softplus()), ["Linear", "Softplus"],
        "not fused: '1' (Softplus) is computed in float32 by autocast",
    ),
    "other-sequential": (
        lambda: MySequential(nn.Linear(3, 3), nn.ReLU()), ["Linear", "ReLU"],
        "not fused: called by the code of the model (MySequential), only Sequential is fused",
    ),
    "patched-sequential": (
        lambda: patched(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), ["Linear", "ReLU"],
        "not fused: called by the code of the model (Sequential), only Sequential is fused",
    ),
    "patched-part": (
        lambda: nn.Sequential(nn.Linear(3, 3), patched(nn.ReLU())), ["Linear", "ReLU"],
        "not fused: '1' (ReLU) has a forward of its own",
    ),
    "patched-head": (
        lambda: nn.Sequential(patched(nn.Linear(3, 3)), nn.ReLU()), ["Linear", "ReLU"], "has a forward of its own",
    ),
    "own-attribute": (
        lambda: nn.Sequential(named(nn.Linear(3, 3), "dropout"), nn.ReLU()), ["Linear", "ReLU"],
        "not fused: has an attribute 'dropout' of its own",
    ),
    "order": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0), nn.ReLU()), ["Dense", "Identity", "ReLU"],
        "with '1' (Dropout)",
    ),
    "feature-dropout": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.0)), ["Linear", "AlphaDropout"], "",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()), ["LazyLinear", "ReLU"], "lazy: convert after"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)), nn.ReLU()),
        ["ParametrizedLinear", "ReLU"], "parametrized",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_is_left_computes_as_before_and_says_why(name: str) -> None:
    make, after, why = OBSTACLES[name]
    model = make().eval()
    x = torch.randn(4, 3)
    expected = None if name == "lazy" else model(x)
    bp_torch.convert(model)
    assert [type(module).__name__ for module in model] == after
    row = bp_torch.conversion_report(model)["0"]
    assert row.why.startswith(why)
    assert bool(why) == bool(row.why)
    if expected is not None:
        torch.testing.assert_close(model(x), expected)


def test_a_lazy_module_is_converted_once_it_knows_its_shape() -> None:
    model = bp_torch.convert(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    model(torch.randn(2, 4))
    bp_torch.convert(model)
    assert [type(module).__name__ for module in model] == ["Dense", "Identity"]


def test_pruned_modules_are_converted_and_prune_on() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    keys, x = list(model.state_dict()), torch.randn(3, 6)
    expected = model(x)
    bp_torch.convert(model)
    assert type(model[0]) is bp_torch.nn.Dense
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    prune.random_unstructured(model[0], "weight", amount=2)
    prune.remove(model[0], "weight")
    assert (model[0].weight == 0).sum() == 20
    assert type(bp_torch.revert(model)[0]) is nn.Linear


def test_wrappers_keep_their_class_and_their_contents_are_converted() -> None:
    model = bp_torch.convert(nn.DataParallel(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    assert type(model) is nn.DataParallel
    assert type(model.module[0]) is bp_torch.nn.Dense
    model(torch.randn(2, 3)).sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_torchscript_is_left() -> None:
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    before = types(scripted)
    report = bp_torch.conversion_report(bp_torch.convert(scripted))
    assert types(scripted) == before
    assert [(row.path, row.status, row.why) for row in report] == [(i, "left", "TorchScript") for i in "01"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("activation", ["relu", "gelu", "module"])
def test_the_fast_path_of_transformers_gives_the_same(activation: str) -> None:
    f = nn.GELU() if activation == "module" else activation
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=f, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x), model(x, src_key_padding_mask=padding)
        bp_torch.convert(model)
        assert type(model.layers[0].linear1) is bp_torch.nn.Linear
        assert type(model.layers[0].self_attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
        torch.testing.assert_close((model(x), model(x, src_key_padding_mask=padding)), expected)
    with_gradient = model(x)
    assert with_gradient.requires_grad
    torch.testing.assert_close(with_gradient.detach(), expected[0])


@pytest.mark.parametrize("function", [bp_torch.convert, bp_torch.revert, bp_torch.conversion_report])
@pytest.mark.parametrize("wrong", [3, nn.Linear, None, [nn.Linear(2, 2)]])
def test_other_things_than_modules_are_refused(function: Callable, wrong: object) -> None:
    message = rf"{function.__name__}\(\): 'model': expected a torch.nn.Module, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=message):
        function(wrong)


# And back


def moved(model: nn.Module) -> nn.Module:
    other = torch.float32 if widest() == torch.float64 else torch.float64
    return model.to(other).to(widest())


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
    return model


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("between", [copy.deepcopy, pickled, saved, moved, loaded, trained])
def test_revert_brings_the_original_back(
    model_and_input: tuple[nn.Module, Tensor], between: Callable[[nn.Module], nn.Module], fuse: bool
) -> None:
    original, x = model_and_input
    without_dropout(original)
    model = copy.deepcopy(original)
    converted = between(bp_torch.convert(model, fuse=fuse))
    if between is trained:
        trained(original)
    if between is moved:
        moved(original)
    torch.testing.assert_close(run(converted, x), run(original, x), **within(1e-12, 1e-13))
    objects = [id(module) for module in converted.modules()]

    assert bp_torch.revert(converted) is converted
    assert types(converted) == types(original)
    assert repr(converted) == repr(original)
    assert [id(module) for module in converted.modules()] == objects
    assert [vars(a).keys() for a in converted.modules()] == [vars(b).keys() for b in original.modules()]
    assert state(converted) == state(original)
    torch.testing.assert_close(run(converted, x), run(original, x), **within(1e-12, 1e-13))


def test_references_to_modules_stay_valid() -> None:
    model = mlp()
    held = list(model)
    bp_torch.revert(bp_torch.convert(model))
    assert all(a is b for a, b in zip(model, held, strict=True))
    assert type(held[1]) is nn.ReLU
    assert (held[2].p, held[9].p, held[9].inplace, held[8].negative_slope) == (0.3, 0.1, True, 0.2)


def test_deepcopy_and_original_revert_apart() -> None:
    model = bp_torch.convert(mlp())
    other = copy.deepcopy(model)
    bp_torch.revert(other)
    assert type(other[1]) is nn.ReLU
    assert type(model[0]) is bp_torch.nn.Dense
    assert type(model[1]) is nn.Identity


def test_revert_keeps_the_mode_and_the_probability_of_now() -> None:
    model = bp_torch.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.3))).eval()
    model[0].dropout = 0.45
    bp_torch.revert(model)
    assert model[2].p == 0.45
    assert not model[1].training
    assert not model[2].training


def test_modules_that_the_user_made_are_not_reverted() -> None:
    model = nn.Sequential(
        bp_torch.nn.Linear(3, 3), bp_torch.nn.ReLU(), bp_torch.nn.Dense(3, 3), nn.Tanh(), nn.Linear(3, 3)
    )
    before = types(model)
    assert types(bp_torch.revert(model)) == before
    bp_torch.convert(model)
    names = ["Dense", "Identity", "Dense", "Tanh", "Linear"]
    assert [type(module).__name__ for module in model] == names
    assert type(model[4]) is bp_torch.nn.Linear
    assert types(bp_torch.revert(model)) == before


def test_revert_refuses_what_it_cannot_undo_and_changes_nothing() -> None:
    model = bp_torch.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh()))
    before = types(model)
    with pytest.raises(RuntimeError, match=r"'2': is a fused layer, and what it absorbed \(Tanh\) is not in the model"):
        bp_torch.revert(model[:3])
    with pytest.raises(RuntimeError, match="'1': was a ReLU, and the fused layer that absorbed it is not in the model"):
        bp_torch.revert(model[1:])
    with pytest.raises(RuntimeError, match="the model: is a fused layer"):
        bp_torch.revert(model[0])
    model[2].activation = "relu"
    with pytest.raises(RuntimeError, match="'2': 'activation' was changed since convert, from 'tanh' to 'relu'"):
        bp_torch.revert(model)
    model[2].activation, model[2].dropout = "tanh", 0.2
    with pytest.raises(RuntimeError, match=r"'2': 'dropout' was changed since convert, from 0\.0 to 0\.2"):
        bp_torch.revert(model)
    model[2].dropout = 0.0
    parametrizations.weight_norm(model[2])
    with pytest.raises(RuntimeError, match="'2': expected a class that convert made, got ParametrizedDense"):
        bp_torch.revert(model)
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert types(model) == before
    assert [type(module) for module in bp_torch.revert(model)] == [nn.Linear, nn.ReLU, nn.Linear, nn.Tanh]
    assert type(bp_torch.revert(bp_torch.convert(model)[2:])[0]) is nn.Linear


# The report


def test_the_report_lists_every_module_that_computes() -> None:
    model = nn.Sequential(vgg(), ResNet(), encoder(), nn.LSTM(2, 2))
    report = bp_torch.conversion_report(bp_torch.convert(model))
    rows = {row.path: (row.original, row.now, row.status, row.why) for row in report}
    assert rows["0.0.1"] == ("BatchNorm2d", "BatchNormAct2d", "fused", "with '0.0.2' (ReLU)")
    assert rows["0.0.2"] == ("ReLU", "Identity", "fused", "into '0.0.1' (BatchNorm2d)")
    assert rows["0.2"] == ("Linear", "Dense", "fused", "with '0.3' (ReLU), '0.4' (Dropout)")
    assert rows["0.5"] == ("Linear", "Linear", "replaced", "")
    assert rows["0.0.0"] == ("Conv2d", "Conv2d", "left", "no Function for Conv2d")
    code = "not fused: called by the code of '1.blocks.0' (BasicBlock), only Sequential is fused"
    assert rows["1.blocks.0.bn1"] == ("BatchNorm2d", "BatchNorm2d", "replaced", code)
    assert rows["1.blocks.0.relu"] == ("ReLU", "ReLU", "replaced", "")
    assert rows["2.self_attn"][2:] == ("left", "no Function for MultiheadAttention")
    assert rows["2.self_attn.out_proj"][2:] == ("left", "subclass of Linear: only exact types are converted")
    assert rows["3"][2:] == ("left", "no Function for LSTM")
    assert not {"", "0", "0.0", "1", "1.blocks"} & rows.keys()
    assert len(report) == len(list(report)) == len(rows) == sum(map(report.count, ("replaced", "fused", "left")))

    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "was", "is", "status", "why"]
    assert len(lines) == len(report) + 2
    assert all(line.startswith(row.path) for line, row in zip(lines[1:], report, strict=False))
    assert (
        lines[-1] == f"{report.count('replaced')} replaced, {report.count('fused')} fused, {report.count('left')} left"
    )
    with pytest.raises(KeyError):
        report["nowhere"]


def test_the_report_says_what_was_not_done_yet() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), bp_torch.nn.Dense(2, 2))
    report = bp_torch.conversion_report(model)
    assert [(row.status, row.why) for row in report] == [
        ("left", "not converted yet"), ("left", "not converted yet"), ("left", "is bp_torch's own")
    ]  # fmt: skip
    bp_torch.convert(model, fuse=False)
    assert bp_torch.conversion_report(model)["0"].why == "could be fused with '1' (ReLU)"
    assert str(bp_torch.conversion_report(bp_torch.convert(nn.Tanh()))).splitlines()[1].startswith("(model)")


def test_a_module_used_twice_has_a_row_for_each_place() -> None:
    report = bp_torch.conversion_report(bp_torch.convert(AutoEncoder()))
    assert [row.path for row in report if row.original == "Tanh"] == ["act", "encoder.1", "decoder.3"]


# Together with torch.compile and torch.fx


def test_a_converted_model_compiles_whole() -> None:
    model = without_dropout(mlp()).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = run(model, x)
    compiled = torch.compile(bp_torch.convert(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-14)


def test_a_compiled_model_notices_conversion() -> None:
    model = without_dropout(mlp()).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = run(compiled, x)
    bp_torch.convert(compiled)
    assert type(model[0]) is bp_torch.nn.Dense
    model[0].activation = "sin"  # seen only by code that was compiled anew
    assert not torch.allclose(compiled(x), expected[0])
    model[0].activation = "relu"
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-14)
    bp_torch.revert(compiled)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-14)


def test_a_traced_graph_is_converted_and_a_converted_model_traced() -> None:
    model, x = ResNet().eval(), torch.randn(2, 3, 5, 5)
    expected = model(x)
    graph = bp_torch.convert(torch.fx.symbolic_trace(model))
    assert type(graph.get_submodule("fc")) is bp_torch.nn.Linear
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(bp_torch.convert(model))(x), expected)
