"""Where the results go: JSON with everything, CSV with a line per provider, and lines on the screen."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bp_torch

COLUMNS = (
    "kind", "name", "dtype", "mode", "provider", "status", "median_ms", "low_ms", "high_ms", "samples", "others_cpus",
    "graph_ms", "wall_ms", "speedup", "share_of_ceiling", "overhead_us", "floor_bytes", "floor_operations",
    "saved_bytes", "saved_per_hidden", "peak_bytes", "first_call_s", "message", "run",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]


def circumstances(device: str) -> dict[str, Any]:
    """What must be known to repeat a measurement."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cpu": processor(),
        "system": f"{platform.system()} {platform.release()}",
        "allocator": allocator(device),
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


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return re.sub(r"\((R|TM)\)", "", names[0]) if names else platform.machine()


def allocator(device: str) -> str:
    """What allocates the tensors' memory."""
    if device == "cuda":
        options = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        return f"torch's {torch.cuda.get_allocator_backend()}" + (f" ({options})" if options else "")
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        loaded = ""
    for library in ("jemalloc", "tcmalloc", "mimalloc"):
        if f"lib{library}" in loaded:
            return library
    tuned = sorted(name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES")
    return " ".join(filter(None, platform.libc_ver())) + "".join(f" {name}={os.environ[name]}" for name in tuned)


def revision() -> str | None:
    """The git revision that is measured, with "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def slug(run: dict[str, Any]) -> str:
    """A file name for the results of a device, and of a number of threads on the CPU."""
    threads = "" if run["cuda"] and run["device"] != run["cpu"] else f" {run['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", (run["device"] + threads).lower()).strip("-")


def merged(old: Results, run: dict[str, Any], rows: Sequence[dict[str, Any]], order: Sequence[str]) -> Results:
    """The results with the rows of a new run in the place of those that it measured again.

    All providers of a name, dtype and mode are replaced together: a ratio holds within one run alone. ``order`` has the
    names in the tables' order.
    """

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[column] for column in ("kind", "name", "dtype", "mode"))

    new = {key(row) for row in rows}
    kept = [row for row in old["rows"] if key(row) not in new]
    together = kept + [{**row, "run": run["date"]} for row in rows]
    places = {name: place for place, name in enumerate(order)}
    together.sort(key=lambda row: places.get(f"{row['kind']} {row['name']}", len(places)))
    runs = {r["date"]: r for r in [*old["runs"], run]}
    used = {row["run"] for row in together}
    return {"device": run["device"], "runs": [runs[date] for date in sorted(used)], "rows": together}


def write(
    folder: Path, run: dict[str, Any], rows: Sequence[dict[str, Any]], order: Sequence[str] = ()
) -> tuple[Path, Path]:
    """``NAME.json`` and ``NAME.csv``, named by the device; the rows that were there and not measured again stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{slug(run)}.json", folder / f"{slug(run)}.csv"
    results = merged(read(folder, run), run, rows, order)
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with paths[1].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(results["rows"])
    return paths


def read(folder: Path, run: dict[str, Any]) -> Results:
    """What the folder has of the device of a run."""
    path = folder / f"{slug(run)}.json"
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": [], "rows": []}
    return found


def load(folder: Path) -> list[Results]:
    """All results in a folder, those of GPUs first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda results: not is_gpu(results))


def disturbed(results: Results, limit: float) -> set[str]:
    """``kind name`` of what was measured while others kept more CPUs busy than that."""
    return {f"{row['kind']} {row['name']}" for row in results["rows"] if (row["others_cpus"] or 0) > limit}


def is_gpu(results: Results) -> bool:
    run = results["runs"][0]
    return bool(run["cuda"] and run["device"] != run["cpu"])


def line(row: dict[str, Any]) -> str:
    """One row for the screen."""
    start = f"{row['name']:<46} {row['mode']:<8} {row['provider']:<13}"
    if row["status"] != "measured":
        return f"{start} {row['status']}, not timed: {row['message']}"
    text = f"{start} {row['median_ms']:9.4f} ms ({row['low_ms']:.4f} to {row['high_ms']:.4f})"
    if row["speedup"] is not None:
        text += f", {row['speedup']:.2f} x torch"
    if row["overhead_us"] is not None:
        text += f", {row['overhead_us']:+.1f} µs to the operator"
    if row["share_of_ceiling"] is not None and row["kind"] == "layer":
        text += f", {row['share_of_ceiling']:.0%} of the ceiling"
    if row["others_cpus"] is not None and row["others_cpus"] > 0.1:
        text += f", disturbed: others kept {row['others_cpus']:.1f} CPUs busy"
    return text + f", saves {row['saved_bytes'] / 2**20:.2f} MiB, peak {row['peak_bytes'] / 2**20:.2f} MiB"
