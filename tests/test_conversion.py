"""convert, on models as people write them; the way back is in test_revert.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from cases import widest, within
from conversion_models import MODELS, ResNet, encoder, mlp, run, state, statuses, types, vgg, without_dropout
from torch import Tensor, nn
from torch.nn.utils import prune

import bp_torch
from bp_torch.conversion import COUNTERPARTS


@pytest.fixture(params=MODELS)
def model_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[request.param]
    return make().to(widest()), torch.randn(shape, dtype=widest())


# What is converted


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


@pytest.mark.parametrize("theirs", COUNTERPARTS, ids=lambda cls: cls.__name__)
def test_a_counterpart_runs_on_the_attributes_of_torchs_class(theirs: type[nn.Module]) -> None:
    arguments = {"Linear": (3, 4)}.get(theirs.__name__, (3,) if "Norm" in theirs.__name__ else ())
    module, ours = theirs(*arguments), COUNTERPARTS[theirs](*arguments)
    attributes = set(vars(module))
    assert attributes == vars(ours).keys() - {"__module__"}
    assert repr(module) == repr(ours)
    converted = bp_torch.convert(module)
    assert converted is module
    assert type(module) is theirs
    assert repr(module) == repr(ours)
    module.eval(), ours.eval()
    ours.load_state_dict(module.state_dict())
    shape = (2, 3, 4, 4) if "2d" in theirs.__name__ else (2, 3, 4, 4, 4) if "3d" in theirs.__name__ else (4, 3)
    x = torch.rand(shape)
    inputs = (x,) if "Loss" not in theirs.__name__ else (x, torch.tensor([0, 1, 2, 0]))
    if "Loss" in theirs.__name__ and theirs not in (nn.CrossEntropyLoss, nn.NLLLoss):
        inputs = x, torch.rand(shape)
    if theirs in (nn.Softmax, nn.LogSoftmax, nn.Softmin):
        module.dim = ours.dim = 1
    torch.testing.assert_close(module(*inputs), ours(*inputs), rtol=0, atol=0)
    bp_torch.revert(module)
    assert set(vars(module)) == attributes


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
    assert types(model) == types(original)
    assert [module.training for module in model.modules()] == [training] * len(modules)
    assert state(model) == before
    assert "replaced" in statuses(model)
    if not fuse:
        assert "fused" not in statuses(model)
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
    assert not model[0].weight.requires_grad
    assert not model[3].training
    model(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "pre 1", "forward 3", "backward pre", "backward"]
    model.load_state_dict(model.state_dict())
    assert seen[6:] == ["state", "state 2", "load"]


def test_a_second_convert_changes_nothing() -> None:
    model = bp_torch.convert(nn.Sequential(mlp(), vgg()))
    attributes = [dict(vars(module)) for module in model.modules()]
    assert bp_torch.convert(model) is model
    assert [dict(vars(module)) for module in model.modules()] == attributes


# Whoever looks at the class


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")  # torch's own default
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_quantization_finds_the_layers() -> None:
    import torch.ao.quantization as quantization

    model, x = bp_torch.convert(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()), torch.randn(4, 6)
    for kind in ("dynamic", "training"):
        found = []
        for m in (model, bp_torch.revert(copy.deepcopy(model))):
            if kind == "dynamic":
                quantized = quantization.quantize_dynamic(m, {nn.Linear})
            else:
                m = copy.deepcopy(m).train()
                m.qconfig = quantization.get_default_qat_qconfig("x86")
                quantized = quantization.prepare_qat(m)
            found.append([type(module).__module__ for module in quantized.children()])
            found[-1].append(quantized(x).tolist())
        assert found[0] == found[1]
        assert "ao.nn" in found[0][0]


def test_what_looks_at_each_layer_sees_torchs_layers_and_numbers() -> None:
    """Attribution methods find nonlinearities by their exact class, and hook them in both directions."""
    inputs, gradients = [], []
    x = torch.randn(4, 5)
    for convert in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
        if convert:
            bp_torch.convert(model)
        seen: list[Tensor] = []
        for module in model:
            if type(module) in {nn.ReLU, nn.Tanh}:
                module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
                module.register_full_backward_hook(lambda _, dx, dy: (dx[0].clamp(min=0) * 2,))
        inputs.append(seen)
        given = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(given).sum(), given)[0])
    assert len(inputs[0]) == 1
    torch.testing.assert_close(inputs[1], inputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"encoder"}))  # whose forward torch.fx cannot trace
def test_torch_fx_sees_the_same_graph(name: str) -> None:
    make, shape = MODELS[name]
    model, x, graphs = make().eval().to(widest()), torch.randn(shape, dtype=widest()), []
    for m in (model, bp_torch.convert(copy.deepcopy(model))):
        traced = torch.fx.symbolic_trace(m)
        graphs.append([(node.op, str(node.target)) for node in traced.graph.nodes])
        torch.testing.assert_close(traced(x), model(x), **within(1e-12, 1e-13))
    assert graphs[0] == graphs[1]


def test_a_traced_graph_is_converted() -> None:
    model, x = ResNet().eval(), torch.randn(2, 3, 5, 5)
    expected = model(x)
    graph = bp_torch.convert(torch.fx.symbolic_trace(model))
    assert bp_torch.conversion_report(graph)["fc"].status == "replaced"
    torch.testing.assert_close(graph(x), expected)


def test_export_names_the_same_modules() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval(), torch.randn(4, 6)
    stacks = []
    for m in (model, bp_torch.convert(copy.deepcopy(model))):
        nodes = [node for node in torch.export.export(m, (x,)).graph.nodes if node.op == "call_function"]
        stacks.append([(str(node.target), list(node.meta["nn_module_stack"].values())) for node in nodes])
    assert stacks[0] == stacks[1]


def test_torchs_synchronized_batch_norm_keeps_the_activation() -> None:
    model = bp_torch.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert type(synchronized[1]) is nn.SyncBatchNorm
    assert synchronized(torch.randn(5, 4)).min() >= 0


def test_functional_call_reaches_a_converted_model() -> None:
    model, x = bp_torch.convert(encoder().eval()), torch.randn(2, 3, 8)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not torch.func.functional_call(model, zeros, (x,)).any()
    assert model(x).any()


# What is left alone


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda input: input + 3  # type: ignore[method-assign]
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: MyLinear(3, 3), "subclass of Linear: only exact types are converted"),
    "patched": (lambda: patched(nn.Linear(3, 3)), "has a forward of its own"),
    "lazy": (lambda: nn.LazyLinear(3), "lazy: convert after its first forward"),
    "parametrized": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "parametrized: only exact types"),
    "ours": (lambda: bp_torch.nn.Linear(3, 3), "is bp_torch's own"),
    "unknown": (lambda: nn.LayerNorm(3), "no Function for LayerNorm"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_computes_as_before_and_says_why(name: str) -> None:
    make, why = LEFT[name]
    model = nn.Sequential(make()).eval()
    x, cls = torch.randn(4, 3), type(model[0])
    expected = None if name == "lazy" else model(x)
    bp_torch.convert(model)
    assert type(model[0]) is cls
    row = bp_torch.conversion_report(model)["0"]
    assert (row.status, row.why[: len(why)]) == ("left", why)
    if expected is not None:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_lazy_module_is_converted_once_it_knows_its_shape() -> None:
    model = bp_torch.convert(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert statuses(model) == ["left", "replaced"]
    model(torch.randn(2, 4))
    assert statuses(bp_torch.convert(model)) == ["fused", "fused"]


def test_pruned_modules_are_converted_and_prune_on() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    keys, x = list(model.state_dict()), torch.randn(3, 6)
    expected = model(x)
    bp_torch.convert(model)
    assert bp_torch.conversion_report(model)["0"].status == "replaced"
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    prune.random_unstructured(model[0], "weight", amount=2)
    prune.remove(model[0], "weight")
    assert (model[0].weight == 0).sum() == 20
    assert bp_torch.conversion_report(model)["0"].status == "fused"


def test_a_parametrization_may_come_and_go_afterwards() -> None:
    model, x = bp_torch.convert(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), torch.randn(3, 6)
    expected = model(x)
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model(x), expected)
    bp_torch.revert(model)
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_wrappers_keep_their_class_and_their_contents_are_converted() -> None:
    model = bp_torch.convert(nn.DataParallel(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    assert type(model) is nn.DataParallel
    assert statuses(model) == ["fused", "fused"]
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
        assert bp_torch.conversion_report(model)["layers.0.linear1"].status == "replaced"
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
    with pytest.raises(TypeError, match=message.replace(function.__name__, "reverted")), bp_torch.reverted(wrong):
        pass


# Together with torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_converted_model_compiles_whole(backend: str) -> None:
    model = without_dropout(mlp()).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = run(model, x)
    compiled = torch.compile(bp_torch.convert(model), backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-14)


def test_a_compiled_model_notices_what_is_done_to_it() -> None:
    model = without_dropout(mlp()).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = run(compiled, x)
    bp_torch.convert(compiled)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-14)
    model[1] = nn.Sigmoid()  # seen only by code that was compiled anew
    other = run(model, x)
    assert not torch.allclose(other[0], expected[0])
    torch.testing.assert_close(run(compiled, x), other, rtol=1e-12, atol=1e-14)
    bp_torch.revert(compiled)
    torch.testing.assert_close(run(compiled, x), other, rtol=1e-12, atol=1e-14)
