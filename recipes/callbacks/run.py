"""What a run needs to be repeatable, resumable and told afterwards."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from .. import ConfigError
from ..data import derive_seed


def replace_file(path: Path, write: Any) -> None:
    """Write a file so that, whenever the process dies, `path` holds either the old contents or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save has its own words for it
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are never half written. (Lightning's own pass through the system's temporary folder, and moving
    a file from another disk is a copy.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        replace_file(Path(path), lambda file: torch.save(checkpoint, file))


class PerFit(Callback):
    """A callback that may serve several fits: it forgets the one before. What a resumed run knew is restored after."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.current_epoch == 0:
            self.forget()

    def forget(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define forget()")


class EpochSeeds(PerFit):
    """Reseed torch, NumPy and Python at each epoch from (seed, epoch), so that dropout masks survive a resume.

    The seed is the one last given to `torch.manual_seed`, or the checkpoint's. Where several processes train together,
    those of rank 1 and above reseed from (seed, epoch, rank).
    """

    seed: int | None = None

    def forget(self) -> None:
        self.seed = torch.initial_seed()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.seed is not None  # set up, or restored
        rank = [trainer.global_rank] if trainer.global_rank else []
        seed = derive_seed(self.seed, trainer.current_epoch, 1, *rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is what other people's code draws from
        random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]


class GradientNorms(Callback):
    """Log ‖∂loss/∂(parameters of the layer)‖₂, the mean over an epoch's steps, as `grad_norm/<layer>`.

    A layer is a module that holds parameters itself. The norm is taken after unscaling and before clipping.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = 0
        self.totals: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.steps += 1
        for name, layer in pl_module.named_modules():
            gradients = [p.grad for p in layer.parameters(recurse=False) if p.grad is not None]
            if gradients:
                self.totals[name] = self.totals.get(name, 0.0) + torch.nn.utils.get_total_norm(gradients)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps:
            norms = {f"grad_norm/{name}": total / self.steps for name, total in self.totals.items()}
            pl_module.log_dict(norms, sync_dist=True)  # all processes have the same gradients


class History(PerFit):
    """Keep every logged number of every epoch, with the learning rate and the seconds that the epoch took.

    `rates` are the learning rates of the first parameter group by optimizer step, as (steps before it, rate).
    The rows travel in the checkpoint, so a resumed run has the epochs before the kill. They are also written, after
    each epoch, to `metrics.csv` in the folder of the run. An epoch without validation has no `val_` numbers.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.rates: list[tuple[int, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.learning_rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        if not self.rates or self.rates[-1][0] < trainer.global_step:  # a step may take several batches
            self.rates.append((trainer.global_step, self.learning_rate))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("lr", self.learning_rate, sync_dist=True)
        current = sorted(trainer.callback_metrics.items())
        if not validates(trainer) or was_cut(trainer):  # Lightning still has those of the last validation
            current = [(name, value) for name, value in current if not name.startswith("val_")]
        metrics = {name: float(value) for name, value in current}
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        self.rows.append(row | metrics | {"seconds": time.monotonic() - self.started})
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            replace_file(Path(trainer.default_root_dir) / "metrics.csv", self._write)

    def _write(self, file: Any) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in self.rows for name in row)))
        table.writeheader()
        table.writerows(self.rows)
        file.write(text.getvalue().encode())

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "rates": torch.tensor(self.rates, dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.rates = [(int(step), rate) for step, rate in state_dict.get("rates", torch.empty(0, 2)).tolist()]


def validates(trainer: Trainer) -> bool:
    """Whether this epoch has, or will have, a validation: `check_val_every_n_epoch` may leave some without."""
    every = trainer.check_val_every_n_epoch
    return trainer.enable_validation and (every is None or (trainer.current_epoch + 1) % every == 0)


def was_cut(trainer: Trainer) -> bool:
    """At an epoch's end: whether `max_steps` or `max_time` ended it before its last batch, and its validation."""
    return not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def require_metric(trainer: Trainer, key: str, name: str) -> None:
    """Refuse a name that no metric has, when all should be there: in an epoch with validation."""
    due = (validates(trainer) or not trainer.enable_validation) and not was_cut(trainer)
    if name not in trainer.callback_metrics and due:
        known = ", ".join(sorted(trainer.callback_metrics))
        raise ConfigError(f"{key}: no metric is called {name!r}; there are {known}")


class EarlyStopping(PerFit, LightningEarlyStopping):
    """Lightning's, except that a run which had already stopped does not train on when it is resumed.

    With `strict` a name that no metric has is refused; without, it stops nothing.
    """

    def forget(self) -> None:
        self.wait_count = self.stopped_epoch = 0
        self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        running = EarlyStoppingReason.NOT_STOPPED.value
        if state.get("stopping_reason", running) != running:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strict:
            require_metric(trainer, "early_stopping.monitor", self.monitor)
        if was_cut(trainer) and self.monitor not in trainer.callback_metrics:
            return
        super().on_train_epoch_end(trainer, pl_module)


class Checkpoints(PerFit, Checkpoint):
    """After each epoch write `checkpoints/last.ckpt`; when `monitor` improved, `checkpoints/best.ckpt` before it.

    With None as `monitor` each epoch counts as better than the one before, so that the last one is tested: where a
    schedule ends at a rate of zero, and few rows for validation cannot tell one epoch from another.

    An epoch is the unit: a run that is killed loses the epoch under way, and no more. `last` names the best score so
    far, so it is written second: a kill between the two is repaired when the epoch is run again.

    An epoch that left a weight, a buffer or the optimizer's state NaN or infinite is not written, and ends training:
    both files stay those of the last finite epochs. A buffer that was not finite when training began, such as a mask of
    -inf, may stay so.
    """

    def __init__(self, monitor: str | None = "val_loss", mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.monitor, self.mode = monitor, mode
        self.forget()

    def forget(self) -> None:
        self.best_score = float("inf") if self.mode == "min" else float("-inf")
        self.best_epoch = 0
        self.best_model_path = self.last_model_path = ""
        self.stop_reason: str | None = None
        self.masks: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        folder = Path(trainer.default_root_dir) / "checkpoints"
        self.best_model_path, self.last_model_path = str(folder / "best.ckpt"), str(folder / "last.ckpt")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masks = {name for name, buffer in pl_module.named_buffers() if not buffer.isfinite().all()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        lost = [name for name in not_finite(trainer, pl_module) if name not in self.masks]
        if not trainer.strategy.reduce_boolean_decision(not lost):
            named = lost[0] if lost else "what another process trained"
            self.stop_reason = f"epoch {trainer.current_epoch + 1} left {named} NaN or infinite, and was not saved"
            trainer.should_stop = True
            return
        if self._improved(trainer):
            self.best_epoch = trainer.current_epoch + 1
            trainer.save_checkpoint(self.best_model_path, weights_only=False)
        trainer.save_checkpoint(self.last_model_path, weights_only=False)

    def _improved(self, trainer: Trainer) -> bool:
        if self.monitor is None:
            return True
        require_metric(trainer, "checkpoints.monitor", self.monitor)
        score = float(trainer.callback_metrics.get(self.monitor, math.nan))
        improved = score < self.best_score if self.mode == "min" else score > self.best_score
        if improved:
            self.best_score = score
        return improved

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_epoch = state_dict["best_score"], state_dict["best_epoch"]


def not_finite(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    """The names of the parameters, buffers and optimizer's tensors that hold NaN or an infinity."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    names = {id(p): name for name, p in module.named_parameters()}
    states = (
        (f"the optimizer's {key} of {names.get(id(p), 'a parameter')}", value)
        for optimizer in trainer.optimizers
        for p, state in optimizer.state.items()
        if isinstance(state, dict)
        for key, value in state.items()
    )
    for name, tensor in itertools.chain(tensors, states):
        if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            yield name


def stop_reason(trainer: Trainer) -> str:
    """Why training ended, in words."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if reason := getattr(callback, "stop_reason", None):
            return str(reason)
    for callback in callbacks:
        if isinstance(callback, LightningEarlyStopping):
            if callback.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
                return f"{callback.monitor} had not improved for {callback.wait_count} epochs"
            if callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                return str(callback.stopping_reason_message).removesuffix(" Signaling Trainer to stop.")
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return f"max_steps = {trainer.max_steps} reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs = {trainer.max_epochs} reached"
    return "the trainer's time limit was reached" if trainer.should_stop else "training was interrupted"


def diverged(trainer: Trainer) -> bool:
    """Whether training ended because weights, or the metric that is watched, were NaN or infinite."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(
        callback.stop_reason is not None
        if isinstance(callback, Checkpoints)
        else getattr(callback, "stopping_reason", None) == EarlyStoppingReason.NON_FINITE_METRIC
        for callback in callbacks
    )
