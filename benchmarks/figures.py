"""The figures of docs/benchmarks.md. They need matplotlib, which is in the extra ``recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"bp_torch": "#1f6fb4", "compile": "#e08a2e", "max-autotune": "#8a5a9e", "torch": "#777777"}
LABELS = {"compile": "torch.compile", "max-autotune": "torch.compile, max-autotune", "torch": "torch.nn"}


def names(results: report.Results) -> list[str]:
    """The files that are drawn of a device's results."""
    kinds = ["ratios", "roofline"] if report.is_gpu(results) else ["ratios"]
    return [f"benchmarks-{report.slug(results['runs'][0])}-{kind}.png" for kind in kinds]


def draw(results: report.Results, folder: Path) -> list[Path]:
    """Draws what :func:`names` names into ``folder``."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names(results):
        paths.append(folder / name)
        figure = Figure(layout="constrained")
        if name.endswith("-roofline.png"):
            figure.set_size_inches(8, 5.5)
            roofline(figure.add_subplot(), results)
        else:
            groups = _groups(results)
            figure.set_size_inches(8, 1.3 + 0.42 * len(groups))
            ratios(figure.add_subplot(), groups)
        figure.suptitle(_title(results), fontsize=10)
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def ratios(axes: Axes, groups: dict[str, dict[str, Any]]) -> None:
    """A bar for each layer and provider: how many times as fast as torch.nn; to the right faster, to the left slower.

    The axis is logarithmic, so that twice as fast is as long as half as fast.
    """
    providers = [name for name in ("bp_torch", "compile", "max-autotune") if any(name in g for g in groups.values())]
    height = 0.8 / max(1, len(providers))
    speedups = [row["speedup"] for g in groups.values() for row in g.values() if row["speedup"]]
    low, high = min([0.7, *speedups]) / 1.35, max([1.4, *speedups]) * 1.35
    for place, rows in enumerate(groups.values()):
        for index, provider in enumerate(providers):
            row, y = rows.get(provider), place + (index - (len(providers) - 1) / 2) * height
            if row is None:
                continue
            value = row["speedup"] or 1
            axes.barh(y, value - 1, 0.9 * height, left=1, color=COLORS[provider])
            text, slower = f"{value:.2f}" if row["status"] == "measured" else row["status"], value < 1
            x, side = (value / 1.02, "right") if slower else (value * 1.02, "left")
            axes.text(x, y, text, va="center", ha=side, fontsize=7, color=COLORS[provider])
    for provider in providers:
        axes.barh(0, 0, left=1, color=COLORS[provider], label=LABELS.get(provider, provider))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.figure.supxlabel(
        "times as fast as torch.nn: a layer's forward + backward, a model's training step", fontsize=8
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def roofline(axes: Axes, results: report.Results) -> None:
    """Operations per second over operations per byte, below what a copy and a product reach."""
    run = results["runs"][-1]
    bandwidth, rate = run["copy_bytes_per_s"], run["product_operations_per_s"]
    points = [row for row in results["rows"] if row["status"] == "measured" and row["floor_bytes"]]
    points = [row for row in points if row["kind"] == "layer" and row["mode"] == "both"]
    height = rate  # of the lowest label
    for row in sorted(points, key=lambda row: -row["floor_operations"] / row["median_ms"]):
        if row["provider"] in ("bp_torch", "torch"):
            x = row["floor_operations"] / row["floor_bytes"]
            y = row["floor_operations"] / row["median_ms"] * 1e3
            axes.plot(x, y, "o", markersize=4, color=COLORS[row["provider"]], alpha=0.8)
            if row["provider"] == "bp_torch" and row["name"].startswith("linear"):
                height = min(y, height / 1.3)
                line = {"arrowstyle": "-", "linewidth": 0.3, "color": COLORS["torch"]}
                axes.annotate(row["name"], (x, y), (1.5 * x, height), fontsize=6, va="center", arrowprops=line)
    at = [row["floor_operations"] / row["floor_bytes"] for row in points] or [1.0]
    low, high = min(at) / 3, max(*at, rate / bandwidth) * 20
    axes.plot([low, rate / bandwidth, high], [low * bandwidth, rate, rate], color="black", linewidth=1)
    axes.text(min(at), 0.02, "without products", transform=axes.get_xaxis_transform(), fontsize=6, ha="center")
    told = f"copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s, as measured"
    axes.text(0.02, 0.96, told, transform=axes.transAxes, fontsize=8, va="top")
    for provider in ("bp_torch", "torch"):
        axes.plot([], [], "o", markersize=4, color=COLORS[provider], label=LABELS.get(provider, provider))
    axes.set_xscale("log")
    axes.set_yscale("log")
    label = "operations per byte that must move (an element read or written is one, where there is no product)"
    axes.set_xlabel(label, fontsize=8)
    axes.set_ylabel("operations per second")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _groups(results: report.Results) -> dict[str, dict[str, Any]]:
    """Layers forward and backward, models by the step: name → rows by provider."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        if (row["kind"], row["mode"]) in (("layer", "both"), ("model", "step")):
            named = row["name"] if row["dtype"] in ("float32", "bfloat16") else f"{row['name']}, {row['dtype']}"
            found.setdefault(named, {})[row["provider"]] = row
    return found


def _title(results: report.Results) -> str:
    run = results["runs"][-1]
    threads = "" if report.is_gpu(results) else f", {run['threads']} threads"
    return f"{run['device']}{threads}, torch {run['torch']}, {run['date'][:10]}"
