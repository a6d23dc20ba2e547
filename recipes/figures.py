"""The figures of a report, one function each, from plain numbers to a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

Rows = Sequence[dict[str, float]]
TRAIN, VAL, TEST = "tab:blue", "tab:orange", "tab:green"


def axes_at(figure: Figure, position: tuple[int, int, int], title: str, xlabel: str, ylabel: str) -> Axes:
    axes = figure.add_subplot(*position)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _over_epochs(figure: Figure, position: tuple[int, int, int], title: str, ylabel: str) -> Axes:
    axes = axes_at(figure, position, title, "epoch", ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def curves(rows: Rows, best_epoch: int, test: dict[str, float]) -> Figure:
    """Each metric of the training and validation splits by epoch, with the test result at the best epoch.

    A run that ended in its first epoch has no validation.
    """
    validated = [row for row in rows if any(name.startswith("val_") for name in row)]
    measured = [name.removeprefix("train_") for name in rows[0] if name.startswith("train_")]
    metrics = [name for name in measured if not validated or f"val_{name}" in validated[0]]
    metrics = sorted(metrics, key=lambda name: name != "loss")
    figure = Figure(figsize=(5.5 * len(metrics), 4.2), layout="constrained")
    for place, metric in enumerate(metrics, 1):
        axes = _over_epochs(figure, (1, len(metrics), place), metric.capitalize(), metric)
        train, val = [row[f"train_{metric}"] for row in rows], [row[f"val_{metric}"] for row in validated]
        axes.plot([row["epoch"] for row in rows], train, color=TRAIN, label="training (augmentation and dropout on)")
        axes.plot([row["epoch"] for row in validated], val, color=VAL, label="validation")
        axes.axvline(best_epoch, color="gray", linestyle=":", label=f"tested weights (epoch {best_epoch})")
        if metric in test:
            text = f"{test[metric]:.2%}" if metric == "accuracy" else f"{test[metric]:.4f}"
            axes.plot(best_epoch, test[metric], "*", color=TEST, markersize=12, label=f"test: {text}", zorder=3)
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(bottom=max(0.0, float(np.quantile(val + train, 0.05)) - 0.02), top=1.005)
        elif min(val + train) > 0:
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9)
    return figure


def learning_rate(rows: Rows, rates: Sequence[tuple[int, float]] = ()) -> Figure:
    """The learning rate of each optimizer step, (step, rate); of each epoch's last step where these are not known."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = _over_epochs(figure, (1, 1, 1), "Learning rate", "learning rate")
    if rates:
        axes.set_xlabel("optimizer step")
        axes.plot([step for step, _ in rates], [rate for _, rate in rates], color=TRAIN, drawstyle="steps-post")
        if len(rows) > 1:
            per_epoch = rows[-1]["step"] / len(rows)
            epochs = axes.secondary_xaxis(-0.22)
            epochs.set_xticks([row["step"] for row in rows][:: -(-len(rows) // 10)], labels=None)
            epochs.xaxis.set_major_formatter(lambda step, _: f"{step / per_epoch:.0f}")
            epochs.set_xlabel("epoch")
    else:
        axes.plot([row["epoch"] for row in rows], [row["lr"] for row in rows], color=TRAIN)
        axes.set_ylabel("learning rate of the epoch's last step")
    axes.set_ylim(bottom=0)
    return figure


def learning_rate_test(rates: Sequence[float], losses: Sequence[float], chosen: float) -> Figure:
    """The smoothed training loss while the learning rate rises, and the rate that was chosen."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = axes_at(figure, (1, 1, 1), "Learning-rate finder", "learning rate", "training loss, smoothed")
    axes.grid(alpha=0.3)
    points = [(rate, loss) for rate, loss in zip(rates, losses, strict=False) if np.isfinite(loss)]
    axes.plot(*zip(*points, strict=True), color=TRAIN)
    axes.axvline(chosen, color=VAL, linestyle=":", label=f"steepest fall: {chosen:.2g}")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=9)
    return figure


def penalty(rows: Rows) -> Figure:
    """The penalties beside the training loss, which they are not part of."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = _over_epochs(figure, (1, 1, 1), "Penalty, apart from the loss", "mean over the epoch")
    labels = {"train_loss": "training loss", "penalty": "penalty", "l1_penalty": "λ Σ |w| at the end of the epoch"}
    for name, label in labels.items():
        if name in rows[0]:
            axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def sparsity(rows: Rows, best_epoch: int = 0) -> Figure:
    """The share of weights that are exactly zero, by layer from the first (dark) to the last (bright), and of all."""
    names = [name for name in rows[0] if name.startswith("sparsity/")]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = _over_epochs(figure, (1, 1, 1), "Weights that are exactly zero", "share of the layer's weights")
    epochs = [row["epoch"] for row in rows]
    for name, colour in zip(names, colormaps["viridis"](np.linspace(0, 0.92, len(names))), strict=True):
        axes.plot(epochs, [row[name] for row in rows], color=colour, label=name.removeprefix("sparsity/"))
    axes.plot(epochs, [row["sparsity"] for row in rows], color="black", linewidth=2, label="all")
    if best_epoch:
        axes.axvline(best_epoch, color="gray", linestyle=":", label=f"tested weights (epoch {best_epoch})")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1)
    axes.legend(title="first layer to last", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def gradient_norms(rows: Rows) -> Figure:
    """Gradient norm by layer, from the first layer (dark) to the last (bright); normalization layers are dashed."""
    names = [name for name in rows[0] if name.startswith("grad_norm/")]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = _over_epochs(figure, (1, 1, 1), "Gradient norm by layer", "‖∂loss/∂parameters‖₂, mean over the epoch")
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    for name, colour in zip(names, colours, strict=True):
        label = name.removeprefix("grad_norm/").removeprefix("network.")
        style = "--" if "norm" in label else "-"
        axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], style, color=colour, label=label)
    axes.set_yscale("log")
    axes.legend(title="first layer to last", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return figure


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts of (true class, predicted class); mistakes in red, coloured by their share of the true class."""
    n = len(classes)
    side = max(4.5, 0.5 * n + 1.5)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    right = int(np.trace(counts))
    axes = axes_at(
        figure, (1, 1, 1), f"Confusion on the test split: {right} of {counts.sum()} right", "predicted", "true"
    )
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(counts), strict=True):
        colour = ("white" if share[i, j] > 0.5 else "black") if i == j else "crimson"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, weight=None if i == j else "bold")
    axes.set_xticks(range(n), classes)
    axes.set_yticks(range(n), classes)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class", format=PercentFormatter(1.0))
    return figure


def misclassified(images: np.ndarray, captions: Sequence[str], shown: int = 24) -> Figure:
    """The images (N, H, W) that were read wrongly, each under its caption; the first `shown` of them."""
    total = len(images)
    images = images[:shown]
    columns = min(6, max(3, len(images)))
    lines = max(1, -(-len(images) // columns))
    more = f" (the first {shown} of {total})" if total > shown else ""
    figure = Figure(figsize=(1.6 * columns, 2.0 * lines + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"Misclassified in the test split: {total}{more}", fontsize=11)
    axes.set_axis_off()
    for place, (image, caption) in enumerate(zip(images, captions, strict=False)):
        line, column = divmod(place, columns)  # each image is 1 wide and high, in a cell of 1.15 × 1.4
        left, top = 1.15 * column, 1.4 * line
        axes.imshow(image, cmap="gray_r", extent=(left, left + 1, top + 1, top), interpolation="nearest")
        axes.add_patch(Rectangle((left, top), 1, 1, fill=False, color="gray", linewidth=0.5))
        axes.text(left + 0.5, top - 0.04, caption, ha="center", va="bottom", fontsize=9)
    axes.set_xlim(-0.1, 1.15 * columns - 0.05)
    axes.set_ylim(1.4 * lines - 0.35, -0.38)
    return figure
