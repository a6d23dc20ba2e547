"""`bp-torch fit|validate|test|predict`: LightningCLI, with a folder for each run, exact resuming, and a report."""

from __future__ import annotations

import csv
import errno
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from . import ConfigError, Unfinished, report
from .callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    EarlyStopping,
    EpochSeeds,
    GradientNorms,
    History,
    Summary,
    diverged,
    stop_reason,
)
from .data import Data
from .interrupts import Interrupted, Interrupts
from .modules import Task
from .outcome import Outcome
from .processes import OneFolder, alone, end_processes, for_other_processes, quiet
from .runs import check_fits, find_checkpoint, load_checkpoint, new_run, run_of
from .settings import (
    blame,
    check_length,
    check_optimizer,
    check_schedule,
    check_seed,
    explain,
    flatten,
    map_configs,
    suggestion,
)


class RecipeCLI(LightningCLI):
    """The parser and the run. `default_root_dir` names the folder of all runs; each run gets its own inside it."""

    model: Task
    datamodule: Data
    outcome: Outcome | None = None

    def __init__(self, arguments: list[str], interrupts: Interrupts) -> None:
        self.interrupts = interrupts
        self.failure: Failure | None = None
        self.command = shlex.join(["bp-torch", *arguments])
        super().__init__(
            Task,
            Data,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            args=map_configs([str(argument) for argument in arguments]),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_argument("--baselines", type=bool, default=True, help="Fit scikit-learn's models beside this one.")
        parser.add_argument("--report", type=bool, default=True, help="Write report.md and its figures.")
        parser.add_argument("--threads", type=PositiveInt | None, default=None, help="CPU threads of one operator.")
        parser.set_defaults({"early_stopping.monitor": "val_loss", "trainer.default_root_dir": "runs"})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and settle which checkpoint is meant and in which folder the run lives."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            message = explain(str(error))
            raise ConfigError(message.rstrip(".") + suggestion(message, self._parser(args[0]), args)) from error
        check_seed(self.settings.seed_everything)
        self.model_settings = flatten(self.settings.model)
        self.root = self.run = Path(self.settings.trainer.default_root_dir)
        fitting = self.config.subcommand == "fit"
        name = self.settings.ckpt_path or ("" if fitting else "best")
        checkpoint = find_checkpoint(self.root, str(name)) if name else None
        self.run = (run_of(checkpoint) if checkpoint else None) or self.root
        self.resumed = fitting and checkpoint is not None and checkpoint.name == "last.ckpt" and self.run != self.root
        if self.resumed and checkpoint is not None and not checkpoint.is_file():
            print(f"{self.run} has no checkpoint yet: it starts from the beginning", file=sys.stderr)
            checkpoint = None
        self.checkpoint = load_checkpoint(checkpoint) if checkpoint else None
        self.settings.ckpt_path = str(checkpoint) if checkpoint else None
        self.settings.weights_only = True

    @property
    def settings(self) -> Namespace:
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """LightningCLI lets the checkpoint's model win over the configuration's. Say so where they differ."""
        for key, value in flatten(self.settings.model).items():
            given = self.model_settings.get(key)
            if given != value:
                print(f"model.{key}: {value!r} from the checkpoint, in place of {given!r}", file=sys.stderr)

    def instantiate_classes(self) -> None:
        if self.settings.threads is not None:
            most = max(64, 8 * (os.cpu_count() or 1))  # of 100,000 the operating system ends the process
            if self.settings.threads > most:
                raise ConfigError(f"threads: at most {most} on this machine, got {self.settings.threads}")
            torch.set_num_threads(self.settings.threads)
        try:
            super().instantiate_classes()
        except ConfigError:
            raise
        except (TypeError, ValueError, OverflowError, OSError, MisconfigurationException) as error:
            message = explain(str(error))
            raise ConfigError(f"{blame(self.settings, message)}{message}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose `default_root_dir` is the folder of this run. A new one is made, if all else is in order."""
        given = self._get(self.config_init, "trainer")
        check_length(given, self.checkpoint if self.subcommand == "fit" else None)
        check_optimizer(self.model)
        self.datamodule.setup("fit")
        self.model.check(self.datamodule)
        check_schedule(self.model, self.datamodule, given)
        if self.checkpoint is not None:
            check_fits(self.checkpoint, self.model, str(self.settings.ckpt_path))
        callbacks: list[Callback] = [OneFolder(), self.interrupts, EpochSeeds(), GradientNorms()]
        if given.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        if given.enable_model_summary is not False:
            callbacks.append(Summary())
        kwargs["callbacks"] = [*callbacks, *(given.callbacks or []), History()]  # after those that log
        kwargs["plugins"] = [AtomicCheckpointIO(), *(given.plugins or [])]
        recorded = self.subcommand == "fit" and not given.fast_dev_run
        made = recorded and not self.resumed and getattr(rank_zero_only, "rank", 0) == 0
        if made:
            self.run = new_run(self.root)
        if given.logger in (None, True):
            kwargs["logger"] = recorded and self._tensorboard()
        if self.subcommand == "predict":  # each row once, and in order
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        try:
            trainer = super().instantiate_trainer(default_root_dir=str(self.run), **kwargs)
            if given.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
                raise ConfigError("trainer.sync_batchnorm: torch's DistributedDataParallel has it on GPUs alone")
            return trainer
        except Exception:
            if made:
                self.run.rmdir()
            raise

    def _tensorboard(self) -> TensorBoardLogger:
        # What a killed run logged after its last checkpoint is hidden: those steps are run, and logged, again.
        step = self.checkpoint["global_step"] if self.resumed and self.checkpoint else None
        return TensorBoardLogger(self.run / "tensorboard", "", "", default_hp_metric=False, purge_step=step)

    def after_instantiate_classes(self) -> None:
        """Put the model's settings into its checkpoints, so that `load_from_checkpoint(path)` can rebuild it."""
        settings = self.config_dump["model"]
        instantiator = "lightning.pytorch.cli.instantiate_module"
        self.model.save_hyperparameters(
            {"_class_path": settings["class_path"], **settings["init_args"], "_instantiator": instantiator},
            logger=False,
        )

    def callback(self, kind: type) -> Any:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, kind))

    def before_fit(self) -> None:
        if not self.settings.trainer.fast_dev_run and self.trainer.is_global_zero:
            name = "config_resumed.yaml" if self.resumed else "config.yaml"
            config = self._parser("fit").dump(self.settings, skip_none=False)
            (self.run / name).write_text(f"# {self.command}\n{config}", "utf-8")

    def fit(self, **kwargs: Any) -> None:
        """Train. What ends it early, but for an error of the program, becomes `failure`."""
        try:
            self.trainer.fit(**kwargs)
            if self.interrupts.received:
                raise Interrupted(self.interrupts.received)
        except BaseException as error:
            end_processes(self.trainer)
            if isinstance(error, MisconfigurationException):
                raise ConfigError(explain(str(error))) from error
            if self.interrupts.received and isinstance(error, RuntimeError):
                error = Interrupted(self.interrupts.received)  # another process went first
            self.failure = Failure.of(error)
            if self.failure is None or self.settings.trainer.fast_dev_run or not self.trainer.is_global_zero:
                raise error
            self.interrupts.received = 0  # what there is is tested
        self.run = Path(self.trainer.default_root_dir)

    def after_fit(self) -> None:
        """Test the checkpoint that counts as the best, beside the baselines, and tell."""
        if self.settings.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        trainer = alone(self.trainer, self.config_init["fit"].trainer, self.run)
        checkpoints = self.callback(Checkpoints)
        seen = self.callback(History)
        history, rates, best_epoch = seen.rows, seen.rates, checkpoints.best_epoch  # testing restores the best epoch's
        reason, failure = stop_reason(self.trainer), self.failure
        if failure:
            signalled = failure.status > 128
            reason = f"{failure.reason} after epoch {len(history)}" if signalled and history else failure.reason
        elif diverged(self.trainer):
            failure = Failure(reason, 1)
        if not best_epoch:
            if failure:
                raise Unfinished(f"{reason}; no epoch was saved", failure.status)
            measured = any(checkpoints.monitor in row for row in history)
            what = "a finite number" if measured else "measured"
            raise ConfigError(f"checkpoints.monitor: {checkpoints.monitor} was never {what}; {reason}")
        common: dict[str, Any] = {"ckpt_path": checkpoints.best_model_path, "weights_only": True}
        tested = trainer.test(self.model, self.datamodule, verbose=False, **common)[0]
        test = {name.removeprefix("test_"): value for name, value in tested.items()}
        outputs = outputs_of(trainer, model=self.model, datamodule=self.datamodule, **common)
        baselines = self.settings.baselines and (failure is None or failure.status == 1)
        self.outcome = Outcome(
            run=self.run,
            command=self.command,
            history=history,
            best_epoch=best_epoch,
            reason=reason,
            parameters=sum(p.numel() for p in self.model.parameters()),
            test=test | self.model.test_metrics(outputs, self.datamodule),
            baselines=self.datamodule.baselines() if baselines else {},
            outputs=outputs,
            task=self.model,
            data=self.datamodule,
            rates=rates,
            callbacks=self.trainer.callbacks,  # type: ignore[attr-defined]
            failure=f"{reason}; tested after epoch {best_epoch}; go on with --ckpt_path last" if failure else None,
            status=failure.status if failure else 0,
        )
        report.show(self.outcome)
        if self.settings.report:
            try:
                report.write(self.outcome)
            except OSError as error:
                failures = [self.outcome.failure, f"the report could not be written: {told(error)}"]
                self.outcome.failure, self.outcome.status = "; ".join(filter(None, failures)), self.outcome.status or 1

    def predict(self, **kwargs: Any) -> None:
        """Write `predictions.csv` into the folder of the checkpoint's run."""
        header, rows = self.model.predictions(outputs_of(self.trainer, **kwargs), self.datamodule)
        path = self.run / "predictions.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(header)
            table.writerows(rows)
        print(f"predictions for the test split: {path}")


@dataclass
class Failure:
    """Why a run ended before its time, and the exit status of the command."""

    reason: str
    status: int

    @staticmethod
    def of(error: BaseException) -> Failure | None:
        """None for an error of the program."""
        if isinstance(error, Interrupted):
            return Failure(str(error), error.status)
        if isinstance(error, OSError) and error.errno in DISK:
            return Failure(told(error), 1)
        return None


def run(arguments: list[str]) -> Outcome | None:
    """Run one subcommand; `ConfigError` says in one line what the user should change. `fit` returns what came of it."""
    quiet()
    with Interrupts() as interrupts, for_other_processes(arguments):
        return RecipeCLI(arguments, interrupts).outcome


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of the disk that a run is written to."""


def told(error: OSError) -> str:
    return f"trainer.default_root_dir: {error.strerror}{f': {error.filename}' if error.filename else ''}"


def outputs_of(trainer: Trainer, **kwargs: Any) -> torch.Tensor:
    batches: Any = trainer.predict(**kwargs)
    return torch.cat(batches)
