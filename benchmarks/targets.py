"""What is aimed at, as ratios to what torch.nn does in the same run, and what the results say about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Providers = dict[str, Row]
"""A row of each provider that was measured."""


@dataclass(frozen=True)
class Measure:
    """A number of bp_torch's row, and whether it should be large."""

    text: str
    large: bool
    of: Callable[[Providers], float | None]
    unit: str = ""
    scale: float = 1.0


def _compiled(rows: Providers) -> list[Row]:
    return [rows[name] for name in ("compile", "max-autotune") if name in rows]


def _over_compile(rows: Providers) -> float | None:
    times = [row["median_ms"] for row in _compiled(rows)]
    return min(times) / rows["bp_torch"]["median_ms"] if times else None


def _saved_over_compile(rows: Providers) -> float | None:
    saved, ours = [row["saved_bytes"] for row in _compiled(rows)], rows["bp_torch"]["saved_bytes"]
    if not saved:
        return None
    return ours / min(saved) if min(saved) else 1.0 if ours == 0 else math.inf


def _rate(rows: Providers) -> float | None:
    row = rows["bp_torch"]
    return row["floor_bytes"] / row["median_ms"] * 1e3


def _slowdown(rows: Providers) -> float | None:
    speedup = rows["bp_torch"]["speedup"]
    return 1 / speedup if speedup else None


SPEEDUP = Measure("times as fast as torch.nn", True, lambda rows: rows["bp_torch"]["speedup"], " ×")
SLOWDOWN = Measure("time of torch.nn's", False, _slowdown, " ×")
PER_HIDDEN = Measure(
    "saved bytes per hidden element", False, lambda rows: rows["bp_torch"]["saved_per_hidden"], " bytes"
)
SAVED = Measure(
    "bytes saved beyond input and output", False, lambda rows: float(rows["bp_torch"]["saved_bytes"]), " bytes"
)
SHARE = Measure("share of the ceiling", True, lambda rows: rows["bp_torch"]["share_of_ceiling"], " %", 100)
RATE = Measure("bytes of the floor per second", True, _rate, " TB/s", 1e-12)
OVER_COMPILE = Measure("times as fast as the best of torch.compile", True, _over_compile, " ×")
SAVED_OVER_COMPILE = Measure("saved bytes beside the least of torch.compile", False, _saved_over_compile, " ×")


@dataclass(frozen=True)
class Target:
    """A bound that every matching row must keep; the worst of them counts."""

    device: str
    name: str
    rows: tuple[str, ...]
    """Patterns of ``kind name``."""
    measure: Measure
    bound: float
    mode: str = "both"

    @property
    def key(self) -> str:
        """Its heading in causes.md."""
        return f"{self.device}: {self.name}"


def _cpu(row: str, bound: float, measure: Measure = SPEEDUP, mode: str = "both", name: str = "") -> Target:
    return Target("cpu", name or row.partition(" ")[2], (row,), measure, bound, mode)


def _gpu(name: str, bound: float, *rows: str, measure: Measure = SPEEDUP, mode: str = "both") -> Target:
    return Target("cuda", name, rows, measure, bound, mode)


BIG_NORMS = tuple(f"layer batch_norm_relu {size}" for size in ("65536x1024", "32x64x112x112*", "128x512x28x28*"))

TARGETS = (
    _cpu("layer linear_relu_dropout 64x64x64", 0.95),
    _cpu("layer linear_relu_dropout 256x512x512", 1.25),
    _cpu("layer linear_relu_dropout 4096x1024x1024", 1.1),
    _cpu("layer dropout 4096x1024", 2.5),
    _cpu("layer batch_norm_relu 4096x1024", 1.1),
    _cpu("layer batch_norm_relu 65536x128", 1.1),
    _cpu("layer cross_entropy 1024x32000", 1.25),
    _cpu("layer cross_entropy 64x10", 0.9),
    _cpu("layer mse 4096x1024", 1.3),
    _cpu("model mlp 1024x512x3", 1.3, mode="step"),
    _cpu("model mlp 1024x512x3", 4, PER_HIDDEN, name="mlp 1024x512x3, memory"),
    _cpu("model mlp_batch_norm 1024x512x3", 8, PER_HIDDEN, name="mlp_batch_norm 1024x512x3, memory"),
    _cpu("layer linear 64x64x64", 1.1, SLOWDOWN),
    _gpu("linear + relu + dropout, 1024 to 1024", 1.45, "layer linear_relu_dropout 65536x1024x1024"),
    _gpu("linear + relu + dropout, 256 to 1024", 2.0, "layer linear_relu_dropout 65536x1024x256"),
    _gpu("linear + relu + dropout, every shape", 1.0, "layer linear_relu*"),
    _gpu("product with epilogue beside the plain product", 0.95, "layer linear_relu_dropout 65536x1024x1024",
         measure=SHARE, mode="forward"),
    _gpu("linear + relu + dropout, memory", 0, "layer linear_relu_dropout *", measure=SAVED),
    _gpu("residual + dropout + relu, of a copy", 0.93, "layer residual_dropout_relu *", measure=SHARE),
    _gpu("residual + dropout + relu", 1.9, "layer residual_dropout_relu *"),
    _gpu("dropout + residual", 1.5, "layer dropout_residual *"),
    _gpu("batch norm + relu, of a copy", 0.90, *BIG_NORMS, measure=SHARE),
    _gpu("batch norm + relu, large", 1.5, *BIG_NORMS),
    _gpu("batch norm + relu, up to 16 MB", 2.0, "layer batch_norm_relu 32x256x28x28*"),
    _gpu("batch norm, every shape", 1.0, "layer batch_norm*"),
    _gpu("batch norm + residual + relu", 1.5, "layer batch_norm_residual_relu *"),
    _gpu("softmax", 2.85e12, "layer softmax *", measure=RATE),
    _gpu("cross-entropy, bytes", 2.9e12, "layer cross_entropy 8192x32000", "layer cross_entropy 4096x128256",
         measure=RATE),
    _gpu("cross-entropy", 2.0, "layer cross_entropy 8192x32000", "layer cross_entropy 4096x128256"),
    _gpu("mean squared error", 2.1, "layer mse 16384x4096"),
    _gpu("narrow MLP of width 64", 4.0, "layer narrow_mlp 65536x64x4"),
    _gpu("small shapes", 1.0, "layer linear*64x64x64", "layer cross_entropy 64x10", "layer mse 1024x1024"),
    _gpu("beside torch.compile, every row", 1.0, "layer *", "model *", measure=OVER_COMPILE),
    _gpu("beside torch.compile, every row, memory", 1.0, "layer *", "model *", measure=SAVED_OVER_COMPILE),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A target, and the worst of its rows that were measured; None where there is none."""

    target: Target
    value: float | None
    row: str

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target.bound if self.target.measure.large else self.value <= self.target.bound

    @property
    def verdict(self) -> str:
        """``met``, ``missed by ...``, or ``not measured``."""
        if self.value is None:
            return "not measured"
        if self.met:
            return "met"
        if not self.target.bound or math.isinf(self.value):
            return "missed"
        return f"missed by {abs(self.value / self.target.bound - 1):.0%}"


def outcome(target: Target, rows: list[Row]) -> Outcome:
    """What the rows of a device say about a target, in the precision that it is meant for."""
    precision = "float32" if target.device == "cpu" else "bfloat16"
    groups: dict[tuple[str, str], Providers] = {}
    for row in rows:
        named = f"{row['kind']} {row['name']}"
        if (
            row["status"] == "measured"
            and row["mode"] == target.mode
            and row["dtype"].endswith(precision)
            and any(fnmatchcase(named, pattern) for pattern in target.rows)
        ):
            groups.setdefault((named, row["dtype"]), {})[row["provider"]] = row
    values = {name: target.measure.of(rows) for (name, _), rows in groups.items() if "bp_torch" in rows}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return Outcome(target, None, "")
    worst = (min if target.measure.large else max)(known, key=lambda name: known[name])
    return Outcome(target, known[worst], worst.partition(" ")[2])


CAUSES = Path(__file__).with_name("causes.md")


def causes(text: str | None = None) -> dict[str, str]:
    """Heading → prose of causes.md. A heading is a target's key, or a device.

    Raises:
        ValueError: a heading that is neither.
    """
    text = CAUSES.read_text(encoding="utf-8") if text is None else text
    known = {target.key for target in TARGETS} | {target.device for target in TARGETS}
    found: dict[str, str] = {}
    for section in f"\n{text}".split("\n## ")[1:]:
        heading, _, prose = section.partition("\n")
        if heading.strip() not in known:
            raise ValueError(f"causes.md: {heading.strip()!r}: expected one of {sorted(known)}")
        found[heading.strip()] = prose.strip()
    return found
