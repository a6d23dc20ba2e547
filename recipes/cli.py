"""`bp-torch fit|validate|test|predict`: LightningCLI, with a folder for each run, exact resuming, and a report."""

from __future__ import annotations

import contextlib
import csv
import difflib
import importlib
import inspect
import itertools
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bp_torch import cli as command

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
from .modules import Task, parameter_groups
from .runs import find_checkpoint, new_run, run_of
from .schedules import Settings, build, takes_length

CONFIGS = Path(__file__).parent / "configs"


class RecipeCLI(LightningCLI):
    """The parser and the run. `default_root_dir` names the folder of all runs; each run gets its own inside it."""

    model: Task
    datamodule: Data
    outcome: report.Outcome | None = None

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
        except (Interrupted, OSError, MisconfigurationException, RuntimeError) as error:
            end_processes(self.trainer)
            if self.interrupts.received and not isinstance(error, Interrupted):
                error = Interrupted(self.interrupts.received)  # another process went first
            if isinstance(error, MisconfigurationException):
                raise ConfigError(explain(str(error))) from error
            if not isinstance(error, (Interrupted, OSError)) or self.settings.trainer.fast_dev_run:
                raise
            self.failure = Failure(told(error), error.status if isinstance(error, Interrupted) else 1)
            self.interrupts.received = 0  # what there is is tested
        except BaseException:
            end_processes(self.trainer)
            raise
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
        self.outcome = report.Outcome(
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


def _in_a_spawned_process() -> OneFolder:
    quiet()  # nothing has been set there yet
    return OneFolder()


@dataclass
class Failure:
    """Why a run ended before its time, and the exit status of the command."""

    reason: str
    status: int


class OneFolder(Callback):
    """Several processes have one folder, which rank 0 made."""

    def __reduce__(self) -> Any:
        return _in_a_spawned_process, ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]


def run(arguments: list[str]) -> report.Outcome | None:
    """Run one subcommand; `ConfigError` says in one line what the user should change. `fit` returns what came of it."""
    quiet()
    with Interrupts() as interrupts, for_other_processes(arguments):
        return RecipeCLI(arguments, interrupts).outcome


@contextlib.contextmanager
def for_other_processes(arguments: list[str]) -> Iterator[None]:
    """Let the processes that Lightning starts run this command; what it tells them in the environment ends with it."""
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given, told = sys.argv, {name: os.environ.get(name) for name in names}
    sys.argv = [command.__file__, *map(str, arguments)]
    try:
        yield
    finally:
        sys.argv = given
        for name, value in told.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def quiet() -> None:
    """Let Lightning tell of problems alone."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # lightning 2.6 walks containers by a name that torch 2.13 deprecated
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)


def told(error: BaseException) -> str:
    """In one line, what ended a run."""
    if isinstance(error, OSError):
        return f"trainer.default_root_dir: {error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return str(error)


def outputs_of(trainer: Trainer, **kwargs: Any) -> torch.Tensor:
    batches: Any = trainer.predict(**kwargs)
    return torch.cat(batches)


def end_processes(trainer: Trainer) -> None:
    """End the processes that this one started, which wait for it in the middle of a step."""
    launcher: Any = trainer.strategy.launcher
    processes = getattr(launcher, "procs", [])
    if processes:
        launcher.kill(signal.SIGKILL)
        processes.clear()  # Lightning watches them, and would end this process too


def alone(trainer: Trainer, settings: Namespace, run: Path) -> Trainer:
    """The trainer, if it trained in this process alone; else one that does, with the callbacks as they were at the end.

    Each row is then tested once, and nothing waits for the other processes, which end here.
    """
    if trainer.world_size == 1 and trainer.strategy.launcher is None:
        return trainer
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    elif (last := run / "checkpoints" / "last.ckpt").is_file():  # trained in processes that are no more
        restore(trainer, torch.load(last, weights_only=True))
    one: dict[str, Any] = {
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "logger": False,
        "default_root_dir": str(run),
    }
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    options: dict[str, Any] = settings.as_dict() | one
    return Trainer(**{**options, "callbacks": list(callbacks), "enable_model_summary": False})


def restore(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Give callbacks and loops the state that they had when a checkpoint was written."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    trainer.fit_loop.epoch_progress.current.completed = checkpoint["epoch"] + 1  # it was written just before


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


GROUPS = {
    "trainer": (dict,),
    "early_stopping": (dict,),
    "checkpoints": (dict,),
    "model": (dict, str),
    "data": (dict, str),
}
"""What a key may hold: jsonargparse would take a number for all settings of a group, and drop the others."""


def require_settings(path: str) -> str:
    """The path, if its file holds settings, as jsonargparse's own message would not say."""
    try:
        settings = yaml.safe_load(Path(path).read_text("utf-8"))
        json.dumps(settings, default=str)
    except yaml.YAMLError:
        return path  # it refuses the rest itself
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config: {path} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config: {path} holds a part that contains itself") from error
    if settings is None:
        raise ConfigError(f"--config: {path} holds no settings")
    if not isinstance(settings, dict):
        raise ConfigError(f"--config: {path} must hold settings by name, got {type(settings).__name__}")
    for key, kinds in GROUPS.items():
        if key in settings and not isinstance(settings[key], kinds):
            raise ConfigError(f"--config: {path}: {key} must hold settings by name, got {settings[key]!r}")
    return path


def suggestion(message: str, parser: LightningArgumentParser, arguments: Sequence[str]) -> str:
    """`; did you mean ...?` where a message is about an option that is not known, and one is called alike."""
    unknown = re.search(
        r"unrecognized arguments: (--[\w.]+)|option '([\w.]+)' is not|accept option '([\w.]+)'", message, re.I
    )
    if not unknown:
        return ""
    name = next(filter(None, unknown.groups()))
    options = {option for action in parser._actions for option in action.option_strings}
    known = options if name.startswith("--") else {option.removeprefix("--") for option in options}
    known |= {
        argument
        for path in config_files(arguments)
        for argument in arguments_of(yaml.safe_load(path.read_text("utf-8")))
    }
    alike = difflib.get_close_matches(name, sorted(known), 1, 0.6)
    return f"; did you mean {alike[0]}?" if alike else ""


def config_files(arguments: Sequence[str]) -> list[Path]:
    given = [value for name, value in itertools.pairwise(arguments) if name in ("-c", "--config")]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return [Path(path) for path in given]


def arguments_of(settings: Any) -> Iterator[str]:
    """The names of the arguments of every class that settings name."""
    if isinstance(settings, dict):
        if isinstance(path := settings.get("class_path"), str):
            with contextlib.suppress(ImportError, AttributeError, ValueError, TypeError):
                module, _, name = path.rpartition(".")
                for kind in getattr(importlib.import_module(module), name).__mro__[:-1]:
                    yield from inspect.signature(kind).parameters
        for value in settings.values():
            yield from arguments_of(value)


def check_seed(seed: int | bool) -> None:
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything: expected a number from 0 to 2³² - 1, got {seed}")


def check_length(trainer: Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Refuse a run that trains nothing, by the setting that says so."""
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if trainer[key] == 0:
            raise ConfigError(f"trainer.{key}: 0 trains nothing")
    if checkpoint is not None:
        for key, done in (("max_epochs", checkpoint["epoch"] + 1), ("max_steps", checkpoint["global_step"])):
            if trainer[key] is not None and 0 < trainer[key] < done:
                what = key.removeprefix("max_")
                raise ConfigError(f"trainer.{key}: {trainer[key]} is below the {done} {what} that the run has done")


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
    steps_of_epoch = -(-len(data.train_dataloader()) // trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs or (1000 if trainer.max_steps in (None, -1) else -1)
    steps = epochs * steps_of_epoch if trainer.max_steps in (None, -1) else trainer.max_steps
    if steps < 0 and takes_length(model.make_schedule):
        raise ConfigError(
            "model.init_args.schedule: it follows the run's length, which max_time does not tell; "
            "set trainer.max_epochs or trainer.max_steps, or the schedule's own length"
        )
    length = max(steps if model.interval == "step" else epochs if epochs > 0 else -(-steps // steps_of_epoch), 1)
    settings = Settings(model.make_optimizer(parameter_groups(model)), model.lr)
    try:
        schedule = build(model.make_schedule, settings, length, model.interval)
        if not isinstance(schedule, ReduceLROnPlateau):
            for _ in range(min(length, 100_000)):  # a schedule may have an end of its own
                settings.step()
                schedule.step()
    except (TypeError, ValueError, OverflowError) as error:
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
    if memory := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", line):
        return f"model.init_args.network: it needs {int(memory[1]):,} bytes at once, which this machine does not have"
    line = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: (- )?", "", line)
    return re.split(r" (?:- )?Expected an? <class 'NoneType'>|,? Got value: ", line)[0]


def blame(settings: Namespace, message: str) -> str:
    """`key: ` for the setting that an error is about, or nothing if none or several could be meant.

    It is the one whose name stands in the message; of several, or where there is none, the one whose value does, at its
    end before all.
    """
    words, last = set(re.findall(r"\w+", message)), message.rsplit(" ", 1)[-1].strip("'\"")
    every = {key: str(value) for key, value in flatten(settings).items()}
    named = {key: value for key, value in every.items() if key.rsplit(".", 1)[-1] in words}
    if len(named) != 1:
        named = named or {key: value for key, value in every.items() if value.isidentifier() and len(value) > 2}
        ended = {key: value for key, value in named.items() if value == last}
        named = ended or {key: value for key, value in named.items() if value in words}
    return f"{next(iter(named))}: " if len(named) == 1 else ""
