"""`bp-torch repeat`: the same recipe for several seeds or folds, and one table of the spread."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from . import ConfigError, Unfinished, cli
from .callbacks import replace_file
from .outcome import Outcome

SEEDS = (0, 1, 2, 3, 4)
LOWER = {"brier", "cost", "ece", "error", "loss", "mae", "mse", "perplexity", "rmse", "seconds"}
"""A metric with one of these words in its name is better when lower; every other when higher."""

OURS = "this run"


@dataclass
class Spread:
    """One metric of one model over the runs."""

    values: list[float]
    better: int | None = None
    """In how many runs the recipe was better than this model; None for the recipe itself."""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation (n - 1), or None of a single run."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Summary:
    """What `repeat` ends with."""

    command: str
    root: Path
    runs: list[dict[str, Any]]
    """Of each run: label, seed, fold, wall seconds, and what `record` gives."""
    formats: dict[str, str]

    @property
    def failure(self) -> str | None:
        """Which runs ended before their time, and why."""
        early = [f"{run['label']}: {run['failure']}" for run in self.runs if run["failure"]]
        return " | ".join(early) or None

    @property
    def status(self) -> int:
        return 1 if self.failure else 0

    @property
    def results(self) -> dict[str, dict[str, Spread]]:
        """The spread of each metric by model, the recipe first; a model that some run lacks is left out."""
        first = self.runs[0]["results"]
        spreads: dict[str, dict[str, Spread]] = {}
        for model in first:
            for metric in self.formats:
                values = [run["results"].get(model, {}).get(metric) for run in self.runs]
                if None not in values:
                    spreads.setdefault(model, {})[metric] = Spread(values, self._better(metric, values, model))
        return spreads

    def _better(self, metric: str, values: Sequence[float], model: str) -> int | None:
        if model == OURS:
            return None
        ours = [run["results"][OURS][metric] for run in self.runs]
        sign = -1 if lower_is_better(metric) else 1
        return sum(sign * mine > sign * theirs for mine, theirs in zip(ours, values, strict=True))

    def rows(self, metric: str) -> Iterator[list[str]]:
        """The lines of a metric's table: model, mean, deviation, each run's value, in how many we were better."""
        style = self.formats[metric]
        for model, spreads in self.results.items():
            if metric not in spreads:
                continue
            spread = spreads[metric]
            deviation = "" if spread.deviation is None else format(spread.deviation, style)
            better = "" if spread.better is None else f"{spread.better} of {len(self.runs)}"
            name = "this recipe" if model == OURS else model
            yield [name, format(spread.mean, style), deviation, *(format(v, style) for v in spread.values), better]

    def header(self) -> list[str]:
        return ["", "mean", "deviation", *(run["label"] for run in self.runs), "recipe better in"]

    @property
    def facts(self) -> dict[str, str]:
        seconds, wall = ([run[name] for run in self.runs] for name in ("seconds", "wall_seconds"))
        return {
            "training time of a run": f"{min(seconds):.0f} to {max(seconds):.0f} s, with validation",
            "time of a run": f"{min(wall):.0f} to {max(wall):.0f} s, start, baselines, test and report included",
            "epochs run": ", ".join(str(run["epochs"]) for run in self.runs),
            "files": f"{self.root}: summary.md, summary.json",
        }

    def markdown(self) -> str:
        lines = [f"# {self.root.name}, {len(self.runs)} runs", "", "```", self.command, "```", ""]
        for metric in self.formats:
            side = "lower" if lower_is_better(metric) else "higher"
            head = self.header()
            lines += [f"## Test {metric} ({side} is better)", "", line(head), line(["---"] * len(head))]
            lines += [*map(line, self.rows(metric)), ""]
        lines += ["The deviation is the sample standard deviation over the runs.", "", line(["", ""]), "|---|---|"]
        lines += [line(fact) for fact in self.facts.items() if fact[0] != "files"]
        lines += ["", "| run | folder | why it stopped |", "|---|---|---|"]
        lines += [line([run["label"], run["folder"], run["reason"]]) for run in self.runs]
        return "\n".join([*lines, ""])

    def write(self) -> None:
        """Write `summary.md` and `summary.json` into the folder of all runs, over those of an earlier repeat."""
        results = {
            model: {metric: vars(s) | {"mean": s.mean, "deviation": s.deviation} for metric, s in spreads.items()}
            for model, spreads in self.results.items()
        }
        text = json.dumps({"command": self.command, "results": results, "runs": self.runs}, indent=1, default=str)
        replace_file(self.root / "summary.json", lambda file: file.write(text.encode()))
        replace_file(self.root / "summary.md", lambda file: file.write(self.markdown().encode()))

    def show(self, console: Console | None = None) -> None:
        console = console or Console()
        for metric in self.formats:
            runs = ", ".join(run["label"] for run in self.runs)
            table = Table("", "mean", "deviation", "better in", runs, title=f"Test {metric}", title_justify="left")
            for column in table.columns[:-1]:
                column.no_wrap = True  # what a narrow terminal folds is the list of values
            for name, mean, deviation, *values, better in self.rows(metric):
                table.add_row(name, mean, deviation, better, "  ".join(values))
            console.print(table, soft_wrap=True)
        facts = Table.grid(padding=(0, 2))
        for fact in self.facts.items():
            facts.add_row(*fact)
        console.print(facts, soft_wrap=True)


def run(arguments: Sequence[str]) -> Summary | None:
    """`repeat [--seeds 0,1,2] [--folds K] [options of fit]`: fit once for each seed and fold, then tell the spread.

    Without `--seeds` there are five seeds, 0 to 4; with `--folds K` alone, seed 0 and K folds of its data. Both
    together give K folds for each seed. Returns None where nothing was recorded (`--trainer.fast_dev_run true`).

    Raises `ConfigError` for bad seeds or folds, for options that cannot mean several runs, and for all that `fit`
    refuses; runs that ended before stay in their folders.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("repeat: it starts one run after the other by itself; start it as one process")
    options, rest = take_options(arguments, ("--seeds", "--folds"))
    for name, instead in (("--seed_everything", "--seeds"), ("--ckpt_path", "fit")):
        if any(argument.split("=")[0] == name for argument in rest):
            raise ConfigError(f"{name}: repeat starts several runs; use {instead}")
    folds = parse_folds(options["--folds"]) if "--folds" in options else None
    seeds = parse_seeds(options["--seeds"]) if "--seeds" in options else [0] if folds else list(SEEDS)
    runs: list[dict[str, Any]] = []
    formats: dict[str, str] = {}
    root = Path()
    for seed in seeds:
        for fold in range(folds) if folds else (None,):
            given = ["fit", *rest, "--seed_everything", str(seed)]
            if fold is not None:
                given += ["--data.folds", str(folds), "--data.fold", str(fold)]
            started = time.monotonic()
            outcome = cli.run(given)
            if outcome is None:
                return None
            if outcome.status > 128:
                raise Unfinished(f"{outcome.failure}; {len(runs)} runs ended before it", outcome.status)
            names = ([f"seed {seed}"] if len(seeds) > 1 or fold is None else []) + (
                [f"fold {fold}"] if fold is not None else []
            )
            wall = time.monotonic() - started
            runs.append(record(outcome) | {"label": ", ".join(names), "seed": seed, "fold": fold, "wall_seconds": wall})
            formats, root = dict(outcome.task.formats), outcome.run.parent
    summary = Summary(shlex.join(["bp-torch", "repeat", *arguments]), root, runs, formats)
    summary.write()
    summary.show()
    return summary


def record(outcome: Outcome) -> dict[str, Any]:
    """What the summary keeps of a run; the tensors of the run are let go."""
    return {
        "folder": str(outcome.run),
        "results": {OURS if i == 0 else name: dict(scores) for i, (name, scores) in enumerate(outcome.results.items())},
        "epochs": len(outcome.history),
        "best_epoch": outcome.best_epoch,
        "reason": outcome.reason,
        "failure": outcome.failure,
        "seconds": outcome.seconds,
        "parameters": outcome.parameters,
    }


def lower_is_better(metric: str) -> bool:
    return bool(LOWER & set(re.findall(r"[a-z]+", metric.lower())))


def take_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of `--name value` and `--name=value`, and all other arguments in order."""
    found, rest, waiting = {}, [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
        elif equals or waiting:
            found[name] = value if equals else waiting.pop(0)
        else:
            raise ConfigError(f"{name}: a value must follow")
    return found, rest


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers: each once, from 0 to 2³² - 1."""
    seeds = []
    with contextlib.suppress(ValueError):
        seeds = [int(part) for part in text.strip("[]").split(",")]
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds: expected different numbers from 0 to 2³² - 1, such as 0,1,2, got {text!r}")
    return seeds


def parse_folds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise ConfigError(f"--folds: expected a number of at least 2, got {text!r}")
    return int(text)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
