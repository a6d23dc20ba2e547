"""`bp-torch study NAME [--seeds N] [--out DIR] [--quick]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from .. import ConfigError
from . import STUDIES
from .core import run_study


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"study: {message}")


def run(arguments: list[str]) -> int:
    """Run one study: 0 if the slides' claim held, 1 if not; list them without a name. ConfigError for wrong words."""
    parser = Parser(
        prog="bp-torch study",
        description="Run a study, and say whether the slides' claim held.",
        epilog="Without NAME: list the studies. Exit status 1: a claim that should hold did not.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, metavar="N", help="how many seeds, at least 2; each study has its default")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: runs/studies/NAME")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; proves nothing")
    given = parser.parse_args(arguments)
    if given.name is None:
        for study in STUDIES.values():
            print(f"{study.name:<20} {study.claim} ({study.seeds} seeds)")
        return 0
    if given.name not in STUDIES:
        raise ConfigError(f"study: {given.name!r} is not a study; choose from {', '.join(STUDIES)}")
    if given.seeds is not None and given.seeds < 2:
        raise ConfigError(f"study: --seeds must be at least 2, for a comparison needs a spread, got {given.seeds}")
    out = Path("runs") / "studies" / given.name if given.out is None else given.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"study: --out {str(out)!r} is a file")
    return run_study(STUDIES[given.name], given.seeds, out, given.quick)
