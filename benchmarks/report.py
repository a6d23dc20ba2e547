"""Where the results go: JSON with everything, CSV with a line per provider, and a table on the screen."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

import bp_torch

COLUMNS = (
    "layer", "dtype", "mode", "provider", "median_ms", "low_ms", "high_ms", "graph_ms", "wall_ms", "speedup",
    "share_of_ceiling", "saved_bytes", "peak_bytes", "first_call_s", "fault",
)  # fmt: skip


def circumstances(device: str) -> dict[str, Any]:
    """What must be known to repeat a measurement."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "bp_torch": bp_torch.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "backend": bp_torch.backends.current_backend(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def write(folder: Path, results: dict[str, Any]) -> list[Path]:
    """``NAME.json`` and ``NAME.csv``, named by the device."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", results["circumstances"]["device"].lower()).strip("-")
    paths = [folder / f"{name}.json", folder / f"{name}.csv"]
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with paths[1].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(results["rows"])
    return paths


def line(row: dict[str, Any]) -> str:
    """One row for the screen."""
    start = f"{row['layer']:<44} {row['mode']:<8} {row['provider']:<13}"
    if row["fault"]:
        return f"{start} not timed: {row['fault']}"
    spread = f"{row['median_ms']:9.4f} ms ({row['low_ms']:.4f} to {row['high_ms']:.4f})"
    saved = f", saves {row['saved_bytes'] / 2**20:.2f} MiB" if row["saved_bytes"] is not None else ""
    return f"{start} {spread}, {row['speedup']:.2f} x torch, {row['share_of_ceiling']:.0%} of the ceiling{saved}"
