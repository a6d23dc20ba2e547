"""revert and reverted, on models as people write them."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import widest, within
from conversion_models import mlp, run, state, statuses, types, without_dropout
from test_conversion import model_and_input  # noqa: F401  a fixture
from torch import Tensor, nn

import bp_torch
from bp_torch.fusion import FORWARD

# The original comes back


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
    model_and_input: tuple[nn.Module, Tensor],  # noqa: F811
    between: Callable[[nn.Module], nn.Module],
    fuse: bool,
) -> None:
    original, x = model_and_input
    without_dropout(original)
    model = copy.deepcopy(original)
    expected = statuses(bp_torch.convert(model, fuse=fuse))
    converted = between(model)
    assert statuses(converted) == expected
    for module in converted.modules():
        if FORWARD in vars(module):
            assert module.forward.args == (module,)
    if between is trained:
        trained(original)
    if between is moved:
        moved(original)
    torch.testing.assert_close(run(converted, x), run(original, x), **within(1e-12, 1e-13))
    objects = [id(module) for module in converted.modules()]

    assert bp_torch.revert(converted) is converted
    assert types(converted) == types(original)
    assert [id(module) for module in converted.modules()] == objects
    assert [vars(a).keys() for a in converted.modules()] == [vars(b).keys() for b in original.modules()]
    assert state(converted) == state(original)
    torch.testing.assert_close(run(converted, x), run(original, x), **within(1e-12, 1e-13))


def test_a_part_may_be_reverted_by_itself() -> None:
    model = bp_torch.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh()))
    bp_torch.revert(model[1])
    assert statuses(model) == ["replaced", "left", "fused", "fused"]
    assert bp_torch.conversion_report(model)["0"].why == "not fused: '1' (ReLU) is not converted"
    assert statuses(bp_torch.revert(model[2:])) == ["left", "left"]
    assert statuses(model) == ["replaced", "left", "left", "left"]
    assert statuses(bp_torch.convert(model)) == ["fused"] * 4


def test_deepcopy_and_original_revert_apart() -> None:
    model = bp_torch.convert(mlp())
    other = copy.deepcopy(model)
    bp_torch.revert(other)
    assert set(statuses(other)) == {"left"}
    assert "left" not in statuses(model)


def test_a_replica_computes_with_its_own_parameters() -> None:
    """DataParallel makes replicas by copying attributes, then gives them the parameters of their device."""
    model = bp_torch.convert(nn.Linear(2, 2))
    for module in (model, copy.deepcopy(model)):
        replica = module._replicate_for_data_parallel()._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.eye(2) * 5, torch.ones(2)
        assert torch.equal(replica(torch.eye(2)), torch.eye(2) * 5 + 1)
        assert type(replica) is nn.Linear
        bp_torch.revert(replica)
        assert torch.equal(replica(torch.eye(2)), torch.eye(2) * 5 + 1)
        assert statuses(module) == ["replaced"]


def test_modules_that_the_user_made_are_not_reverted() -> None:
    model = nn.Sequential(
        bp_torch.nn.Linear(3, 3), bp_torch.nn.ReLU(), bp_torch.nn.Dense(3, 3), nn.Tanh(), nn.Linear(3, 3)
    )
    before = types(model)
    assert types(bp_torch.revert(model)) == before
    assert statuses(bp_torch.convert(model)) == ["fused", "fused", "left", "replaced", "replaced"]
    assert statuses(bp_torch.revert(model)) == ["left"] * 5
    assert types(model) == before


# Forwards that others set


def wrapped_by_function(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *args: old(*args) * 1  # type: ignore[method-assign]


def wrapped_by_partial(module: nn.Module) -> None:
    """As accelerate's hooks do."""
    module._old_forward = module.forward

    def forward(module: nn.Module, *args: Tensor) -> Tensor:
        return module._old_forward(*args) * 1

    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)  # type: ignore[method-assign]


@pytest.mark.parametrize("wrap", [wrapped_by_function, wrapped_by_partial])
@pytest.mark.parametrize("parts", [(0, 1, 2), (1,), (0,), ()])
def test_a_forward_that_was_wrapped_survives(wrap: Callable[[nn.Module], None], parts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6)
    expected = run(model, x)
    bp_torch.convert(model)
    for at in parts:
        wrap(model[at])
    if not parts:
        wrap(model)
    torch.testing.assert_close(run(model, x), expected)
    if wrap is wrapped_by_partial and parts:  # and the hook goes, after revert: back to what it found
        bp_torch.revert(model)
        torch.testing.assert_close(run(model, x), expected)
        for at in parts:
            model[at].forward = model[at]._old_forward
    bp_torch.revert(model)
    assert not any(FORWARD in vars(module) for module in model.modules())
    torch.testing.assert_close(run(model, x), expected)
    assert "Dense" not in str(model(x).grad_fn)
    bp_torch.convert(model)
    torch.testing.assert_close(run(model, x), expected)


def test_reverted_for_a_while() -> None:
    model, x = bp_torch.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), torch.randn(4, 6)
    wrapped_by_function(model[2])
    before, expected = statuses(model), model(x)
    held = model[0].forward
    with bp_torch.reverted(model) as same:
        assert same is model
        assert set(statuses(model)) == {"left"}
        assert not any(FORWARD in vars(module) for module in model.modules())
        assert "AddmmBackward" in str(held(x).grad_fn)
        torch.testing.assert_close(model(x), expected)
    assert statuses(model) == before
    assert model[0].forward is held
    assert "LinearFunction" in str(held(x).grad_fn)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(KeyError), bp_torch.reverted(model):
        raise KeyError
    assert statuses(model) == before


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_reverted_model_can_be_scripted() -> None:
    model, x = bp_torch.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU())), torch.randn(4, 6)
    with bp_torch.reverted(model):
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    assert statuses(model) == ["fused", "fused"]
