"""The one page of Lightning that every recipe shares: what varies is in the YAML files, and in a task's loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bp_torch import functional, nn

from . import ConfigError
from .callbacks.run import validates
from .data import Batches, Data
from .outcome import Outcome, Section
from .report import classification_sections
from .schedules import Settings, build, move_to, takes_length

Batch = Sequence[Any]
Metrics = dict[str, Tensor]


class Task(LightningModule):
    """A network, its optimizer and its schedule. A subclass says what the loss is: `loss_and_metrics`.

    Args:
        network: any module from the first member of a batch to an output, such as `bp_torch.nn.MLP`.
        optimizer: called with the parameters; matrices in one group, biases and norm parameters in a second one that
            is exempt from weight decay.
        schedule: called with the optimizer; None keeps the learning rate. A length that is 0, such as `T_max`, becomes
            that of the run, and a `max_lr` of 0 the optimizer's rate (`schedules.build`).
        interval: whether the schedule advances with each epoch or with each optimizer step.
        monitor: the metric that `ReduceLROnPlateau` watches.
        penalty: added to the training loss: a module called with the network's matrices, such as
            `bp_torch.nn.L1Penalty`. Biases and norm parameters are exempt. It is logged apart, as `penalty`.
    """

    formats: ClassVar[dict[str, str]] = {}
    """How to write each test metric, `format` style, the one that matters most first."""

    def __init__(
        self,
        network: torch.nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: LRSchedulerCallable | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val_loss",
        penalty: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.interval, self.monitor = interval, monitor
        self.penalty = penalty
        self.planned: dict[str, int] | None = None  # of the run that is resumed, by its checkpoint
        self.lr: float | None = None  # what a learning-rate finder found, in place of the optimizer's own

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The mean loss over a batch, and other numbers to log; `self.training` tells training from measuring."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_and_metrics(batch)")

    def check(self, data: Data) -> None:
        """Refuse a network that does not fit the data, by `ConfigError`; called before training, after `data.setup`."""

    def test_metrics(self, outputs: Tensor, data: Data) -> dict[str, float]:
        """Numbers that need the whole test split at once, from what `predict_step` gave for it."""
        return {}

    def report_sections(self, outcome: Outcome) -> list[Section]:
        """What the report says beyond losses, learning rate and gradient norms."""
        return []

    def predictions(self, outputs: Tensor, data: Data) -> tuple[list[str], Iterable[Sequence[object]]]:
        """The header and the rows of `predictions.csv`, from what `predict_step` gave for the test split."""
        raise NotImplementedError(f"{type(self).__name__} must define predictions(outputs, data)")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._step(batch, "train")
        if isinstance(self.trainer.train_dataloader, Batches):
            loss = loss * self.trainer.train_dataloader.weight(batch_idx)
        if self.penalty is None:
            return loss
        penalty = self.penalty(matrices(self.network))
        self._log({"penalty": penalty}, batch)
        return loss + penalty

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The network's output for a batch."""
        return self(batch[0])

    def _step(self, batch: Batch, stage: str) -> Tensor:
        loss, metrics = self.loss_and_metrics(batch)
        named = {f"{stage}_loss": loss} | {f"{stage}_{name}": value for name, value in metrics.items()}
        self._log(named, batch, prog_bar=stage == "val")
        return loss

    def _log(self, values: Metrics, batch: Batch, prog_bar: bool = False) -> None:
        """The mean over an epoch's rows, of all processes that train together."""
        # Lightning takes the mean of the processes' numbers of rows as a whole number: here it is one.
        rows = len(batch[0]) * self.trainer.world_size
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=rows, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self))
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        if self.make_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def _scheduler(self, optimizer: Optimizer) -> dict[str, Any]:
        schedule = self._schedule(optimizer)
        if not isinstance(schedule, ReduceLROnPlateau):
            return {"scheduler": schedule, "interval": self.interval}
        # Lightning advances this one at the end of an epoch, but after the epoch's checkpoint is saved, so a resumed
        # run would be an epoch behind. "Every so many steps" comes before, and is the same moment otherwise.
        return {"scheduler": schedule, "interval": "step", "frequency": self._frequency(), "monitor": self.monitor}

    def _schedule(self, optimizer: Optimizer) -> Any:
        assert self.make_schedule is not None
        try:
            return build(self.make_schedule, optimizer, self._length(), self.interval)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.init_args.schedule: {error}") from error

    def _frequency(self) -> int:
        return self._batches() if self.interval == "epoch" else 1

    def _batches(self) -> int:
        """Of an epoch; of data without an end, so many that no count reaches them."""
        self.trainer.fit_loop.setup_data()  # it is made once; until then there would be infinitely many
        batches = self.trainer.num_training_batches
        return int(batches) if math.isfinite(batches) else sys.maxsize

    def _length(self) -> int:
        """The length of the whole run, in the unit in which the schedule advances; 0 if it has no end."""
        steps = self.trainer.estimated_stepping_batches
        epochs = self.trainer.max_epochs
        if self.interval == "epoch" and epochs is not None and epochs > 0:
            return epochs
        if not math.isfinite(steps):
            return 0
        return int(steps) if self.interval == "step" else -(-int(steps) // self._steps_of_epoch())

    def _steps_of_epoch(self) -> int:
        return max(1, -(-self._batches() // self.trainer.accumulate_grad_batches))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.lr_scheduler_configs:
            checkpoint["schedule"] = {"length": self._length(), "steps_of_epoch": self._steps_of_epoch()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.planned = checkpoint.get("schedule")

    def on_train_start(self) -> None:
        """Let the schedule of a resumed run, which restored the length that was planned, take that of this run."""
        planned, self.planned = self.planned, None
        if planned is None or self.make_schedule is None or not takes_length(self.make_schedule):
            return
        now = {"length": self._length(), "steps_of_epoch": self._steps_of_epoch()}
        if now == planned or (self.interval == "epoch" and now["length"] == planned["length"]):
            return
        schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
        done = schedule.last_epoch
        if self.interval == "step" and self.trainer.max_steps == -1:
            done = round(done * now["steps_of_epoch"] / planned["steps_of_epoch"])
        rate = float(schedule.optimizer.param_groups[0]["lr"])
        settings = Settings(self.make_optimizer(parameter_groups(self)), self.lr)
        move_to(schedule, self._schedule(settings), done)
        if self.trainer.is_global_zero:
            print(
                f"the run was {planned['length']} {self.interval}s long and is now {now['length']}: its schedule goes "
                f"on at {done} with a rate of {schedule.optimizer.param_groups[0]['lr']:.3g} in place of {rate:.3g}",
                file=sys.stderr,
            )

    def on_train_epoch_start(self) -> None:
        """An epoch without validation has nothing to tell a schedule that watches a metric of it."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                told = validates(self.trainer) or not self.monitor.startswith("val_")
                config.frequency = self._frequency() if told else sys.maxsize


class Classifier(Task):
    """Softmax cross-entropy over a network's logits.

        logits = network(x), x flattened to (N, features)    loss = mean over rows of -log softmax(logits)[class]

    Args:
        label_smoothing: as in `CrossEntropyLoss`; training loss only.
        class_weight: "balanced" weighs the rows of class c by w_c = n / (k n_c), for n training rows, k classes and
            n_c training rows of c; or the weight of each class. The mean is then Σ w loss / Σ w. Training loss only,
            so that losses of runs with and without it compare.
        The others: as in `Task`.
    """

    formats: ClassVar[dict[str, str]] = {"accuracy": ".2%", "loss": ".4f"}
    weights: Tensor | None

    def __init__(
        self,
        *args: Any,
        label_smoothing: float = 0.0,
        class_weight: Literal["balanced"] | list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if isinstance(class_weight, (list, tuple)) and not all(0 <= w < math.inf for w in class_weight):
            raise ValueError(f"class_weight must be numbers that are finite and ≥ 0, got {class_weight}")
        self.label_smoothing, self.class_weight = label_smoothing, class_weight
        self.loss = nn.CrossEntropyLoss()
        # Not in checkpoints: it comes from the training split, which a checkpoint's seed gives again.
        self.register_buffer("weights", None, persistent=False)

    def setup(self, stage: str) -> None:
        """Take class weights from the training split."""
        if stage == "fit" and self.class_weight is not None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if data is None:
                raise ConfigError("model.init_args.class_weight: needs a data module, for its training split")
            self.weights = self.weigh(data).to(self.device)

    def weigh(self, data: Data) -> Tensor:
        """The weight of each class, (classes,)."""
        key, classes = "model.init_args.class_weight", len(data.classes)
        if self.class_weight != "balanced":
            weights = torch.tensor(self.class_weight)
            if len(weights) != classes:
                raise ConfigError(f"{key}: {len(weights)} weights for {classes} classes")
            return weights
        counts = torch.bincount(data.splits["train"][1], minlength=classes)
        if not counts.all():
            missing = ", ".join(data.classes[int(c)] for c in (counts == 0).nonzero())
            raise ConfigError(f"{key}: the training split has no row of class {missing}")
        return counts.sum() / (classes * counts)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        return self.network(x.flatten(1))

    def training_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean loss with label smoothing and class weights."""
        return functional.cross_entropy(logits, y, self.weights, label_smoothing=self.label_smoothing)

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        x, y = batch
        logits = self(x)
        loss = self.training_loss(logits, y) if self.training else self.loss(logits, y)
        return loss, {"accuracy": (logits.argmax(1) == y).float().mean()}

    def check(self, data: Data) -> None:
        """Put two rows through the network, for its refusal and for the number of classes."""
        x = data.example(2)[0]
        got = output_shape(self, x, f"the data's rows have {x.flatten(1).shape[1]} features")
        expected = (2, len(data.classes))
        if got != expected:
            raise ConfigError(
                f"model.init_args.network: two rows of data of {expected[1]} classes should give {expected}, not {got}"
            )
        if self.class_weight is not None:
            self.weigh(data)

    def report_sections(self, outcome: Outcome) -> list[Section]:
        return classification_sections(outcome)

    def predictions(self, outputs: Tensor, data: Data) -> tuple[list[str], Iterable[Sequence[object]]]:
        classes, probability = data.classes, outputs.softmax(1)
        header = ["row", "true", "predicted", *(f"p({name})" for name in classes)]
        return header, (
            [row, classes[true], classes[p.argmax()], *(f"{value:.6f}" for value in p)]
            for row, (true, p) in enumerate(zip(data.splits["test"][1], probability, strict=True))
        )


class Regressor(Task):
    """Mean squared error of a network's linear output.

        ŷ = network(x), x flattened to (N, features)    loss = mean of (ŷ - y)²

    The targets y are (N,) or (N, outputs). If the data standardizes them (`data.target_scale`), losses are of the
    standardized targets, and `rmse` is in the units of the data.

    Args: as in `Task`.
    """

    formats: ClassVar[dict[str, str]] = {"rmse": ".4f", "loss": ".4f"}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(1))

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        x, y = batch
        return functional.mse_loss(self(x).reshape(y.shape), y), {}

    def check(self, data: Data) -> None:
        x, y = data.example(2)[:2]
        got = output_shape(self, x, f"the data's rows have {x.flatten(1).shape[1]} features")
        expected = tuple(y.reshape(2, -1).shape)
        if got != expected:
            raise ConfigError(f"model.init_args.network: two rows of data should give {expected}, not {got}")

    def test_metrics(self, outputs: Tensor, data: Data) -> dict[str, float]:
        y = data.splits["test"][1]
        return {"rmse": float((outputs.reshape(y.shape) - y).square().mean().sqrt() * data.target_scale)}

    def predictions(self, outputs: Tensor, data: Data) -> tuple[list[str], Iterable[Sequence[object]]]:
        y = data.splits["test"][1]
        true, predicted = (t.reshape(len(y), -1) * data.target_scale + data.target_mean for t in (y, outputs))
        names = [""] if true.shape[1] == 1 else [f"_{i}" for i in range(true.shape[1])]
        header = ["row", *(f"true{name}" for name in names), *(f"predicted{name}" for name in names)]
        return header, ([i, *t.tolist(), *p.tolist()] for i, (t, p) in enumerate(zip(true, predicted, strict=True)))


def output_shape(task: Task, x: Tensor, about: str) -> tuple[int, ...]:
    """The shape of the task's output for x in evaluation mode; a refusal becomes a ConfigError that says `about`."""
    training = task.network.training
    try:
        with torch.no_grad():
            task.network.eval()
            return tuple(task(x).shape)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"model.init_args.network: {about}; {error}") from error
    finally:
        task.network.train(training)


def matrices(module: torch.nn.Module) -> list[Tensor]:
    """The parameters that penalties and weight decay act on: those of two or more dimensions."""
    return [p for p in module.parameters() if p.requires_grad and p.ndim > 1]


def parameter_groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices, and biases with norm scales, which weight decay leaves alone."""
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices(module)}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
