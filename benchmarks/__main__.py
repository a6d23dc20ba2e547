"""Measures layers and models beside torch eager and torch.compile, after a check that each result is right.

    python -m benchmarks                          all rows, on the GPU if there is one
    python -m benchmarks --device cpu --part 1/6  a sixth of them; the parts' results are merged in one file
    python -m benchmarks --disturbed 0.1 --limit 180
                                                  what is missing or was disturbed; no row begins later than that
    python -m benchmarks --only batch_norm        the rows with that in their names
    python -m benchmarks report                   writes docs/benchmarks.md and its figures from the results

A result that is wrong, or a computation that fails, is not timed, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import layers, models, providers, report, timing
from .measure import Case, measure
from .providers import Setup
from .training import Training

CACHE = "TORCHINDUCTOR_CACHE_DIR"
KINDS = ("overhead", "layer", "model")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ceilings(device: str, repeats: int) -> dict[str, float]:
    """The machine's rates, measured first: bytes a second of a copy, and operations a second of a product."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count, size = (2**28, 8192) if device == "cuda" else (2**24, 1024)
    source = torch.zeros(count, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = timing.in_turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, repeats)
    return {
        "copy_bytes_per_s": 2 * count * dtype.itemsize / times["copy"].median * 1e3,
        "product_operations_per_s": 2 * size**3 / times["product"].median * 1e3,
    }


def table(options: argparse.Namespace) -> dict[str, Callable[[str, torch.dtype], Case]]:
    """What there is to measure: ``kind name`` → its inputs or model, made when it is its turn."""
    found: dict[str, Callable[[str, torch.dtype], Case]] = {}
    quick: Any = () if options.tiny else (options.quick,)
    size = "tiny" if options.tiny else options.device
    for layer in layers.overhead():
        found[f"overhead {layer.title}"] = partial(Setup.of, layer)
    for layer in getattr(layers, size)(*quick):
        found[f"layer {layer.title}"] = partial(Setup.of, layer)
    for model in getattr(models, size)(*quick):
        found[f"model {model.title}"] = partial(Training, model)
    return found


def part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}")
    return int(index), int(count)


def arguments() -> argparse.ArgumentParser:
    text, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=text, epilog=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["measure", "report"], default="measure")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=CPUS, help="of the CPU; default: one for each, %(default)s here")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats, no max-autotune")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which show that the benchmark works")
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; default: all")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows with this in their names")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="every Nth row, from the Ith")
    parser.add_argument("--provider", action="append", choices=providers.NAMES, help="may be repeated; default: all")
    parser.add_argument("--repeats", type=int, help="rounds of timing; default: 100, with --quick 10")
    parser.add_argument(
        "--seconds", type=float, default=5.0,
        help=f"of timing for each row and mode, if that gives {timing.LEAST} rounds; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--disturbed", type=float, metavar="CPUS",
        help="only rows without results, or while which other processes kept more CPUs busy than this",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="begin no row later than this")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="of the results; default: benchmarks/results, with --tiny none"
    )
    return parser


def chosen(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The rows that the options ask for."""
    kinds = options.kind or KINDS
    found = [name for name in names if name.split()[0] in kinds]
    found = [name for name in found if not options.only or any(text in name for text in options.only)]
    return found[options.part[0] - 1 :: options.part[1]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    if options.command == "report":
        from . import page

        for path in page.write(options.out or report.RESULTS):
            print(path)
        return 0
    rows = table(options)
    names = chosen(options, list(rows))
    if not names:
        parser.error(f"no such row: --kind {options.kind}, --only {options.only}, --part {options.part}")
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    threads, cache = torch.get_num_threads(), os.environ.get(CACHE)
    torch.set_num_threads(options.threads)
    try:
        # Compilation starts from nothing, so that the time of the first call is that of compiling.
        with tempfile.TemporaryDirectory(prefix="benchmarks-") as os.environ[CACHE]:
            return run(options, {name: rows[name] for name in names}, list(rows))
    finally:
        torch.set_num_threads(threads)
        os.environ.pop(CACHE)
        if cache is not None:
            os.environ[CACHE] = cache


def run(options: argparse.Namespace, rows: dict[str, Callable[[str, torch.dtype], Case]], order: Sequence[str]) -> int:
    device = options.device
    names = options.provider or [
        name for name in providers.NAMES if name != "max-autotune" or (device == "cuda" and not options.quick)
    ]
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    repeats = options.repeats or (10 if options.quick else 100)
    about = report.circumstances(device) | ceilings(device, min(repeats, 20))
    if options.disturbed is not None:
        old = report.read(options.out or report.RESULTS, about)
        there = {f"{row['kind']} {row['name']}" for row in old["rows"]} - report.disturbed(old, options.disturbed)
        rows = {name: make for name, make in rows.items() if name not in there}
        print(f"{len(rows)} rows to measure")
    start = time.perf_counter()
    wrong = 0
    paths: Sequence[Path] = ()
    done: list[dict[str, Any]] = []
    for index, (name, make) in enumerate(rows.items()):
        if options.limit is not None and time.perf_counter() - start > options.limit:
            print(f"{len(rows) - index} rows left after {options.limit:g} s")
            break
        kind = name.split()[0]
        modes = providers.MODES if kind == "model" else providers.MODES[:2]
        # A compiled call's overhead is that of its guards: a matter of its own.
        these = ["bp_torch", "torch", "operator"] if kind == "overhead" else names
        found = measure(make(device, dtype), device, modes, these, repeats, options.seconds)
        wrong += sum(row["status"] in ("wrong", "failed") for row in found)
        done += found
        if options.out or not options.tiny:  # after each row, so that little is lost when a run is stopped
            paths = report.write(options.out or report.RESULTS, about, done, order)
    for path in paths:
        print(path)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
