"""The rows of one layer or model: checked first, then timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from . import memory, report, timing
from .providers import Candidate, Run

BASELINES = ("compile", "max-autotune")
"""Whose refusal to compute something is a result, from anyone else a fault; and which may be less exact than ours."""
EXACTNESS = 2
"""How many times the error of torch ours may have."""
BASELINES_EXACTNESS = 100
"""How many times theirs may; beyond EXACTNESS the page says so. In float32 a wrong formula is further off than that."""


class Case(Protocol):
    """What is measured: providers.Setup is a layer, training.Training a model."""

    @property
    def kind(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def precision(self) -> str: ...
    def candidate(self, name: str) -> Candidate: ...
    def ceilings(self) -> dict[str, Run]: ...
    def floors(self) -> dict[str, dict[str, int]]: ...


def measure(
    case: Case, device: str, modes: Sequence[str], names: Sequence[str], repeats: int, seconds: float
) -> list[dict[str, Any]]:
    """For each mode and provider a row; what is wrong, refused or failed has a status and a message, not times."""
    if any(name in BASELINES for name in names):
        torch._dynamo.reset()
    candidates: dict[str, Candidate] = {}
    about: dict[str, dict[str, Any]] = {}
    for name in names:
        about[name], candidate = checked(case, name, device, modes)
        if candidate is not None:
            candidates[name] = candidate
    rows = []
    for mode in modes:
        runs = {name: candidate.runs[mode] for name, candidate in candidates.items()}
        ceiling = case.ceilings().get(mode)
        floor = {"ceiling": ceiling} if ceiling else {}
        others = timing.Others()
        times = timing.in_turns({**runs, **floor}, device, repeats, seconds)
        cpus = others.cpus()
        graphs = timing.in_graphs(runs, repeats, seconds) if device == "cuda" and mode != "step" else {}
        for name in names:
            row: dict[str, Any] = dict.fromkeys(report.COLUMNS)
            row |= {"kind": case.kind, "name": case.title, "dtype": case.precision, "mode": mode, "provider": name}
            row |= about[name]
            if name in runs:
                t, graph = times[name], graphs.get(name)
                row |= {"median_ms": t.median, "low_ms": t.low, "high_ms": t.high, "samples": t.samples}
                row["others_cpus"] = cpus
                row["graph_ms"] = graph.median if graph else None
                row["wall_ms"] = timing.wall_time(runs[name]) if device == "cuda" else t.median
                row["speedup"] = times["torch"].median / t.median if "torch" in times else None
                row["share_of_ceiling"] = times["ceiling"].median / t.median if floor else None
                row |= case.floors().get(mode, {})
                if "operator" in times:
                    row["overhead_us"] = (t.median - times["operator"].median) * 1e3
            rows.append(row)
    peaks = {name: memory.peak_bytes(candidate.runs["both"], device) for name, candidate in candidates.items()}
    for row in rows:
        row["peak_bytes"] = peaks.get(row["provider"])
        print(report.line(row), flush=True)
    return rows


def checked(case: Case, name: str, device: str, modes: Sequence[str]) -> tuple[dict[str, Any], Candidate | None]:
    """What is known of a provider before it is timed, and the provider, or None if it shall not be timed.

    What it raises, of torch, of a compiler (whose errors have no common class), or of Triton where a chip has no room
    for a block, is the row's message, and the other rows go on.
    """
    candidate = case.candidate(name)
    start = time.perf_counter()
    try:
        candidate.runs["both"]()  # the first, which compiles
        if device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        note, fault = "", candidate.fault(EXACTNESS)
        if fault and name in BASELINES:
            note, fault = fault, candidate.fault(BASELINES_EXACTNESS)
        for mode in () if fault else modes:  # what has yet to be compiled for it
            candidate.runs[mode]()
    except Exception as error:  # whatever it is, the other rows go on, and the status and the report tell
        status = "refused" if name in BASELINES else "failed"
        return {"status": status, "message": reason(error)}, None
    if fault:
        return {"status": "wrong", "message": fault, "first_call_s": first}, None
    about = {"status": "measured", "message": note, "first_call_s": first, "saved_bytes": candidate.saved()}
    return about | candidate.facts(), candidate


def reason(error: Exception) -> str:
    """One line: that of torch's first line, or a compiler's last, which says what is wrong with the code above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return repr(error)
    return lines[0] if isinstance(error, RuntimeError) else f"{type(error).__name__}: {lines[-1]}"
