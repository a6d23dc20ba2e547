"""What each technique does to a training run, measured on small problems. test_technique_data.py has those of data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy

from bp_torch import nn
from bp_torch.recipes import ConfigError
from bp_torch.recipes.callbacks import LearningRateFinder, ProximalL1, SparsityReport
from bp_torch.recipes.callbacks.rate import steepest
from bp_torch.recipes.callbacks.sparsity import KNOWN
from bp_torch.recipes.cli import run
from bp_torch.recipes.data import ArrayData
from bp_torch.recipes.modules import Classifier, Regressor
from bp_torch.recipes.outcome import Outcome

ONE_BACKEND = "recipes; test_convergence.py trains on both"
pytestmark = pytest.mark.usefixtures("own_folder")


def fit(*arguments: str, width: int = 8) -> Outcome:
    quiet = ["enable_progress_bar", "enable_model_summary", "logger"]
    outcome = run(
        [
            *("fit", "--config", "digits", "--model.network.hidden_features", f"[{width}]", "--baselines", "false"),
            *("--data.batch_size", "128", "--trainer.max_epochs", "2"),
            *(part for name in quiet for part in (f"--trainer.{name}", "false")),
            *arguments,
        ]
    )
    assert outcome is not None
    return outcome


class Toy(ArrayData):
    """Two overlapping classes of 4 numbers in groups of 5 rows; class 1 is rare, and two of the numbers tell."""

    classes = ("frequent", "rare")
    grouped = False

    def load(self) -> tuple[np.ndarray, ...]:
        draw = np.random.default_rng(0)
        groups = np.arange(400) // 5
        y = (groups % 10 == 0).astype(np.int64)
        x = draw.normal(size=(400, 4))
        x[:, :2] += 1.2 * y[:, None]
        return (x, y, groups) if self.grouped else (x, y)


def trainer(**settings: Any) -> Trainer:
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "enable_checkpointing": False}
    common = {"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return Trainer(**{**common, **quiet, **settings})


def sgd(lr: float, **settings: Any) -> Any:
    return functools.partial(torch.optim.SGD, lr=lr, **settings)


# Regularization

OPTIMIZERS: dict[str, Any] = {
    "SGD": sgd(0.5),
    "momentum": sgd(0.1, momentum=0.9, dampening=0.3),
    "Nesterov": sgd(0.05, momentum=0.9, nesterov=True),
    "Adam": functools.partial(torch.optim.Adam, lr=0.05),
    "AMSGrad": functools.partial(torch.optim.Adam, lr=0.05, amsgrad=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.0),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.02, momentum=0.5),
    "centered": functools.partial(torch.optim.RMSprop, lr=0.01, centered=True),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=0.5, lr_decay=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_proximal_l1_ends_where_its_objective_is_stationary(name: str) -> None:
    """Logistic regression, of which 2 of 6 columns matter: the optimality conditions hold, with every optimizer."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 3.0, 1.0, 0.3, 1.0, 2.0])
    y = (x[:, 0] + x[:, 1] / 3 + 0.5 * torch.randn(300, generator=draw, dtype=torch.float64) > 0.3).long()
    layer = nn.Linear(6, 2, dtype=torch.float64)
    torch.nn.init.constant_(layer.bias, 1e-3)
    optimizer = OPTIMIZERS[name](layer.parameters())
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.997)
    weight = 0.03
    optimizer.register_step_post_hook(ProximalL1(weight).shrink)
    for _ in range(1600):
        optimizer.zero_grad()
        cross_entropy(layer(x), y).backward()
        optimizer.step()
        decay.step()
    w, g = layer.weight.detach(), torch.autograd.grad(cross_entropy(layer(x), y), layer.weight)[0]
    zero = w == 0
    assert zero[:, 2:].all()  # the columns that say nothing
    assert not zero[:, :2].all()
    assert g[zero].abs().max() <= weight * 1.001
    assert (g + weight * w.sign())[~zero].abs().max() < 0.002 * weight
    assert not (layer.bias == 0).any()


def test_proximal_step_is_the_soft_threshold() -> None:
    w = torch.nn.Parameter(torch.tensor([[3.0, -0.2, 0.2, -1.0]]))
    b, frozen = torch.nn.Parameter(torch.tensor([0.01])), torch.nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.SGD([w, b, frozen], lr=0.5)
    optimizer.register_step_post_hook(ProximalL1(0.6).shrink)
    w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)
    optimizer.step()
    assert w.tolist() == [pytest.approx([2.7, 0, 0, -0.7])]
    assert w[0, 1] == w[0, 2] == 0
    assert b.item() == pytest.approx(0.01)
    assert frozen.item() == 1  # it has no gradient, so it was not stepped


def test_proximal_l1_in_a_trainer(tmp_path: Path) -> None:
    """Once for each step when gradients are accumulated; its numbers are logged; nothing of it stays behind."""
    model = Classifier(nn.MLP(4, [6], 2), sgd(0.1))
    watched: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            watched.append((float(trainer.global_step), float(model.network.hidden1.weight.detach().abs().sum())))

    l1, sparsity = ProximalL1(0.02), SparsityReport()
    run = trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[l1, sparsity, Watch()], default_root_dir=tmp_path)
    run.fit(model, Toy(batch_size=64, seed=0))
    weights = [p for p in model.parameters() if p.ndim > 1]
    size = float(sum(p.detach().abs().sum() for p in weights))
    zeros, total = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
    assert float(run.callback_metrics["l1_penalty"]) == pytest.approx(0.02 * size)
    assert float(run.callback_metrics["sparsity"]) == pytest.approx(zeros / total)
    assert 0 < zeros < total
    first = float((model.network.hidden1.weight == 0).double().mean())
    assert float(run.callback_metrics["sparsity/hidden1"]) == pytest.approx(first)
    assert len(sparsity.rows) == 3
    assert (tmp_path / "figures" / "sparsity.png").stat().st_size > 5000
    pairs = list(pairwise(watched))
    assert [before[1] != after[1] for before, after in pairs] == [before[0] != after[0] for before, after in pairs]
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_proximal_l1_refuses_optimizers_it_does_not_know() -> None:
    model = Classifier(nn.MLP(4, [6], 2), functools.partial(torch.optim.Adamax, lr=0.1))
    with pytest.raises(ConfigError, match="step size of Adamax is not known, but those of SGD, Adam, AdamW"):
        trainer(max_epochs=1, callbacks=[ProximalL1(0.1)]).fit(model, Toy(seed=0))
    assert all(issubclass(kind, torch.optim.Optimizer) for kind in KNOWN)
    with pytest.raises(ValueError, match="weight must be finite"):
        ProximalL1(-1)


@pytest.mark.parametrize(
    ("penalty", "value"),
    [
        (nn.L1Penalty(0.3), lambda w: 0.3 * w.abs().sum()),
        (nn.L2Penalty(0.3), lambda w: 0.3 * w.square().sum()),
        (nn.ElasticNetPenalty(0.3, 0.2), lambda w: 0.3 * (0.2 * w.abs() + 0.8 * w.square()).sum()),
    ],
)
def test_penalty_is_logged_apart_and_leaves_biases(penalty: torch.nn.Module, value: Callable[[Any], Any]) -> None:
    model = Classifier(nn.Linear(4, 2), sgd(0.0), penalty=penalty)
    torch.nn.init.constant_(model.network.bias, 50.0)
    data, run = Toy(batch_size=512, seed=0), trainer(max_epochs=1)
    gradients: list[torch.Tensor] = []
    model.on_before_optimizer_step = lambda optimizer: gradients.append(model.network.bias.grad.clone())  # type: ignore
    run.fit(model, data)
    x, y = data.prepare(*data.splits["train"])
    loss = cross_entropy(model(x), y)
    assert float(run.callback_metrics["penalty"]) == pytest.approx(float(value(model.network.weight.detach())))
    assert float(run.callback_metrics["train_loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(loss, model.network.bias)[0])


def test_weight_decay_is_decoupled() -> None:
    """With no gradient at all, a step of AdamW shrinks weights by lr λ and leaves biases."""
    model = Classifier(nn.Linear(4, 2), functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.05))
    with torch.no_grad():
        before = [p.clone() for p in model.parameters()]
    optimizer = model.configure_optimizers()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.network.weight.detach(), before[0] * (1 - 0.1 * 0.05))
    torch.testing.assert_close(model.network.bias.detach(), before[1], rtol=0, atol=0)


def test_label_smoothing_and_class_weights_are_their_formulas() -> None:
    data = Toy(batch_size=512, seed=0)
    model = Classifier(nn.Linear(4, 2), sgd(0.0), label_smoothing=0.2, class_weight="balanced")
    run = trainer(max_epochs=1)
    run.fit(model, data)
    x, y = data.prepare(*data.splits["train"])
    counts = torch.bincount(y)
    weight = len(y) / (2 * counts)
    assert model.weights.tolist() == pytest.approx(weight.tolist())
    logp = model(x).log_softmax(1)
    target = torch.eye(2)[y] * 0.8 + 0.1  # (1 - ε) onehot + ε / k
    loss = -(target * weight * logp).sum() / weight[y].sum()
    assert float(run.callback_metrics["train_loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    x, y = data.prepare(*data.splits["val"])
    plain = -model(x).log_softmax(1)[torch.arange(len(y)), y].mean()
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert "weights" not in model.state_dict()


def test_class_weights_find_the_rare_class() -> None:
    def recall(**settings: Any) -> float:
        torch.manual_seed(0)
        data = Toy(batch_size=64, seed=0)
        model = Classifier(nn.Linear(4, 2), functools.partial(torch.optim.Adam, lr=0.05), **settings)
        trainer(max_epochs=10).fit(model, data)
        x, y = data.prepare(*data.splits["test"])
        return float((model(x).argmax(1) == y)[y == 1].float().mean())

    assert recall(class_weight="balanced") > recall() + 0.3


def test_class_weights_need_rows_of_each_class() -> None:
    class Missing(Toy):
        classes = ("frequent", "rare", "never")

    with pytest.raises(ConfigError, match="no row of class never"):
        trainer(max_epochs=1).fit(Classifier(nn.Linear(4, 3), sgd(0.1), class_weight="balanced"), Missing(seed=0))
    with pytest.raises(ValueError, match="class_weight"):
        Classifier(nn.Linear(4, 2), class_weight=[1.0, -1.0])


def test_a_regressor_can_be_penalized() -> None:
    """The page is shared: a penalty and a schedule work in any task."""
    x = torch.randn(64, 3)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x @ torch.tensor([1.0, 0.0, 0.0])), 64)
    model = Regressor(nn.Linear(3, 1), sgd(0.2))
    trainer(max_epochs=100, limit_val_batches=0, callbacks=[ProximalL1(0.2)]).fit(model, rows, rows)
    assert (model.network.weight == 0).tolist() == [[False, True, True]]


# The trainer's own switches


def test_accumulated_batches_step_as_one_batch_of_their_size() -> None:
    def end(batch_size: int, batches: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = Classifier(nn.MLP(4, [8], 2), sgd(0.5), penalty=nn.L2Penalty(0.01)).double()
        data = Toy(batch_size=batch_size, seed=0, val_fraction=0.2, test_fraction=0.2)  # 240 rows to train on
        data.prepare = lambda x, *rest: (data.standardize(x).double(), *rest)  # type: ignore[method-assign]
        run = trainer(max_epochs=2, accumulate_grad_batches=batches)
        run.fit(model, data)
        assert run.global_step == 2 * 240 / (batch_size * batches)
        return model.network.hidden1.weight.detach()

    one = end(48, 1)
    torch.testing.assert_close(end(12, 4), one, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(end(12, 1), one)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_bounds_the_gradient(algorithm: str) -> None:
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []

    def gradient(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(lambda *_: after.append(gradient(module)))

        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            before.append(gradient(module))

    model = Classifier(nn.MLP(4, [8], 2), sgd(0.1))
    clip = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    trainer(max_epochs=2, callbacks=[Watch()], **clip).fit(model, Toy(batch_size=64, seed=0))
    assert len(before) == len(after) > 4
    for raw, clipped in zip(before, after, strict=True):
        if algorithm == "norm":
            expected = raw * min(1.0, 0.05 / (float(raw.norm()) + 1e-6))
        else:
            expected = raw.clamp(-0.05, 0.05)
        torch.testing.assert_close(clipped, expected)
    assert any(not torch.equal(raw, clipped) for raw, clipped in zip(before, after, strict=True))


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32() -> None:
    seen: set[torch.dtype] = set()
    model = Classifier(nn.MLP(4, [8], 2), sgd(0.1))
    model.network.hidden1.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer(max_epochs=1, precision="bf16-mixed").fit(model, Toy(seed=0))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Early stopping, plateau, learning-rate finder


def test_early_stopping_restores_the_best_weights() -> None:
    stop = ["--config", "techniques/early_stopping", "--early_stopping.patience", "3", "--trainer.max_epochs", "60"]
    outcome = fit(*stop, "--model.optimizer.lr", "0.5", "--report", "false")
    assert len(outcome.history) == outcome.best_epoch + 3 < 60
    losses = [row["val_loss"] for row in outcome.history]
    assert outcome.best_epoch == 1 + losses.index(min(losses))
    assert outcome.reason == "val_loss had not improved for 3 epochs"
    assert [step for step, _ in outcome.rates] == list(range(10 * len(losses)))  # what testing restores is not told
    folder = outcome.run / "checkpoints"
    best, last = (torch.load(folder / name, weights_only=True)["state_dict"] for name in ("best.ckpt", "last.ckpt"))
    key = "network.output.weight"
    assert torch.equal(outcome.task.state_dict()[key], best[key])
    assert not torch.equal(best[key], last[key])


def test_the_rate_is_lowered_before_training_stops() -> None:
    """A threshold that no loss meets: a plateau in every epoch after the first."""
    never = ["--model.schedule.patience", "0", "--model.schedule.threshold", "0.99", "--trainer.max_epochs", "4"]
    lower = ["--config", "techniques/early_stopping_lower_rate", *never, "--report", "false"]
    outcome = fit(*lower)
    rates = [row["lr"] for row in outcome.history]
    assert rates == pytest.approx([0.003, 0.003, 0.0006, 0.00012])
    assert outcome.reason == "max_epochs = 4 reached"

    more = [*lower, "--trainer.max_epochs", "50", "--ckpt_path", "last"]
    outcome = fit(*more)
    rates = [row["lr"] for row in outcome.history]
    assert rates == pytest.approx([0.003, 0.003, 0.0006, 0.00012, 0.000024])
    assert outcome.reason == "the learning rate had been lowered 3 times, and another plateau came"
    assert len(fit(*more).history) == 5  # it had stopped, and stays so


def test_the_learning_rate_that_was_found_is_trained_with() -> None:
    finder = ["--config", "techniques/cosine", "--config", "techniques/lr_finder"]
    outcome = fit(*finder)
    found = next(callback for callback in outcome.callbacks if isinstance(callback, LearningRateFinder))
    assert 1e-6 < found.found < 1
    assert len(found.rates) == len(found.losses) > 40  # longer than the two epochs of the run
    ratios = np.array(found.rates[2:]) / np.array(found.rates[1:-1])
    assert ratios == pytest.approx(10 ** (6 / 100), rel=1e-3)
    assert found.rates[-1] == pytest.approx(1, rel=0.2)
    expected = [found.found * (1 + math.cos(math.pi * t / 20)) / 2 for t in range(20)]
    assert [rate for _, rate in outcome.rates] == pytest.approx(expected)
    assert (outcome.run / "figures" / "lr_finder.png").stat().st_size > 5000
    assert "(figures/lr_finder.png)" in (outcome.run / "report.md").read_text()

    resumed = fit(*finder, "--ckpt_path", "last", "--trainer.max_epochs", "3", "--report", "false")
    again = next(callback for callback in resumed.callbacks if isinstance(callback, LearningRateFinder))
    assert (again.found, again.rates) == (found.found, found.rates)
    assert len(resumed.rates) == 30


def test_steepest_fall_by_the_logarithm_of_the_rate() -> None:
    rates = [10 ** (k / 10 - 6) for k in range(61)]
    losses = [2 - math.tanh(math.log10(rate) + 2) for rate in rates]  # steepest at 0.01
    assert steepest(rates, losses) == pytest.approx(0.01)
    assert steepest(rates, [*losses[:50], *[math.nan] * 11]) == pytest.approx(0.01)
    with pytest.raises(ConfigError, match="num_training_steps: too few steps"):
        steepest(rates[:12], losses[:12])


def test_the_report_shows_them() -> None:
    outcome = fit("--config", "techniques/elastic_net", "--config", "techniques/warmup", "--data.batch_size", "16")
    report = (outcome.run / "report.md").read_text()
    for name in ("learning_rate", "penalty", "sparsity"):
        assert f"(figures/{name}.png)" in report
    row = next(line for line in report.splitlines() if line.startswith("| all |"))
    zeros = sum(int((p == 0).sum()) for p in outcome.task.network.parameters() if p.ndim > 1)
    assert f"| {zeros:,} (" in row
