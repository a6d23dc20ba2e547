"""Figures that several studies draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .core import Cells

TRAIN, TEST, ACCENT = "tab:blue", "tab:orange", "tab:green"


def tidy(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "", percent: bool = False) -> Axes:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return axes


def bars(axes: Axes, cells: Cells, names: Sequence[str], keys: Sequence[tuple[str, str, str]], percent: bool) -> None:
    """Horizontal bars of the mean with the standard deviation as a line: for each setting one bar for each
    (key, label, colour), the first setting on top."""
    height = 0.8 / len(keys)
    for place, (key, label, colour) in enumerate(keys):
        values = [[v for v in cells.of(name, key) if math.isfinite(v)] for name in names]
        means = [float(np.mean(v)) if v else 0.0 for v in values]
        deviations = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
        y = np.arange(len(names)) + (place - (len(keys) - 1) / 2) * height
        axes.barh(
            y, means, height, xerr=deviations, color=colour, label=label, error_kw={"elinewidth": 1, "capsize": 2}
        )
        for at, v in zip(y, values, strict=True):
            if not v:
                axes.text(0.01, at, " diverged", va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    if percent:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def curve(axes: Axes, cells: Cells, name: str, key: str, label: str, colour: Any, style: str = "-") -> None:
    """The mean over seeds by epoch, with a band of one standard deviation; it ends where the first seed's run did."""
    runs = cells.of(name, "curves")
    length = min(len(run[key]) for run in runs)
    values = np.array([run[key][:length] for run in runs], float)
    values[~np.isfinite(values)] = np.nan
    known = np.isfinite(values).any(0)
    if not known.any():
        return
    epochs = np.array(runs[0]["epoch"][:length])[known]
    mean, deviation = np.nanmean(values[:, known], 0), np.nanstd(values[:, known], 0)
    axes.plot(epochs, mean, style, color=colour, label=label, linewidth=1.4)
    axes.fill_between(epochs, np.maximum(mean - deviation, mean / 10), mean + deviation, color=colour, alpha=0.2, lw=0)


def training_curves(cells: Cells, names: Sequence[str], columns: int = 4, measure: str = "loss") -> Figure:
    """A panel for each setting: training and test loss by epoch, all on the same axes."""
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * lines + 0.3), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, name in zip(panels, names, strict=False):
        curve(axes, cells, name, f"train_{measure}", "training", TRAIN)
        curve(axes, cells, name, f"test_{measure}", "test", TEST)
        tidy(axes, name, percent=measure == "accuracy")
        if measure == "loss":
            axes.set_yscale("log")
    for axes in list(panels)[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("loss (cross-entropy)" if measure == "loss" else measure, fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
