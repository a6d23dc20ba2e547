"""The learning rate: finding one to start with, and stopping once lowering it no longer helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder as LightningFinder
from matplotlib.figure import Figure

from .. import ConfigError, figures
from ..outcome import Outcome, Section
from .run import PerFit

SKIPPED = 10
"""The first losses of the test, which are left out: Lightning's running mean starts too low."""


class LearningRateFinder(PerFit, LightningFinder):
    """Find the learning rate before training, by Lightning's range test, and train with it.

    The test trains for `num_training_steps` steps while the rate rises from `min_lr` to `max_lr`, ends early where the
    loss explodes, and restores the weights. Then the rate is set to that at which the smoothed loss falls most steeply,
    argmin ∂loss/∂log(rate). Lightning's own suggestion, argmin ∂loss/∂rate, is left aside: the noise at the smallest
    rates decides it, which on the digits gave 5e-6 to 4e-5.

    The module must have an attribute `lr` (or `learning_rate`) that its `configure_optimizers` uses, as `Task` does:
    optimizer and schedule are made anew with it. A schedule that names its own rates (`max_lr` of OneCycleLR, unless it
    is 0 in a recipe's configuration) overrides it.

    The curve goes to `figures/lr_finder.png` in the folder of the run, and into the report. A resumed run keeps the
    rate that was found, and tests nothing.

    Args: as `lightning.pytorch.callbacks.LearningRateFinder`.
    Source: Smith 2017, arXiv:1506.01186.
    """

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        num_training_steps: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        early_stop_threshold: float | None = 4.0,
    ) -> None:
        super().__init__(min_lr, max_lr, num_training_steps, mode, early_stop_threshold, update_attr=False)
        self.forget()

    def forget(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.found: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        name = next((name for name in ("lr", "learning_rate") if hasattr(pl_module, name)), None)
        if name is None:
            raise ConfigError(f"LearningRateFinder: {type(pl_module).__name__} has no attribute lr to set")
        if self.found is None:
            epochs = trainer.fit_loop.max_epochs
            trainer.fit_loop.max_epochs = -1  # Lightning's would end with the run's last epoch
            try:
                self.lr_find(trainer, pl_module)
            finally:
                trainer.fit_loop.max_epochs = epochs
            assert self.optimal_lr is not None
            self.rates, self.losses = (list(map(float, self.optimal_lr.results[name])) for name in ("lr", "loss"))
            # one rate for all processes, each of which saw the losses of its own rows
            self.found = trainer.strategy.broadcast(steepest(self.rates, self.losses))
            if trainer.is_global_zero:
                folder = Path(trainer.default_root_dir) / "figures"
                folder.mkdir(parents=True, exist_ok=True)
                figures.learning_rate_test(self.rates, self.losses, self.found).savefig(
                    folder / "lr_finder.png", dpi=150
                )
        setattr(pl_module, name, self.found)
        trainer.strategy.setup_optimizers(trainer)  # Lightning's leaves the schedule at the rate it was made with

    def state_dict(self) -> dict[str, Any]:
        return {"found": self.found, "rates": self.rates, "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found, self.rates, self.losses = (state_dict[name] for name in ("found", "rates", "losses"))

    def report_sections(self, outcome: Outcome) -> list[Section]:
        if self.found is None:
            return []
        text = [f"The run started with a learning rate of {self.found:.3g}, where the loss fell most steeply."]
        return [Section("lr_finder", "Learning-rate finder", self.figure(), text)]

    def figure(self) -> Figure:
        """Loss against rate."""
        assert self.found is not None
        return figures.learning_rate_test(self.rates[SKIPPED:], self.losses[SKIPPED:], self.found)


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the loss falls most steeply by log(rate), the first `SKIPPED` left out."""
    points = [(math.log(rate), loss) for rate, loss in zip(rates, losses, strict=False) if math.isfinite(loss)]
    points = points[SKIPPED:-1]
    if len(points) < 2:
        raise ConfigError("num_training_steps: too few steps before the loss exploded to find a learning rate")
    logs, values = np.array(points).T
    return float(np.exp(logs[np.gradient(values, logs).argmin()]))


class StopAfterReductions(PerFit):
    """Stop when the learning rate would be lowered once more than `reductions` times. For `ReduceLROnPlateau`.

    Early stopping of the second kind: when the validation loss has not fallen for `patience` epochs the schedule lowers
    the rate and training goes on; at the plateau after the last allowed reduction training ends.

    Args:
        reductions: how often the rate may be lowered; ≥ 0.
    """

    def __init__(self, reductions: int = 3) -> None:
        if reductions < 0:
            raise ValueError(f"reductions must be at least 0, got {reductions}")
        self.reductions = reductions
        self.forget()

    def forget(self) -> None:
        self.done = 0
        self.rate: float | None = None

    @property
    def stop_reason(self) -> str | None:
        """Why this ended training, if it did."""
        if self.done <= self.reductions:
            return None
        return f"the learning rate had been lowered {self.reductions} times, and another plateau came"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rate is None:
            self.rate = self.current(trainer)
        if self.stop_reason is not None:  # a run that had stopped is resumed
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rate = self.current(trainer)
        assert self.rate is not None
        self.done += rate < self.rate
        self.rate = rate
        trainer.should_stop = trainer.should_stop or self.stop_reason is not None

    def current(self, trainer: Trainer) -> float:
        return float(trainer.optimizers[0].param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "rate": self.rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done, self.rate = state_dict["done"], state_dict["rate"]
