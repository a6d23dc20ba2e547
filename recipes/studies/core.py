"""What the studies share: cells of setting × seed, paired comparisons, verdicts, and the report.

A study trains small networks of bp_torch's layers in a plain loop, the same settings with the same seeds, so that
settings are compared seed by seed: seed s has its split of the data, its order of batches and its initial weights.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy.stats import t as student

Numbers = dict[str, Any]
RULE = (
    "Settings are compared seed by seed. A difference counts if its mean over the seeds is above 0 by more than its "
    "standard error times the 95 % quantile of Student's t with (seeds - 1) degrees of freedom: one-sided, at 5 %."
)


@dataclass(frozen=True)
class Comparison:
    """Paired differences over seeds."""

    mean: float
    error: float
    """The standard error of the mean."""
    bound: float
    """What the mean must exceed."""
    seeds: int

    @property
    def holds(self) -> bool:
        return self.mean > self.bound

    def __str__(self) -> str:
        return f"{number(self.mean)} ± {number(self.error)} over {self.seeds} seeds, must exceed {number(self.bound)}"


def exceeds(larger: Sequence[float], smaller: Sequence[float], margin: float = 0.0) -> Comparison:
    """Whether `larger` is above `smaller` by more than `margin`, by the rule `RULE`. Pairs belong to the same seed.

    An infinite or NaN number is that of a run that diverged. If the smaller side is finite in each pair and the larger
    is +inf in some, it is larger; any other number that is not finite decides nothing, and so does not hold.
    """
    if len(larger) != len(smaller) or len(larger) < 2:
        raise ValueError(f"a paired comparison needs at least two seeds, the same on both sides, got {len(larger)}")
    a, b = np.asarray(larger, float), np.asarray(smaller, float)
    n = len(a)
    if np.isfinite(b).all() and (np.isfinite(a) | (a == math.inf)).all() and np.isinf(a).any():
        finite = np.isfinite(a)
        holds = bool((a[finite] - b[finite] > margin).all())
        return Comparison(math.inf if holds else math.nan, 0.0, margin, n)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return Comparison(math.nan, math.nan, margin, n)
    difference = a - b
    error = float(difference.std(ddof=1) / math.sqrt(n))
    return Comparison(float(difference.mean()), error, margin + float(student.ppf(0.95, n - 1)) * error, n)


@dataclass
class Claim:
    """A sentence that the numbers decide."""

    text: str
    holds: bool
    evidence: str
    required: bool = True
    """Whether it is the slides' claim, which should hold; else an observation beside it."""


@dataclass
class Column:
    """A number of every cell, in the table of the report."""

    key: str
    title: str
    percent: bool = False

    def cell(self, values: Sequence[float]) -> str:
        return spread(values, self.percent)


@dataclass
class Findings:
    """What a study found."""

    claims: list[Claim]
    columns: list[Column]
    figures: dict[str, tuple[str, Figure]] = field(default_factory=dict)
    """By the name of the file: a caption and the figure."""
    setup: str = ""
    """How it was done, in a paragraph."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A study: its question, the slides' claim, its default number of seeds and what runs it."""

    name: str
    title: str
    claim: str
    seeds: int
    run: Callable[[Cells], Findings]


class Cells:
    """Runs cells, and holds their numbers: `cells.run(settings, cell)`, then `cells.of(setting, key)`."""

    def __init__(self, seeds: int, quick: bool, console: Console | None = None) -> None:
        self.seeds, self.quick = list(range(seeds)), quick
        self.console = console or Console()
        self.numbers: dict[str, list[Numbers]] = {}
        self.groups: dict[str, str] = {}

    def run(self, settings: Mapping[str, Any], cell: Callable[[Any, int], Numbers], group: str = "") -> None:
        """`cell(settings[name], seed)` for each setting and seed; it gives numbers, or lists of them for curves."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(group or "cells", total=len(settings) * len(self.seeds))
            for name, setting in settings.items():
                if name in self.numbers:
                    raise ValueError(f"two settings are called {name!r}")
                self.numbers[name], self.groups[name] = [], group
                for seed in self.seeds:
                    progress.update(task, description=f"{name}, seed {seed}")
                    torch.manual_seed(1000 * seed + 1)  # what a cell draws beyond its own generators
                    self.numbers[name].append(cell(setting, seed))
                    progress.advance(task)

    def of(self, setting: str, key: str) -> list[Any]:
        """A number of each seed."""
        return [numbers[key] for numbers in self.numbers[setting]]

    def exceeds(self, key: str, larger: str, smaller: str, margin: float = 0.0) -> Comparison:
        return exceeds(self.of(larger, key), self.of(smaller, key), margin)


def number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ("diverged" if math.isnan(value) else str(value))


def spread(values: Sequence[float], percent: bool = False) -> str:
    """mean ± standard deviation over the seeds; how many diverged, where some did."""
    finite = [v for v in values if math.isfinite(v)]
    lost = f"{len(values) - len(finite)} of {len(values)} diverged" if len(finite) < len(values) else ""
    if not finite:
        return "diverged"
    mean, deviation = float(np.mean(finite)), float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0
    text = f"{100 * mean:.1f} ± {100 * deviation:.1f} %" if percent else f"{number(mean)} ± {number(deviation)}"
    return f"{text} ({lost})" if lost else text


def run_study(study: Study, seeds: int | None, out: Path, quick: bool, console: Console | None = None) -> int:
    """Run, write `report.md`, `results.json` and `figures/` into `out`, print the verdict; 1 if a claim failed."""
    console = console or Console()
    count = (3 if quick else study.seeds) if seeds is None else seeds
    words = ["bp-torch", "study", study.name, *([] if seeds is None else ["--seeds", str(seeds)])]
    command = shlex.join([*words, *(["--quick"] if quick else [])])
    started = time.process_time()
    cells = Cells(count, quick, console)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small
    try:
        findings = study.run(cells)
    finally:
        torch.set_num_threads(threads)
    seconds = time.process_time() - started
    report = markdown(study, cells, findings, command, seconds)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, (_, figure) in findings.figures.items():
        figure.savefig(out / "figures" / f"{name}.png", dpi=100)
    (out / "report.md").write_text(report, "utf-8")
    (out / "results.json").write_text(results(study, cells, findings, command, seconds), "utf-8")
    show(cells, findings, console)
    failed = [claim for claim in findings.claims if claim.required and not claim.holds]
    console.print(verdict(findings), style="bold" if not failed else "bold red", soft_wrap=True)
    console.print(f"{out / 'report.md'}, {seconds:.0f} s of processor time", soft_wrap=True, highlight=False)
    return 1 if failed else 0


def verdict(findings: Findings) -> str:
    required = [claim for claim in findings.claims if claim.required]
    failed = [claim for claim in required if not claim.holds]
    if not failed:
        return f"The claim held: all {len(required)} of its parts, from the numbers."
    return f"The claim did not hold in {len(failed)} of its {len(required)} parts: " + "; ".join(c.text for c in failed)


def show(cells: Cells, findings: Findings, console: Console) -> None:
    table = Table("", *(column.title for column in findings.columns))
    for name in cells.numbers:
        table.add_row(name, *_cells(cells, findings, name))
    claims = Table("claim", "holds", "from the numbers")
    for claim in findings.claims:
        mark = "yes" if claim.holds else "[red]NO" if claim.required else "no"
        claims.add_row(claim.text if claim.required else f"[dim]{claim.text}", mark, claim.evidence)
    console.print(table, claims)


def _cells(cells: Cells, findings: Findings, name: str) -> list[str]:
    has = cells.numbers[name][0]
    return [column.cell(cells.of(name, column.key)) if column.key in has else "" for column in findings.columns]


def markdown(study: Study, cells: Cells, findings: Findings, command: str, seconds: float) -> str:
    quick = " A quick run, for tests: too short to say anything." if cells.quick else ""
    lines = [f"# {study.title}", "", f"The slides' claim: {study.claim}", "", f"**{verdict(findings)}**{quick}", ""]
    lines += [f"`{command}`, {date.today().isoformat()}, {seconds:.0f} s of processor time on one core of "
              f"{hardware()}; torch {torch.__version__}.", ""]  # fmt: skip
    lines += [findings.setup, "", "## Verdict", "", RULE, ""]
    lines += ["| the slides' claim, in parts | holds | from the numbers |", "|---|---|---|"]
    lines += _claims(findings, required=True)
    if any(not claim.required for claim in findings.claims):
        lines += ["", "Observed beside it, with no claim to hold:", ""]
        lines += ["| | | from the numbers |", "|---|---|---|", *_claims(findings, required=False)]
    lines += ["", "## Numbers", "", f"Mean ± standard deviation over {len(cells.seeds)} seeds.", ""]
    groups = dict.fromkeys(cells.groups.values())
    for group in groups:
        names = [name for name in cells.numbers if cells.groups[name] == group]
        columns = [c for c in findings.columns if any(c.key in cells.numbers[name][0] for name in names)]
        lines += [
            f"| {group} | " + " | ".join(column.title for column in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name in names:
            has = cells.numbers[name][0]
            shown = [column.cell(cells.of(name, column.key)) if column.key in has else "" for column in columns]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        lines.append("")
    for note in findings.notes:
        lines += [note, ""]
    for name, (caption, _) in findings.figures.items():
        lines += [f"![{caption}](figures/{name}.png)", "", f"*{caption}*", ""]
    return "\n".join(lines)


def _claims(findings: Findings, required: bool) -> list[str]:
    chosen = [claim for claim in findings.claims if claim.required is required]
    return [f"| {c.text} | {'yes' if c.holds else '**no**' if required else 'no'} | {c.evidence} |" for c in chosen]


def results(study: Study, cells: Cells, findings: Findings, command: str, seconds: float) -> str:
    """Everything as JSON; what is not finite becomes null. Curves are left out of what is told by seed."""
    plain = {
        name: {key: [n[key] for n in numbers] for key in numbers[0] if isinstance(numbers[0][key], (int, float))}
        for name, numbers in cells.numbers.items()
    }
    document = {
        "study": study.name,
        "command": command,
        "date": date.today().isoformat(),
        "seconds": round(seconds, 1),
        "hardware": hardware(),
        "torch": torch.__version__,
        "quick": cells.quick,
        "seeds": cells.seeds,
        "holds": all(claim.holds for claim in findings.claims if claim.required),
        "claims": [asdict(claim) for claim in findings.claims],
        "settings": plain,
    }
    return json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def hardware() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
