"""backprop_view and its callback: a training step, formula by formula, on models that know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")

from test_callbacks import Somebodys, loader, network, trainer

import bp_torch
from bp_torch import nn
from bp_torch.recipes.callbacks import BackpropView, backprop_view

ONE_BACKEND = "what callbacks see and write; the layers are tested on both"


def sequential(dense: type, norm: type, activation: torch.nn.Module, dropout: type) -> torch.nn.Sequential:
    layers = [dense(6, 12), norm(12), activation, dropout(0.3), dense(12, 12), activation, dense(12, 3)]
    return torch.nn.Sequential(*layers)


VIEWED: dict[str, Callable[[], torch.nn.Module]] = {
    "torch.nn": lambda: sequential(torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.GELU(), torch.nn.Dropout),
    "torch.nn in place": lambda: sequential(
        torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.LeakyReLU(0.2, inplace=True), torch.nn.Dropout
    ),
    "bp_torch.nn": lambda: sequential(nn.Linear, nn.BatchNorm1d, nn.Sigmoid(), nn.Dropout),
    "converted": lambda: bp_torch.convert(
        sequential(torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.ELU(0.7), torch.nn.Dropout)
    ),
    "dense": lambda: nn.MLP(6, [12, 12, 12], 3, activation="tanh", dropout=0.3),
    "residual": lambda: nn.MLP(6, [12, 12, 12], 3, activation="relu", dropout=0.3, residual=True),
    "batch norm": lambda: nn.MLP(6, [12, 12], 3, activation="silu", dropout=0.3, norm="batch"),
    "residual and batch norm": lambda: nn.MLP(6, [12, 12], 3, activation="relu", norm="batch", residual=True),
    "all": lambda: nn.MLP(6, [12, 12], 3, activation="relu", dropout=0.3, norm="batch", residual=True),
    "a layer used twice": lambda: torch.nn.Sequential(*[torch.nn.Linear(6, 6), torch.nn.Tanh()] * 2),
    "float64": lambda: nn.MLP(6, [12], 3, activation="gelu_tanh", dropout=0.3, dtype=torch.float64),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VIEWED)
def test_view_agrees_with_autograd_and_leaves_the_model_alone(name: str, training: bool) -> None:
    model = VIEWED[name]().train(training)
    dtype = next(model.parameters()).dtype
    x, y = torch.randn(20, 6, dtype=dtype), torch.randint(3, (20,))
    torch.nn.functional.cross_entropy(model(x), y).backward()  # gives parameters a .grad of their own
    model.zero_grad(set_to_none=False)
    torch.manual_seed(5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    view = backprop_view(model, x, y)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(
        isinstance(p, torch.nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.random.initial_seed() == 5

    assert view.holds, str(view)
    assert len([i for layer in view.layers for i in layer.identities]) >= 10
    assert all(i.relative < (1e-12 if dtype == torch.float64 else 1e-5) for row in view.layers for i in row.identities)
    loss = torch.nn.functional.cross_entropy(model(x), y)  # from the same state of the generator
    assert view.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    loss.backward()
    if name != "a layer used twice":  # there, each call has its own part of the gradient
        for row in view.layers:
            if "dW" in row.gradients:
                torch.testing.assert_close(row.gradients["dW"], model.get_submodule(row.name).weight.grad)
    else:
        both = [row.gradients["dW"] for row in view.layers if row.kind == "Linear"]
        assert [row.name for row in view.layers][:4] == ["0", "1", "0 (call 2)", "1 (call 2)"]
        torch.testing.assert_close(both[0] + both[1], model.get_submodule("0").weight.grad)


def test_delta_is_the_gradient_of_the_pre_activation() -> None:
    model = nn.MLP(6, [5], 3, activation="tanh")
    x, y = torch.randn(7, 6), torch.randn(7, 3)
    view = backprop_view(model, x, y, torch.nn.MSELoss())
    z = (x @ model.hidden1.weight.T + model.hidden1.bias).detach().requires_grad_()
    (delta,) = torch.autograd.grad(torch.nn.functional.mse_loss(model.output(torch.tanh(z)), y), z)
    torch.testing.assert_close(view["hidden1"].delta, delta.double())
    torch.testing.assert_close(view["hidden1"].z, z.detach().double())
    torch.testing.assert_close(view["hidden1"].a, torch.tanh(z.detach()))
    assert view["loss"].backward == ["δ = 2 (ŷ - y)/(number of targets)"]
    with pytest.raises(KeyError, match="hidden1, output, loss"):
        view["hidden3"]


def test_wrong_backward_is_found(tmp_path: Path) -> None:
    class Subclass(torch.nn.Tanh):
        pass

    original = torch.tanh

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = original(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, *dy: Tensor) -> Tensor:
            return dy[0] * (1 - ctx.saved_tensors[0]) ** 2  # the square stands in the wrong place

    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    try:
        torch.tanh = Broken.apply  # type: ignore[assignment]
        view = backprop_view(model, torch.randn(9, 6), torch.randint(3, (9,)))
    finally:
        torch.tanh = original
    assert not view.holds
    assert [(row.name, i.name) for row in view.layers for i in row.identities if not i.holds] == [
        ("1", "δ = ∂L/∂a ⊙ tanh′(z)")
    ]
    assert "1 of them fail" in str(view)
    assert "| **no** |" in view.markdown()
    subclass = torch.nn.Sequential(torch.nn.Linear(6, 4), Subclass(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    table = backprop_view(subclass, torch.randn(9, 6), torch.randint(3, (9,))).save(tmp_path, "view").read_text()
    assert "| 2 (LayerNorm) | y = forward(x) |" in table
    assert "| 0 (Linear) | z = x Wᵀ + b |" in table
    assert "dW = δᵀ x<br>db = Σ δ<br>dx = δ W" in table
    assert "| tanh | tanh(x) | 1 - y² |" in table
    assert (tmp_path / "view_1.png").stat().st_size > 20_000


def test_view_refuses() -> None:
    model, x, y = torch.nn.Linear(6, 3), torch.randn(4, 6), torch.randint(3, (4,))
    with pytest.raises(ValueError, match=r"single number, got the shape \(4,\)"):
        backprop_view(model, x, y, torch.nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(TypeError, match=r"write CrossEntropyLoss\(\)"):
        backprop_view(model, x, y, torch.nn.CrossEntropyLoss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not depend"):
        backprop_view(model, x, y, lambda output, y: output.detach().sum())
    assert all(isinstance(p, torch.nn.Parameter) for p in model._parameters.values())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        backprop_view(model, torch.randn(4, 5), y)
    assert all(isinstance(p, torch.nn.Parameter) for p in model._parameters.values())


def test_backprop_view_in_a_trainer_changes_nothing(tmp_path: Path) -> None:
    class Penalized(Somebodys):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.01 * self.net[0].weight.square().sum()

    runs = []
    for callbacks in ([], [BackpropView(steps=[0, 5])]):
        torch.manual_seed(2)
        runs.append(Penalized(network()))
        trainer(tmp_path, *callbacks).fit(runs[-1], loader(), loader(32))
    assert runs[0].losses == runs[1].losses
    view = callbacks[0].views[5]
    assert set(callbacks[0].views) == {0, 5}
    assert view.holds, str(view)  # although the weight's .grad holds the penalty's gradient too
    assert view.loss > runs[1].losses[5]
    table = (tmp_path / "backprop" / "step_5.md").read_text()
    assert table.count("| yes |") == sum(len(row.identities) for row in view.layers)
    assert "net.1 (BatchNorm1d)" in table
    assert (tmp_path / "backprop" / "step_5_1.png").is_file()
    with pytest.raises(ValueError, match="steps"):
        BackpropView(steps=[-1])
