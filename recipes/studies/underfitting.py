"""Underfitting: networks too small, too shallow, or trained too briefly for their task, and what cures them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure

from bp_torch import nn

from .core import Cells, Claim, Column, Findings, Numbers, Study
from .figures import TEST, TRAIN, curve, tidy
from .training import Recipe, mnist1d, train


@dataclass(frozen=True)
class Setting:
    hidden: tuple[int, ...]
    epochs: int


WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
DEPTHS = (0, 1, 2, 3, 4)
EPOCHS = (1, 2, 5, 10, 20, 40)
NARROW, WIDE = 16, 64


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def cell(setting: Setting, seed: int) -> Numbers:
    split = mnist1d(seed, train=2000)
    model = nn.MLP(40, list(setting.hidden), 10, activation="relu")
    numbers = train(model, split, Recipe(setting.epochs, adam, batch=50, measure_every=2), seed).numbers()
    numbers["parameters"] = float(sum(p.numel() for p in model.parameters()))
    return numbers


def run(cells: Cells) -> Findings:
    epochs = 10 if cells.quick else 40
    widths, depths = ((1, 8, 128), (0, 1, 2)) if cells.quick else (WIDTHS, DEPTHS)
    lengths = [e for e in EPOCHS if e <= epochs]
    width = {f"width {w}": Setting((w,), epochs) for w in widths}
    depth = {f"depth {d}": Setting((NARROW,) * d, epochs) for d in depths}
    length = {f"{e} epoch{'s' if e > 1 else ''}": Setting((WIDE, WIDE), e) for e in lengths}
    cells.run(width, cell, "one hidden layer, its width")
    cells.run(depth, cell, f"hidden layers of {NARROW} units, their number")
    cells.run(length, cell, f"two hidden layers of {WIDE} units, epochs")
    return findings(cells, list(width), list(depth), list(length), epochs)


def findings(cells: Cells, width: list[str], depth: list[str], length: list[str], epochs: int) -> Findings:
    claims: list[Claim] = []
    least, enough = width[0], width[-1]
    low = cells.exceeds("train_loss", least, enough)
    claims.append(Claim(f"the network of {least} underfits: its loss is higher even on the rows it trained on",
                        low.holds, f"than {enough}: by {low}"))  # fmt: skip
    for what, names in (("more units", width), ("more layers", depth), ("longer training", length)):
        # Where a further step no longer lowers the training loss, capacity is enough: the slides promise nothing there.
        best = min(names, key=lambda name: sum(cells.of(name, "train_loss")))
        for key, larger, smaller, text in (
            ("train_loss", names[0], best, "lowers the training loss"),
            ("test_accuracy", best, names[0], "raises the test accuracy"),
        ):
            compared = cells.exceeds(key, larger, smaller)
            claims.append(Claim(f"{what} {text}: {best} against {names[0]}", compared.holds, f"by {compared}"))
        for before, after in pairwise(names):
            step = cells.exceeds("test_accuracy", after, before)
            claims.append(
                Claim(f"{after} has a higher test accuracy than {before}", step.holds, f"by {step}", required=False)
            )
    setup = (
        "MLPs with relu learn MNIST-1D (10 classes, 40 points; a linear model is known to reach 32 %) from 2,000 rows "
        f"by Adam (learning rate 0.003, batches of 50), {epochs} epochs where nothing else is said; 1,000 "
        "other rows are the "
        "test rows. The width is varied with one hidden layer, the depth with hidden layers of 16 units, the length of "
        "training with two hidden layers of 64. A part of the claim compares the least with what has the lowest "
        "training loss."
    )
    columns = [
        Column("parameters", "parameters"),
        Column("train_loss", "training loss"),
        Column("test_loss", "test loss"),
        Column("train_accuracy", "training accuracy", percent=True),
        Column("test_accuracy", "test accuracy", percent=True),
    ]
    note = (
        "Underfitting shows in the training accuracy. Where it rises and the test accuracy no longer does, overfitting "
        "begins: the cure of the one is the cause of the other."
    )
    figures = {
        "capacity": ("Accuracy against width, depth and length of training; bars: standard deviation over the seeds",
                     figure(cells, width, depth, length)),
        "curves": (
            "Accuracy by epoch: solid on the training rows, dashed on the test rows",
            curves(cells, width, depth),
        ),
    }  # fmt: skip
    return Findings(claims, columns, figures, setup, [note])


def figure(cells: Cells, width: list[str], depth: list[str], length: list[str]) -> Figure:
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    groups: list[tuple[str, str, list[str], Callable[[str], str]]] = [
        ("Capacity: width", "units of the hidden layer", width, lambda name: name.split()[1]),
        ("Capacity: depth", f"hidden layers of {NARROW} units", depth, lambda name: name.split()[1]),
        ("Length of training", "epochs", length, lambda name: name.split()[0]),
    ]
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (title, xlabel, names, tick) in zip(panels, groups, strict=True):
        for key, label, colour in (("train_accuracy", "training", TRAIN), ("test_accuracy", "test", TEST)):
            values = torch.tensor([cells.of(name, key) for name in names])
            axes.errorbar(
                range(len(names)), values.mean(1), values.std(1), marker="o", capsize=3, color=colour, label=label
            )
        axes.set_xticks(range(len(names)), [tick(name) for name in names])
        tidy(axes, title, xlabel, "accuracy" if axes is panels[0] else "", percent=True)
    panels[0].legend(frameon=False)
    return figure


def curves(cells: Cells, width: list[str], depth: list[str]) -> Figure:
    from matplotlib import colormaps

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, names, title in zip(panels, (width, depth), ("Width", "Depth"), strict=True):
        for name, colour in zip(names, colormaps["viridis"]([i / len(names) for i in range(len(names))]), strict=True):
            curve(axes, cells, name, "train_accuracy", name, colour)
            curve(axes, cells, name, "test_accuracy", "", colour, "--")
        tidy(axes, title, "epoch", "accuracy" if axes is panels[0] else "", percent=True)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


STUDY = Study(
    "underfitting",
    "Underfitting",
    "more capacity (wider and deeper networks, a more complex structure) and longer training cure underfitting.",
    seeds=5,
    run=run,
)
