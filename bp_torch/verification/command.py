"""``bp-torch check``: the library's own layers, or one function or module of the user's."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._torch import tree_map_only
from .library import ON_KERNELS, Case, cases
from .registry import CHECKS, line
from .report import FAILED, NOT_APPLICABLE, NOT_FINISHED, PASSED, Report, cell
from .run import COMPILERS, check

__all__ = ["UsageError", "run"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
SLOW = ("compile", "gradgradcheck", "odd-sizes", "evaluation")
"""What --quick leaves out."""


class UsageError(Exception):
    """One line on what to change in the command."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"check: {message}")


def parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="bp-torch check",
        description="Run every check of docs/check.md. Without a target: on this library's own layers, on every"
        " backend there is (Triton's with a GPU, or in its interpreter with TRITON_INTERPRET=1)."
        " Exit status: 0, 1 if a check failed or did not finish or none applied, 2 if the command is wrong.",
    )
    p.add_argument(
        "target", nargs="?", help="package.module:Name of an autograd Function, a function, a module or its class"
    )
    p.add_argument(
        "--input", action="append", default=[], metavar="SHAPE",
        help="once for each input: 4,8 is a normal tensor of that shape; 6:10 are 6 integers below 10; =0.5 is a value",
    )  # fmt: skip
    p.add_argument("--init", action="append", default=[], metavar="[KEY=]VALUE", help="an argument of a module's class")
    p.add_argument("--eval", action="store_true", help="put the module into evaluation mode")
    p.add_argument("--reference", metavar="package.module:Name", help="a callable whose results are right")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the inputs and the module")
    p.add_argument("--device", default="cpu")
    p.add_argument("--backend", choices=("auto", "torch", "triton"), help="of this library's layers")
    p.add_argument("--checks", metavar="NAMES", help="the checks to run, with commas between")
    p.add_argument("--skip", metavar="NAMES", default="", help="the checks to leave out, with commas between")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--time-limit", type=float, default=30.0, metavar="SECONDS", help="for each check")
    p.add_argument("--compile", choices=COMPILERS, default="aot_eager", help="the backend of torch.compile")
    p.add_argument("--only", metavar="NAME", help="of the library, the layers whose name contains this")
    p.add_argument(
        "--jobs", type=int, metavar="N", help="processes for the library; on the command line one for each CPU"
    )
    p.add_argument("--quick", action="store_true", help=f"fewer variants, and without {', '.join(SLOW)}")
    p.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")
    p.add_argument("--json", metavar="FILE", help="write the report as JSON")
    p.add_argument("--list", action="store_true", help="list the checks and the library's layers")
    return p


def run(arguments: Sequence[str], jobs: int = 1) -> int:
    """Run the command and return its exit status; UsageError says in one line what is wrong with it.

    Args:
        jobs: processes for the library, unless ``--jobs`` says otherwise. They import the program's main module again,
            which a command's bears and a script's may not.
    """
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    options.jobs = jobs if options.jobs is None else options.jobs
    if options.jobs < 1:
        raise UsageError(f"check: --jobs: expected at least 1, got {options.jobs}")
    names = _names(options)
    if options.list:
        width = max(map(len, CHECKS))
        print("\n".join(f"{row.name:<{width}}  {row.what}" for row in CHECKS.values()))
        print("\nlayers:", ", ".join(case.name for case in cases()))
        return 0
    for path in (options.markdown, options.json):
        if path and not Path(path).resolve().parent.is_dir():
            raise UsageError(f"check: {path!r}: there is no such folder")
    if options.target:
        if options.only:
            raise UsageError("check: --only chooses among the library's layers; leave out the target, or --only")
        return _one(options, names)
    for given, flag in ((options.input, "--input"), (options.init, "--init"), (options.reference, "--reference")):
        if given:
            raise UsageError(f"check: {flag} needs a target, package.module:Name")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: several threads would wait for each other
    try:
        return _library(options, names)
    finally:
        torch.set_num_threads(threads)


def _names(options: argparse.Namespace) -> list[str]:
    chosen = options.checks.split(",") if options.checks else list(CHECKS)
    skip = [name for name in options.skip.split(",") if name]
    if unknown := [name for name in [*chosen, *skip] if name not in CHECKS]:
        raise UsageError(f"check: there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    if options.quick:
        skip += SLOW
    return [name for name in chosen if name not in skip]


# One target


def _one(options: argparse.Namespace, names: list[str]) -> int:
    if not options.input:
        raise UsageError("check: give the shape of each input, such as --input 4,8")
    dtype = getattr(torch, options.dtype)
    try:
        device = torch.device(options.device)
        inputs = [_input(text, i, options.seed, dtype, device) for i, text in enumerate(options.input)]
    except RuntimeError as error:
        raise UsageError(f"check: {line(error)}") from error
    torch.manual_seed(options.seed)
    target = _made(load(options.target), options.init, options.target)
    if isinstance(target, torch.nn.Module):
        target = target.to(device, dtype)
        target.train(not options.eval and target.training)
    try:
        report = check(
            target, *inputs, checks=names, seed=options.seed, time_limit=options.time_limit, compile=options.compile,
            backend=options.backend, reference=load(options.reference) if options.reference else None,
        )  # fmt: skip
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else repr(t) for t in inputs)
        raise UsageError(f"check: {options.target} called with {shapes} raises {line(error)}") from error
    report.show()
    _write(options, report.to_markdown(), report.to_dict())
    return 0 if report else 1


def load(name: str) -> Any:
    """The object that ``package.module:Name`` names, from the current folder too."""
    where, _, what = name.partition(":")
    if not where or not what:
        raise UsageError(f"check: {name!r}: expected package.module:Name")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise UsageError(f"check: there is no module {error.name!r}") from error
        raise UsageError(f"check: {where} cannot be imported: {line(error)}") from error
    except Exception as error:
        raise UsageError(f"check: {where} cannot be imported: {line(error)}") from error
    for part in what.split("."):
        if not hasattr(found, part):
            public = (
                [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
                if hasattr(found, "__dict__")
                else []
            )
            raise UsageError(
                f"check: {where} has no {part!r}; it has {', '.join(sorted(public)[:20]) or 'nothing to call'}"
            )
        found = getattr(found, part)
    return found


def _made(target: Any, init: list[str], name: str) -> Any:
    """An instance of a module's class; everything else as it is."""
    is_class = inspect.isclass(target) and issubclass(target, torch.nn.Module)
    if not is_class:
        if init:
            raise UsageError(f"check: --init is for a module's class, and {name} is not one")
        if inspect.isclass(target) and not issubclass(target, torch.autograd.Function):
            raise UsageError(f"check: {name} is a class, and neither an autograd Function nor a module")
        if not callable(target):
            raise UsageError(f"check: {name} is a {type(target).__name__}, which cannot be called")
        return target
    positional, named = [], {}
    for text in init:
        key, equals, value = text.partition("=")
        if equals and key.isidentifier():
            named[key] = _literal(value)
        else:
            positional.append(_literal(text))
    try:
        return target(*positional, **named)
    except Exception as error:
        raise UsageError(
            f"check: {name}({', '.join(init)}) raises {line(error)}; give its arguments by --init"
        ) from error


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _input(text: str, i: int, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    generator = torch.Generator().manual_seed(seed + i)
    if text.startswith("="):
        return _literal(text[1:])
    shape_text, colon, limit = text.partition(":")
    try:
        shape = tuple(int(size) for size in shape_text.split(",") if size.strip())
        below = int(limit) if colon else 0
        if colon and below < 1:
            raise ValueError
        if colon:
            return torch.randint(below, shape, generator=generator).to(device)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"check: --input {text!r}: expected a shape such as 4,8, integers as 6:10, or =0.5") from error


# The library


def backends() -> list[tuple[str, str]]:
    """(backend, device) of every implementation that can run here."""
    found = [("torch", "cpu")]
    if torch.cuda.is_available():
        found.append(("triton", "cuda"))
    elif os.environ.get("TRITON_INTERPRET") == "1":
        found.append(("triton", "cpu"))
    return found


def _library(options: argparse.Namespace, names: list[str]) -> int:
    chosen = [case for case in cases() if options.only is None or options.only.lower() in case.name.lower()]
    if not chosen:
        raise UsageError(f"check: no layer's name contains {options.only!r}; --list names them")
    if options.quick:
        chosen = [case for case in chosen if case.quick]
    reports: list[tuple[str, str, Report, float]] = []
    began = time.monotonic()
    for backend, device in backends():
        if options.backend not in (None, backend):
            continue
        wanted = [name for name in names if name in ON_KERNELS] if backend == "triton" else names
        if not wanted:
            continue
        for case, (report, seconds) in zip(chosen, _each(chosen, backend, device, wanted, options), strict=True):
            reports.append((backend, case.name, report, seconds))
            counts = ", ".join(f"{report.count(s)} {s}" for s in (PASSED, FAILED, NOT_FINISHED) if report.count(s))
            print(f"{backend:<7} {case.name:<40} {counts}", flush=True)
            if not report.clean:
                print(report.explanation(), flush=True)
    if not reports:
        raise UsageError(
            f"check: the backend {options.backend!r} cannot run here: it needs CUDA, or TRITON_INTERPRET=1"
        )
    _summary(reports, time.monotonic() - began)
    every = [report for _, _, report, _ in reports]
    document = {"passed": all(r.clean for r in every) and any(every), "reports": [
        {"backend": backend, "layer": name, **report.to_dict()} for backend, name, report, _ in reports
    ]}  # fmt: skip
    _write(options, library_markdown(reports), document)
    return 0 if document["passed"] else 1


FEWEST = 8
"""Layers that are worth a process of their own: it takes seconds to start."""


def _each(
    chosen: list[Case], backend: str, device: str, names: list[str], options: argparse.Namespace
) -> Iterator[tuple[Report, float]]:
    """The report of each case, and its seconds, in order; on a GPU, which they would share, by this process alone."""
    jobs = min(options.jobs, len(chosen) // FEWEST) if device == "cpu" else 1
    if jobs < 2:
        for case in chosen:
            yield _timed(case, backend, device, names, options)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        started = [pool.submit(_timed, case.name, backend, device, names, options) for case in chosen]
        for future in started:
            yield future.result()


def _timed(
    case: Case | str, backend: str, device: str, names: list[str], options: argparse.Namespace
) -> tuple[Report, float]:
    if isinstance(case, str):  # a case holds functions that no other process can be sent
        case = next(known for known in cases() if known.name == case)
    began = time.monotonic()
    return _checked(case, backend, device, names, options), time.monotonic() - began


def _checked(case: Case, backend: str, device: str, names: list[str], options: argparse.Namespace) -> Report:
    dtype = getattr(torch, options.dtype)

    def placed(t: Tensor) -> Tensor:
        return t.to(device, dtype) if t.is_floating_point() else t.to(device)

    subject = case.make()
    reference = case.reference() if case.reference is not None else None
    for module in (subject, reference):
        if isinstance(module, torch.nn.Module):
            module.to(device, dtype)
    return check(
        subject, *tree_map_only(Tensor, placed, case.inputs()), checks=names, reference=reference, backend=backend,
        seed=options.seed, time_limit=options.time_limit, compile=options.compile,
    )  # fmt: skip


COLUMNS = ("backend", "layer", PASSED, FAILED, NOT_FINISHED, NOT_APPLICABLE, "seconds")


def _rows(reports: list[tuple[str, str, Report, float]]) -> list[tuple[str, ...]]:
    return [
        (backend, name, *(str(report.count(state)) for state in COLUMNS[2:6]), f"{seconds:.1f}")
        for backend, name, report, seconds in reports
    ]


def _summary(reports: list[tuple[str, str, Report, float]], seconds: float) -> None:
    rows = _rows(reports)
    total = f"{len(reports)} layers, {seconds:.0f} s: " + ", ".join(
        f"{sum(r.count(state) for _, _, r, _ in reports)} {state}" for state in COLUMNS[2:6]
    )
    try:
        import rich
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
        for row in [COLUMNS, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print(total)
        return
    table = Table(title="bp-torch check", title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i > 1 else "left", no_wrap=i == 1)
    for row, (_, _, report, _) in zip(rows, reports, strict=True):
        table.add_row(*row, style=None if report.clean else "bold red")
    rich.print(table)
    print(total)


def library_markdown(reports: list[tuple[str, str, Report, float]]) -> str:
    """The table of layers, the failures, and why checks did not apply."""
    lines = ["# bp-torch check", "", f"| {' | '.join(COLUMNS)} |", "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(reports)]
    for backend, name, report, _ in reports:
        if not report.clean:
            lines += ["", f"## {backend}: {name}", "", "```text", report.explanation(), "```"]
    reasons: Counter[tuple[str, str]] = Counter()
    for _, _, report, _ in reports:
        reasons.update((r.name, r.detail) for r in report.results if r.state == NOT_APPLICABLE)
    lines += ["", "## Not applicable, and why", "", "| check | reason | layers |", "|---|---|---:|"]
    for (name, reason), n in sorted(reasons.items()):
        lines.append(f"| {name} | {cell(reason)} | {n} |")
    if reports:
        lines += [
            "",
            ", ".join(f"{key} {value}" for key, value in reports[0][2].environment.items() if key != "backend"),
        ]
    return "\n".join(lines) + "\n"


def _write(options: argparse.Namespace, markdown: str, document: dict[str, Any]) -> None:
    if options.markdown:
        Path(options.markdown).write_text(markdown, encoding="utf-8")
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
