"""docs/benchmarks.md, from the results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import figures, report, targets
from .providers import MODES

DOCS = Path(__file__).parent.parent / "docs"
MODE = {"forward": "forward", "both": "forward + backward", "step": "training step"}

HEAD = """# Speed and memory

<!-- Written by `python -m benchmarks report` from benchmarks/results/ and benchmarks/causes.md. Change those. -->

Each row was computed by bp_torch, by torch.nn and by torch.compile of torch.nn's version, on the same inputs, in turns,
in one process. bp_torch's result was checked before it was timed: its error against float64 is at most twice that of
torch.nn, gradients included, and dropout keeps the share that it should. Times are medians, with the first and third
quartile in brackets. *× torch.nn* says how many times as fast as torch.nn: below 1 is slower. *Saved* is what is kept
for backward beyond inputs, parameters and results, *peak* the most that was allocated at once during forward and
backward. A model's name is followed by its batch, width and depth, or the shape of its images; a layer's by its shape.

The commands: `python -m benchmarks` measures, `python -m benchmarks report` writes this page. All numbers, further
columns and the compilation times are in `benchmarks/results/`.
"""


def write(folder: Path = report.RESULTS, docs: Path = DOCS) -> list[Path]:
    """Writes the page and its figures; returns their paths."""
    found = report.load(folder)
    paths = [path for results in found for path in figures.draw(results, docs / "figures")]
    page = docs / "benchmarks.md"
    page.write_text(text(found), encoding="utf-8")
    return [page, *paths]


def text(found: Sequence[report.Results], causes: dict[str, str] | None = None) -> str:
    """The page."""
    causes = targets.causes() if causes is None else causes
    parts = [HEAD]
    if all(report.is_gpu(results) for results in found):
        parts.append("**Nothing was measured on a CPU yet.**\n")
    if not any(report.is_gpu(results) for results in found):
        parts.append(
            "**Nothing was measured on a GPU yet.** The targets for one stand at the end of this page, and nothing is"
            " claimed about them.\n"
        )
    for results in found:
        parts += device(results, causes)
    if not any(report.is_gpu(results) for results in found):
        parts += ["## Targets on a GPU\n", target_table([targets.outcome(t, []) for t in _of("cuda")])]
    return "\n".join(parts)


def device(results: report.Results, causes: dict[str, str]) -> Iterable[str]:
    """One device's sections."""
    gpu = report.is_gpu(results)
    rows = results["rows"]
    kind = "cuda" if gpu else "cpu"
    yield f"## {results['device']}\n"
    yield circumstances(results["runs"])
    busy = [row["others_cpus"] for row in rows if row["others_cpus"] is not None]
    if busy:
        yield f"While it was timed, other processes kept at most {max(busy):.2f} of the CPUs busy.\n"
    for name in figures.names(results):
        yield f"![{'roofline' if 'roofline' in name else 'ratios to torch.nn'}](figures/{name})\n"
    outcomes = [targets.outcome(target, rows) for target in _of(kind)]
    counts = [sum(o.met is met for o in outcomes) for met in (True, False, None)]
    yield "### Targets\n"
    yield f"{counts[0]} met, {counts[1]} missed, {counts[2]} not measured.\n"
    yield target_table(outcomes)
    missed = [o.target.key for o in outcomes if o.met is False]
    if missed:
        yield "Causes of what was missed:\n"
        yield "".join(f"- {key.partition(': ')[2]}: {causes.get(key, '*not written yet.*')}\n" for key in missed)
    if kind in causes:
        yield f"### Where the time goes\n\n{causes[kind]}\n"
    for title, of in (("Layers", "layer"), ("Models", "model")):
        if table := time_table([row for row in rows if row["kind"] == of], gpu):
            yield f"### {title}\n"
            yield table
    per_hidden = {
        (row["name"], row["provider"]): row["saved_per_hidden"] for row in rows if row["saved_per_hidden"] is not None
    }
    if per_hidden:
        lines = [
            (name, *(f"{per_hidden[name, p]:.3g}" if (name, p) in per_hidden else "–" for p in ("torch", "bp_torch")))
            for name in dict.fromkeys(name for name, _ in per_hidden)
        ]
        yield "Bytes that a model keeps for backward, for each element of its hidden layers' outputs:\n"
        yield _table(("row", "torch.nn", "bp_torch"), lines)
    for status, title in (
        ("refused", "What the baselines refused:"),
        ("failed", "What failed:"),
        ("wrong", "What was wrong, and therefore not timed:"),
        ("measured", "Where a baseline is less exact than bp_torch may be; it was timed all the same:"),
    ):
        told = {(row["name"], row["provider"]): row["message"] for row in rows if row["status"] == status}
        if any(told.values()):
            yield f"{title}\n"
            yield "".join(
                f"- {name}, {figures.LABELS.get(provider, provider)}: `{message}`\n"
                for (name, provider), message in told.items()
                if message
            )
    if table := overhead_table([row for row in rows if row["kind"] == "overhead"]):
        yield "### Overhead of a call\n"
        yield (
            "On 8 by 8 elements, where the time is that of the call. The bare operator is ATen's, without the Python of"
            " torch.nn.functional;\nthe overhead is what a call takes longer than that.\n"
        )
        yield table


def circumstances(runs: Sequence[dict[str, Any]]) -> str:
    """What must be known to repeat the runs; values that differ between them side by side."""
    shown = {
        "dates": "date", "git revision": "revision", "processor": "cpu", "threads": "threads", "system": "system",
        "allocator": "allocator", "torch": "torch", "CUDA": "cuda", "Triton": "triton", "bp_torch": "bp_torch",
        "Python": "python", "float32 matmul precision": "float32_matmul_precision", "backend": "backend",
    }  # fmt: skip
    lines = []
    for title, key in shown.items():
        values = list(dict.fromkeys(str(run[key]) for run in runs if run[key] is not None))
        if key == "date":
            values = list(dict.fromkeys(value[:10] for value in values))
        if values:
            lines.append((title, ", ".join(values)))
    copies = [run["copy_bytes_per_s"] / 1e9 for run in runs]
    products = [run["product_operations_per_s"] / 1e12 for run in runs]
    lines.append(("copy, measured", f"{_range(copies)} GB/s"))
    lines.append(("matrix product, measured", f"{_range(products)} TFLOP/s"))
    return _table(("", ""), lines)


def target_table(outcomes: Sequence[targets.Outcome]) -> str:
    lines = []
    for o in outcomes:
        measure = o.target.measure
        sign = "≥" if measure.large else "≤"
        value = "–" if o.value is None else f"{measure.scale * o.value:.4g}{measure.unit}"
        worst = f" ({o.row})" if o.row and len(o.target.rows) + o.target.rows[0].count("*") > 1 else ""
        bound = f"{sign} {measure.scale * o.target.bound:.4g}{measure.unit}"
        verdict = f"**{o.verdict}**" if o.met is False else o.verdict
        lines.append((o.target.name, f"{measure.text}, {MODE[o.target.mode]}", bound, value + worst, verdict))
    return _table(("row", "measure", "target", "measured", ""), lines)


def time_table(rows: Sequence[dict[str, Any]], gpu: bool) -> str:
    """A line for each row and mode."""
    lines = []
    for (name, dtype, mode), group in _grouped(rows, "name", "dtype", "mode").items():
        providers = {row["provider"]: row for row in group}
        known = {p: row for p, row in providers.items() if row["status"] == "measured"}
        compiled = [providers.get(p) for p in (("compile", "max-autotune") if gpu else ("compile",))]
        last = mode == max((row["mode"] for row in rows if row["name"] == name), key=MODES.index)
        memory = [
            " / ".join(size(known[p][column]) if p in known else "–" for p in ("torch", "bp_torch", "compile"))
            for column in ("saved_bytes", "peak_bytes")
        ]
        lines.append((
            name if mode == "forward" else "", "" if dtype in ("float32", "bfloat16") else dtype, MODE[mode],
            _time(providers.get("torch")), _time(providers.get("bp_torch")), _ratio(providers.get("bp_torch"), True),
            *(_ratio(row) for row in compiled), *(memory if last else ("", "")),
        ))  # fmt: skip
    if not lines:
        return ""
    head = ["row", "precision", "", "torch.nn", "bp_torch", "× torch.nn", "torch.compile, × torch.nn"]
    head += ["max-autotune, × torch.nn"] if gpu else []
    head += ["saved: torch.nn / bp_torch / torch.compile", "peak: the same"]
    if not any(line[1] for line in lines):
        head.pop(1)
        lines = [(*line[:1], *line[2:]) for line in lines]
    return _table(head, lines)


def overhead_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for (name, mode), group in _grouped(rows, "name", "mode").items():
        providers = {row["provider"]: row for row in group}
        cells = [_time(providers.get("operator"))]
        for provider in ("torch", "bp_torch"):
            row = providers.get(provider)
            cells.append("–" if row is None or row["overhead_us"] is None else f"{row['overhead_us']:+.1f} µs")
        lines.append((name if mode == "forward" else "", MODE[mode], *cells))
    head = ("row", "", "bare operator", "torch.nn.functional", "bp_torch.functional")
    return _table(head, lines) if lines else ""


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f}"


def duration(ms: float) -> str:
    """Milliseconds in the unit that suits them."""
    for unit, factor in (("s", 1e3), ("ms", 1.0), ("µs", 1e-3)):
        if ms >= factor:
            return f"{ms / factor:.3g} {unit}" if ms < 999.5 * factor else f"{ms / factor:.0f} {unit}"
    return f"{ms * 1e3:.2g} µs"


def _of(device: str) -> list[targets.Target]:
    return [target for target in targets.TARGETS if target.device == device]


def _time(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] != "measured":
        return "–" if row is None else row["status"]
    return f"{duration(row['median_ms'])} ({duration(row['low_ms'])} to {duration(row['high_ms'])})"


def _ratio(row: dict[str, Any] | None, strong: bool = False) -> str:
    if row is None or row["speedup"] is None:
        return "–" if row is None else row["status"]
    return f"**{row['speedup']:.2f}**" if strong else f"{row['speedup']:.2f}"


def _grouped(rows: Iterable[dict[str, Any]], *columns: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
