"""Settings of a run as they were written: where they are found, what they may be, and what is said of wrong ones."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim.lr_scheduler import ReduceLROnPlateau

from . import ConfigError
from .data import Data
from .modules import Task, parameter_groups
from .schedules import Settings, build, takes_length

CONFIGS = Path(__file__).parent / "configs"


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
