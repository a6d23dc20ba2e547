"""`bp-torch fit|validate|test|predict`: LightningCLI, with a folder for each run, exact resuming, and a report."""

from __future__ import annotations

import csv
import difflib
import logging
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from . import ConfigError, report
from .callbacks import (
    AtomicCheckpointIO,
    Checkpoints,
    EarlyStopping,
    EpochSeeds,
    GradientNorms,
    History,
    Summary,
    stop_reason,
)
from .data import Data
from .modules import Task, parameter_groups
from .runs import find_checkpoint, new_run, run_of
from .schedules import build

CONFIGS = Path(__file__).parent / "configs"


class RecipeCLI(LightningCLI):
    """The parser and the run. `default_root_dir` names the folder of all runs; each run gets its own inside it."""

    model: Task
    datamodule: Data
    outcome: report.Outcome | None = None

    def __init__(self, arguments: list[str]) -> None:
        self.command = shlex.join(["bp-torch", *arguments])
        super().__init__(
            Task,
            Data,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
            args=[str(argument) for argument in map_configs(arguments)],
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
            raise ConfigError(explain(str(error))) from error
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
            torch.set_num_threads(self.settings.threads)
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, OSError, MisconfigurationException) as error:
            message = explain(str(error))
            raise ConfigError(f"{blame(self.settings, message)}{message}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose `default_root_dir` is the folder of this run. A new one is made, if all else is in order."""
        given = self._get(self.config_init, "trainer")
        check_optimizer(self.model)
        self.datamodule.setup("fit")
        self.model.check(self.datamodule)
        check_schedule(self.model, self.datamodule, given)
        if self.checkpoint is not None:
            check_fits(self.checkpoint, self.model, str(self.settings.ckpt_path))
        callbacks: list[Callback] = [EpochSeeds(), GradientNorms()]
        if given.enable_progress_bar is not False:
            callbacks.append(RichProgressBar())
        if given.enable_model_summary is not False:
            callbacks.append(Summary())
        kwargs["callbacks"] = [*callbacks, *(given.callbacks or []), History()]  # after those that log
        kwargs["plugins"] = [AtomicCheckpointIO(), *(given.plugins or [])]
        recorded = self.subcommand == "fit" and not given.fast_dev_run
        made = recorded and not self.resumed
        if made:
            self.run = new_run(self.root)
        if given.logger in (None, True):
            kwargs["logger"] = recorded and self._tensorboard()
        try:
            return super().instantiate_trainer(default_root_dir=str(self.run), **kwargs)
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
        if not self.settings.trainer.fast_dev_run:
            name = "config_resumed.yaml" if self.resumed else "config.yaml"
            config = self._parser("fit").dump(self.settings, skip_none=False)
            (self.run / name).write_text(f"# {self.command}\n{config}", "utf-8")

    def after_fit(self) -> None:
        """Test the checkpoint that counts as the best, beside the baselines, and tell."""
        if self.settings.trainer.fast_dev_run:
            return
        reason, checkpoints = stop_reason(self.trainer), self.callback(Checkpoints)
        told = self.callback(History)
        history, rates, best_epoch = told.rows, told.rates, checkpoints.best_epoch  # testing restores the best epoch's
        if not best_epoch:
            raise ConfigError(f"checkpoints.monitor: {checkpoints.monitor} was never a finite number; {reason}")
        common: dict[str, Any] = {"ckpt_path": checkpoints.best_model_path, "weights_only": True}
        tested = self.trainer.test(self.model, self.datamodule, verbose=False, **common)[0]
        test = {name.removeprefix("test_"): value for name, value in tested.items()}
        outputs = self.outputs(model=self.model, datamodule=self.datamodule, **common)
        self.outcome = report.Outcome(
            run=self.run,
            command=self.command,
            history=history,
            best_epoch=best_epoch,
            reason=reason,
            parameters=sum(p.numel() for p in self.model.parameters()),
            test=test | self.model.test_metrics(outputs, self.datamodule),
            baselines=self.datamodule.baselines() if self.settings.baselines else {},
            outputs=outputs,
            task=self.model,
            data=self.datamodule,
            rates=rates,
            callbacks=self.trainer.callbacks,  # type: ignore[attr-defined]
        )
        if self.settings.report:
            report.write(self.outcome)
        report.show(self.outcome)

    def outputs(self, **kwargs: Any) -> torch.Tensor:
        batches: Any = self.trainer.predict(**kwargs)
        return torch.cat(batches)

    def predict(self, **kwargs: Any) -> None:
        """Write `predictions.csv` into the folder of the checkpoint's run."""
        header, rows = self.model.predictions(self.outputs(**kwargs), self.datamodule)
        path = self.run / "predictions.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(header)
            table.writerows(rows)
        print(f"predictions for the test split: {path}")


def run(arguments: list[str]) -> report.Outcome | None:
    """Run one subcommand; `ConfigError` says in one line what the user should change. `fit` returns what came of it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # lightning 2.6 walks containers by a name that torch 2.13 deprecated
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)
    return RecipeCLI(arguments).outcome


def map_configs(arguments: list[str]) -> list[str]:
    """Let `--config digits` and `--config configs/digits.yaml` mean the shipped file where there is no such file."""
    mapped = list(arguments)
    for i, argument in enumerate(mapped):
        if i and mapped[i - 1] in ("-c", "--config"):
            mapped[i] = require_settings(find_config(argument))
        elif argument.startswith("--config="):
            mapped[i] = "--config=" + require_settings(find_config(argument.removeprefix("--config=")))
    return mapped


def find_config(name: str) -> str:
    if Path(name).is_file():
        return name
    shipped = CONFIGS / Path(name.removeprefix("recipes/").removeprefix("configs/")).with_suffix(".yaml")
    if shipped.is_file():
        return str(shipped)
    names = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    folders = sorted({name.split("/")[0] for name in names if "/" in name})
    listed = [name for name in names if "/" not in name]
    listed += [f"{sum(name.startswith(f'{folder}/') for name in names)} in {folder}/" for folder in folders]
    alike = difflib.get_close_matches(name.rsplit("/", 1)[-1], [n.rsplit("/", 1)[-1] for n in names], 1, 0.5)
    meant = [n for n in names if n.rsplit("/", 1)[-1] in alike]
    hint = f"; did you mean {meant[0]}?" if meant else ""
    raise ConfigError(f"--config: there is no file {name!r}, and the shipped ones are {', '.join(listed)}{hint}")


def require_settings(path: str) -> str:
    """The path, unless its file is empty: jsonargparse's own message would not say so."""
    try:
        empty = yaml.safe_load(Path(path).read_text("utf-8")) is None
    except (yaml.YAMLError, UnicodeDecodeError):
        empty = False  # it refuses the rest itself
    if empty:
        raise ConfigError(f"--config: {path} holds no settings")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise ConfigError(f"ckpt_path: the run {path.parent.parent} has no {path.name}; give another's path") from error
    except Exception as error:  # torch raises half a dozen types for files that are not checkpoints
        raise ConfigError(f"ckpt_path: {path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"ckpt_path: {path} is not a checkpoint of a run")
    return checkpoint


def flatten(settings: Namespace) -> dict[str, Any]:
    return dict(settings.items(branches=False))


def check_optimizer(model: Task) -> None:
    """Build the optimizer once, for its refusals."""
    try:
        model.make_optimizer(parameter_groups(model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.init_args.optimizer: {error}") from error


def check_schedule(model: Task, data: Data, trainer: Namespace) -> None:
    """Build the schedule once, for its refusals, for a run of about the planned length."""
    if model.make_schedule is None:
        return
    length = trainer.max_epochs or (1000 if trainer.max_steps in (None, -1) else trainer.max_steps)
    if model.interval == "step" and trainer.max_steps in (None, -1):
        length *= -(-len(data.train_dataloader()) // trainer.accumulate_grad_batches)
    try:
        build(model.make_schedule, model.make_optimizer(parameter_groups(model)), max(length, 1), model.interval)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.init_args.schedule: {error}") from error


def check_fits(checkpoint: dict[str, Any], model: torch.nn.Module, path: str) -> None:
    """Refuse a checkpoint of another network, by name of the first parameter that differs."""
    there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            have, want = there.get(name, "missing"), here.get(name, "missing")
            raise ConfigError(f"ckpt_path: {path} is of another network: {name} is {have}, the model's is {want}")


def explain(message: str) -> str:
    """jsonargparse's message on one line, without its account of every other type that the value is not of."""
    line = " ".join(message.split())
    line = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: (- )?", "", line)
    return re.split(r" (?:- )?Expected an? <class 'NoneType'>|,? Got value: ", line)[0]


def blame(settings: Namespace, message: str) -> str:
    """`key: ` for the setting that an error names as its argument, or nothing if none or several could be meant."""
    words = set(re.findall(r"\w+", message))
    named = {key: value for key, value in flatten(settings).items() if key.rsplit(".", 1)[-1] in words}
    if len(named) > 1:
        named = {key: value for key, value in named.items() if str(value) in words | {message.rsplit(" ", 1)[-1]}}
    return f"{next(iter(named))}: " if len(named) == 1 else ""
