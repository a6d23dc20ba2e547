"""Measures the layers beside torch eager and torch.compile, after a check that each result is right.

    python -m benchmarks --device cpu --quick
    python -m benchmarks --device cuda --only batch_norm

A result that is wrong is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import layers, providers, report, timing
from .layers import Layer
from .providers import Setup


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


def measure(layer: Layer, device: str, dtype: torch.dtype, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """The rows of one layer: for each provider, forward, and forward with backward."""
    torch._dynamo.reset()
    setup = Setup.of(layer, device, dtype)
    functions = {name: providers.make(name, layer) for name in names}
    first = {name: providers.first_call(setup, f) for name, f in functions.items()}
    faults = {name: providers.fault(setup, f) for name, f in functions.items()}
    right = {name: f for name, f in functions.items() if not faults[name]}
    saved = {name: providers.saved_bytes(setup, f) for name, f in right.items()}
    peak = {name: providers.peak_bytes(setup, f) for name, f in right.items()}
    rows = []
    for mode, floor in providers.ceilings(setup).items():
        runs: dict[str, timing.Run] = {
            name: setup.forward(f) if mode == "forward" else setup.both(f) for name, f in right.items()
        }
        times = timing.in_turns({**runs, "ceiling": floor}, device, repeats)
        graphs = timing.in_graphs(runs, repeats) if device == "cuda" else {}
        eager = times.get("torch")
        for name in names:
            row: dict[str, Any] = dict.fromkeys(report.COLUMNS)
            row |= {"layer": layer.title, "dtype": str(dtype).removeprefix("torch."), "mode": mode, "provider": name}
            row |= {"first_call_s": first[name], "fault": faults[name]}
            if name in runs:
                t, graph = times[name], graphs.get(name)
                row |= {"median_ms": t.median, "low_ms": t.low, "high_ms": t.high}
                row |= {"graph_ms": graph.median if graph else None}
                row |= {"wall_ms": timing.wall_time(runs[name]) if device == "cuda" else t.median}
                row |= {"speedup": eager.median / t.median if eager else float("nan")}
                row |= {"share_of_ceiling": times["ceiling"].median / t.median}
                row |= {"saved_bytes": saved[name], "peak_bytes": peak[name]}
            rows.append(row)
            print(report.line(row), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats, no max-autotune")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, which show that the benchmark works")
    parser.add_argument("--only", default="", metavar="NAME", help="the layers whose name contains this")
    parser.add_argument("--provider", action="append", choices=providers.NAMES, help="may be repeated; default: all")
    parser.add_argument("--repeats", type=int, help="rounds of timing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    options = parser.parse_args(arguments)

    names = options.provider or [
        name for name in providers.NAMES if name != "max-autotune" or (options.device == "cuda" and not options.quick)
    ]
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    repeats = options.repeats or (10 if options.quick else 50)
    table = layers.tiny() if options.tiny else getattr(layers, options.device)(options.quick)
    chosen = [layer for layer in table if options.only in layer.title]
    if not chosen:
        parser.error(f"--only {options.only}: no such layer")

    results: dict[str, Any] = {"circumstances": report.circumstances(options.device)}
    results["circumstances"] |= {"quick": options.quick, "repeats": repeats}
    results["ceilings"] = ceilings(options.device, repeats)
    results["rows"] = [row for layer in chosen for row in measure(layer, options.device, dtype, names, repeats)]
    for path in report.write(options.out, results):
        print(path)
    return 1 if any(row["fault"] for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
