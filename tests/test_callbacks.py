"""The callbacks that anyone can put into a Trainer of their own, on LightningModules that know nothing of bp_torch."""

from __future__ import annotations

import csv
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import bp_torch
from bp_torch.recipes.callbacks import (
    BackpropView,
    ConvertLayers,
    FlowRecorder,
    GradientFlow,
    Report,
    flow_figure,
)

ONE_BACKEND = "what callbacks see and write; the layers are tested on both"


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.Tanh(),
        torch.nn.Linear(16, 3),
    )  # fmt: skip


class Somebodys(LightningModule):
    """A LightningModule as somebody else writes it."""

    def __init__(self, network: torch.nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.net, self.lr = network, lr
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.net(batch[0])
        self.log("val_loss", torch.nn.functional.cross_entropy(output, batch[1]))
        self.log("val_accuracy", (output.argmax(1) == batch[1]).float().mean())

    def on_train_epoch_end(self) -> None:
        self.log("late", float(self.current_epoch + 1))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def loader(rows: int = 64, batch: int = 16) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "callbacks": list(callbacks),
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_epochs": 3,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(settings | options))


# ---- ConvertLayers


def test_converted_module_trains_as_before_and_shares_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = Somebodys(network())
    torch.manual_seed(3)
    converted = Somebodys(network())
    callback = ConvertLayers()
    trainer(tmp_path).fit(plain, loader(), loader(32))
    run = trainer(tmp_path, callback)
    run.fit(converted, loader(), loader(32))
    assert converted.losses == pytest.approx(plain.losses, rel=1e-4)
    assert converted.losses[-1] < 0.9 * converted.losses[0]

    assert [type(module) for module in converted.net] == [type(module) for module in plain.net]
    assert callback.report is not None
    assert callback.report.count("fused") == 4
    assert "net.3" in str(callback.report)

    run.save_checkpoint(tmp_path / "converted.ckpt")
    other = Somebodys(network())
    other.load_state_dict(torch.load(tmp_path / "converted.ckpt", weights_only=True)["state_dict"])
    x = next(iter(loader()))[0]
    torch.testing.assert_close(other.eval().net(x), converted.eval().net(x))
    assert bp_torch.conversion_report(other).count("left") == len(other.net)


def test_layers_built_in_configure_model_are_converted_and_reverted(tmp_path: Path) -> None:
    class Late(Somebodys):
        seen = 0

        def configure_model(self) -> None:
            if isinstance(self.net, torch.nn.Identity):
                self.net = network()

        def on_train_start(self) -> None:
            self.seen = bp_torch.conversion_report(self).count("fused")

    module = Late(torch.nn.Identity())
    trainer(tmp_path, ConvertLayers(revert=True, verbose=False), max_epochs=1).fit(module, loader(), loader(32))
    assert module.seen == 4
    assert bp_torch.conversion_report(module).count("fused") == 0


# ---- GradientFlow


class Scale(torch.autograd.Function):
    """x forward; its gradient times a number backward: a fault that can be planted anywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        return dy[0] * ctx.factor, None


class Fault(torch.nn.Module):
    """Multiplies the gradient of all before it from a step on."""

    def __init__(self, factor: float, after: int = 0) -> None:
        super().__init__()
        self.factor, self.after, self.calls = factor, after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return Scale.apply(x, self.factor if self.calls > self.after else 1.0)


def with_fault(factor: float, after: int = 0) -> torch.nn.Sequential:
    layers = list(network())
    return torch.nn.Sequential(*layers[:3], Fault(factor, after), *layers[3:])


def flow_warnings(module: LightningModule, folder: Path, callback: GradientFlow, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, callback, **options).fit(module, loader(), loader(32))
    return [str(w.message) for w in caught if "GradientFlow" in str(w.message)]


def test_healthy_network_is_left_in_peace_and_its_numbers_are_right(tmp_path: Path) -> None:
    class Watched(Somebodys):
        """Measures the first layer itself."""

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.numbers = getattr(self, "numbers", [])
            self.before = [p.detach().clone() for p in self.net[0].parameters()]
            g = torch.cat([p.grad.flatten() for p in self.net[0].parameters()])
            self.numbers.append([float(g.norm()), float((g == 0).float().mean())])

        def on_train_batch_end(self, *_: Any) -> None:
            w = torch.cat([p.flatten() for p in self.before])
            now = torch.cat([p.detach().flatten() for p in self.net[0].parameters()])
            self.numbers[-1].append(float((now - w).norm() / w.norm()))

    module, callback = Watched(network()), GradientFlow()
    logger = TensorBoardLogger(tmp_path, "", "")
    assert flow_warnings(module, tmp_path, callback, logger=logger, log_every_n_steps=5) == []
    assert callback.warned == {}
    with (tmp_path / "gradient_flow.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows[:4]] == ["net.0", "net.1", "net.3", "net.5"]
    assert {int(row["step"]) for row in rows} == set(range(12))
    for row, own in zip([row for row in rows if row["layer"] == "net.0"], module.numbers, strict=True):
        assert [float(row[name]) for name in ("norm", "zeros", "update")] == pytest.approx(own, rel=1e-4, abs=1e-9)
    assert (tmp_path / "gradient_flow.png").stat().st_size > 20_000

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = events.Scalars("gradient_flow/update/net.0")
    assert [event.step for event in scalars] == [0, 5, 10]
    assert scalars[1].value == pytest.approx(module.numbers[5][2], rel=1e-4)
    assert events.Tags()["images"] == ["gradient_flow"]


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1e-9, "vanishes"), (0.0, "vanishes"), (1e6, "explodes"), (math.nan, "NaN"), (math.inf, "NaN")],
)
def test_planted_fault_is_named(factor: float, words: str, tmp_path: Path) -> None:
    callback = GradientFlow(patience=3)
    told = flow_warnings(Somebodys(with_fault(factor), lr=0.0), tmp_path, callback)
    if not math.isfinite(factor):  # such weights make the next forward pass NaN, and so all layers
        assert len(told) == 4
        told = [text for text in told if "step 0:" in text]
    assert len(told) == 2  # one for each layer before the fault, although every step is faulty
    for name, text in zip(("net.0", "net.1"), told, strict=True):
        assert f"layer '{name}'" in text
        assert words in text
    assert list(callback.warned)[:2] == ["net.0", "net.1"]
    assert (tmp_path / "gradient_flow.png").stat().st_size > 10_000


def test_fault_that_begins_later_is_named_with_its_step(tmp_path: Path) -> None:
    told = flow_warnings(Somebodys(with_fault(1e-9, after=4), lr=0.0), tmp_path, GradientFlow(patience=3))
    assert len(told) == 2
    assert all("step 6:" in text for text in told)
    assert flow_warnings(Somebodys(with_fault(1e-9, after=10), lr=0.0), tmp_path, GradientFlow(patience=3)) == []
    assert flow_warnings(Somebodys(with_fault(1e-9), lr=0.0), tmp_path, GradientFlow(vanishing=0.0)) == []


def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    callback = GradientFlow()
    module = Somebodys(network())
    assert flow_warnings(module, tmp_path, callback, accumulate_grad_batches=2) == []
    assert callback.flow.steps == list(range(6))
    assert callback.step == 6
    assert (callback.flow.measure("update") > 0).all()


def test_memory_is_bounded_and_covers_the_run() -> None:
    model = torch.nn.Linear(3, 2)
    recorder = FlowRecorder(model, records=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 3)
    for step in range(1000):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        recorder.before_step(step)
        optimizer.step()
        recorder.after_step(step)
        assert len(recorder.steps) <= 16
        assert len(recorder.values) <= 64
    assert recorder.stride == 128
    assert recorder.steps == list(range(0, 1000, 128))
    assert recorder.measure("norm").shape == (len(recorder.steps), 1)
    again = FlowRecorder(model, records=16)
    again.load_state_dict(recorder.state_dict())
    assert again.csv() == recorder.csv()
    assert flow_figure(again).axes


def test_gradients_too_small_for_float32_squares_are_measured() -> None:
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-30)
    norm, zeros = FlowRecorder(model).before_step(0)["(model)"]
    assert norm == pytest.approx(1e-30 * math.sqrt(8), rel=1e-5)
    assert zeros == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("vanishing", 1.0), ("exploding", 0.0), ("patience", 0), ("every_n_steps", 0), ("records", 7)],
)
def test_gradient_flow_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        GradientFlow(**{name: value})  # type: ignore[arg-type]


# ---- Report


def test_report_tells_the_training(tmp_path: Path) -> None:
    module = Somebodys(network())
    callback, stopping = Report(), EarlyStopping("val_loss", patience=1, stopping_threshold=1.02)
    trainer(tmp_path, callback, stopping, max_epochs=30).fit(module, loader(), loader(32))
    epochs = len(callback.rows)
    assert 1 <= epochs < 30
    text = (tmp_path / "training_report.md").read_text()
    assert "# Somebodys" in text
    assert "| why it stopped | Stopping threshold reached" in text
    assert f"| epochs, steps | {epochs}, {4 * epochs} |" in text
    lowest = min((row["val_loss"], int(row["epoch"])) for row in callback.rows)
    highest = max(callback.rows, key=lambda row: row["val_accuracy"])
    assert re.search(rf"\| val_loss \| \S+ \| {lowest[0]:.5g} \({lowest[1]}\) \|", text)
    assert f"| {highest['val_accuracy']:.5g} (" in text
    losses = torch.tensor(module.losses).reshape(epochs, 4).mean(1)
    assert [row["train_loss"] for row in callback.rows] == pytest.approx(losses.tolist(), rel=1e-5)
    assert [row["late"] for row in callback.rows] == list(range(1, epochs + 1))  # logged after the callbacks' turn
    assert [row["lr of optimizer 1, group 1"] for row in callback.rows] == pytest.approx(
        [0.05 * 0.5**epoch for epoch in range(epochs)]
    )
    assert "| net.0 | Linear | 112 | weight 16×6, bias 16 |" in text
    for name in ("metrics", "lr"):
        assert f"(figures/training_report_{name}.png)" in text
        assert (tmp_path / "figures" / f"training_report_{name}.png").stat().st_size > 10_000


def test_report_of_an_interrupted_run(tmp_path: Path) -> None:
    class Failing(Somebodys):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == 1:
                raise RuntimeError("the disk | is\nfull")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="disk"):
        trainer(tmp_path, Report(name="mine")).fit(Failing(network()), loader(), loader(32))
    text = (tmp_path / "mine.md").read_text()
    assert r"| why it stopped | RuntimeError: the disk \| is full |" in text
    assert "| epochs, steps | 1, 4 |" in text
    with pytest.raises(ValueError, match="name"):
        Report(name="a/b")


def test_all_together_and_resumed(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [ConvertLayers(verbose=False), GradientFlow(), BackpropView(), Report()]

    torch.manual_seed(1)
    first = trainer(tmp_path, *callbacks(), max_epochs=2)
    first.fit(Somebodys(network()), loader(), loader(32))
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = callbacks()
    trainer(tmp_path, *again, max_epochs=3).fit(
        Somebodys(network()), loader(), loader(32), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    flow, view, report = again[1:]
    assert isinstance(flow, GradientFlow)
    assert isinstance(view, BackpropView)
    assert isinstance(report, Report)
    assert flow.flow.steps == list(range(12))
    assert view.views == {}
    assert [row["epoch"] for row in report.rows] == [1, 2, 3]
