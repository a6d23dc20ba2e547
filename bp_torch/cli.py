"""The console command bp-torch. Only the name of the subcommand is looked at here; see `bp_torch.recipes.cli`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

RECIPES = {
    "fit": "train, test the best checkpoint, and write a report",
    "validate": "measure a checkpoint on the validation split",
    "test": "measure a checkpoint on the test split",
    "predict": "write a checkpoint's predictions for the test split",
    "repeat": "fit for several seeds or folds, and tell the spread beside the baselines",
}

USAGE = """\
usage: bp-torch {{{names}}} --config FILE [options]
       bp-torch check [package.module:Name --input 4,8 ...] [options]
       bp-torch study [NAME] [--seeds N] [--out DIR] [--quick]
       bp-torch --version

{lines}
  study     a side-by-side study of what the slides claim, over several seeds, with its verdict
  check     run every check of docs/check.md on this library's layers, or on a function or module of yours

FILE is a YAML file or the name of a shipped one, such as digits. Several stack: the later wins.
`bp-torch fit --help` and `bp-torch check --help` list the options,
`bp-torch fit --config digits --print_config` shows what they come to."""


def usage() -> str:
    lines = "\n".join(f"  {name:<10}{what}" for name, what in RECIPES.items())
    return USAGE.format(names=",".join(RECIPES), lines=lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 1 where a check or a study's claim failed, or a run ended early (its weights became NaN, the disk was full);
    2 after one line on stderr about what to change; 130 and 143 where SIGINT or SIGTERM ended it.
    """
    jobs = cpus() if arguments is None else 1
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another, and ends no run
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        from bp_torch import __version__

        print(f"bp-torch {__version__}")
        return 0
    if command == "check":
        from bp_torch.verification import command as verification

        try:
            return verification.run(arguments[1:], jobs)
        except verification.UsageError as error:
            return fail(str(error))
    if command not in (*RECIPES, "study"):
        return fail(f"{command!r} is not a command; choose from {', '.join([*RECIPES, 'study', 'check'])}")
    try:
        from bp_torch.recipes import cli, repeat

        if command == "study":
            from bp_torch.recipes.studies import command as studies
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] == "bp_torch":
            raise
        return fail(f"{command} needs {missing.name}, which is not installed: pip install 'bp-torch[recipes]'")
    try:
        if command == "study":
            return studies.run(arguments[1:])
        outcome = repeat.run(arguments[1:]) if command == "repeat" else cli.run(arguments)
    except cli.ConfigError as error:
        return fail(str(error))
    except cli.Unfinished as error:
        return fail(str(error), error.status)
    except cli.Interrupted as error:
        return fail(str(error), error.status)
    if outcome is not None and outcome.failure:
        return fail(outcome.failure, outcome.status)
    return 0


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fail(message: str, status: int = 2) -> int:
    """Say in one line on stderr why the exit status is not 0."""
    error = "error: " if status < 128 else ""  # a signal is none
    print(f"bp-torch: {error}{' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
