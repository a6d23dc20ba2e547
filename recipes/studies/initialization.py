"""Initialization: what goes wrong with zeros, with equal weights, with weights too small and too large."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bp_torch import nn

from .core import Cells, Claim, Column, Findings, Numbers, Study
from .figures import curve, tidy
from .training import Recipe, digits, train

WIDTH, HIDDEN = 64, 5
CHANCE = 0.1


@dataclass(frozen=True)
class Setting:
    """Weights by `scale` · √(2/inputs) · N(0, 1), or all equal to `constant` where that is given."""

    scale: float = 1.0
    constant: float | None = None


SETTINGS = {
    "zeros": Setting(constant=0.0),
    "all equal": Setting(constant=0.02),
    "too small (a tenth)": Setting(scale=0.1),
    "right (He)": Setting(),
    "too large (ten times)": Setting(scale=10.0),
}
COLOURS = dict(zip(SETTINGS, ("tab:gray", "tab:brown", "tab:blue", "tab:green", "tab:red"), strict=True))

STYLES = dict(
    zip(SETTINGS, ("-", "-", "--", "-", ":"), strict=True)
)  # three of them lie on top of each other, at chance


def network(setting: Setting) -> nn.MLP:
    model = nn.MLP(64, [WIDTH] * HIDDEN, 10, activation="relu")
    layer: Any
    for layer in model:
        torch.nn.init.zeros_(layer.bias)
        if setting.constant is None:
            torch.nn.init.normal_(layer.weight, std=setting.scale * math.sqrt(2 / layer.in_features))
        else:
            torch.nn.init.constant_(layer.weight, setting.constant)
    return model


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


@torch.no_grad()
def activations(model: nn.MLP, x: Tensor) -> list[Tensor]:
    outputs, layers = [], list(model)
    for layer in layers:
        x = layer(x)
        outputs.append(x)
    return outputs


def distinct_units(weight: Tensor) -> int:
    """How many units of a layer compute different things: different rows of its weight matrix."""
    return len(torch.unique(weight.detach(), dim=0))


def cell(epochs: int) -> Callable[[Setting, int], Numbers]:
    def run(setting: Setting, seed: int) -> Numbers:
        split = digits(seed)
        model = network(setting)
        x, y = split.prepare(split.train[0]), split.train[1]
        before = [float(a.square().mean().sqrt()) for a in activations(model, x)]
        loss = nn.CrossEntropyLoss()(model(x), y)
        loss.backward()
        layers: list[Any] = list(model)
        gradients = [float(layer.weight.grad.norm()) for layer in layers]
        numbers = train(model, split, Recipe(epochs, sgd, batch=25, measure_every=max(1, epochs // 20)), seed).numbers()
        numbers |= {"activations": before, "gradients": gradients, "start_loss": float(loss.detach())}
        numbers["first_gradient"], numbers["last_activation"] = gradients[0], before[-2]
        # Rows of a network that diverged are NaN, and not equal to each other.
        weight = layers[1].weight
        numbers["units"] = float(distinct_units(weight)) if bool(weight.isfinite().all()) else math.nan
        return numbers

    return run


def run(cells: Cells) -> Findings:
    epochs = 3 if cells.quick else 20
    cells.run(SETTINGS, cell(epochs), "weights at the start")
    return findings(cells, epochs)


def findings(cells: Cells, epochs: int) -> Findings:
    right, small, large = "right (He)", "too small (a tenth)", "too large (ten times)"
    claims: list[Claim] = []
    for name in cells.numbers:
        if name != right:
            compared = cells.exceeds("test_accuracy", right, name)
            claims.append(
                Claim(f"the right start learns more than {name}: test accuracy", compared.holds, f"by {compared}")
            )
    top = max(cells.of("zeros", "test_accuracy"))
    claims.append(Claim("from zeros nothing is learned: test accuracy stays within 5 points of chance, for every seed",
                        top <= CHANCE + 0.05, f"at most {100 * top:.1f} %"))  # fmt: skip
    zero = max(cells.of("zeros", "first_gradient"))
    claims.append(Claim("with zeros the first layer's gradient is exactly zero", zero == 0, f"at most {zero:g}"))
    for name in ("zeros", "all equal"):
        units = max(cells.of(name, "units"))
        claims.append(Claim(f"{name}: the units of a layer stay copies of each other, all through training",
                            units == 1, f"{units:g} distinct among {WIDTH} in hidden layer 2"))  # fmt: skip
    units = min(cells.of(right, "units"))
    claims.append(Claim("random weights break the symmetry", units == WIDTH, f"{units:g} distinct among {WIDTH}"))
    ratio = [
        math.log10(s / r)
        for s, r in zip(cells.of(small, "first_gradient"), cells.of(right, "first_gradient"), strict=True)
    ]
    claims.append(Claim("too small: the gradients vanish; that of layer 1 is below a thousandth of the right start's",
                        max(ratio) < -3, f"the largest log₁₀ of the ratio is {max(ratio):.1f}"))  # fmt: skip
    ratio = [
        math.log10(s / r)
        for s, r in zip(cells.of(large, "first_gradient"), cells.of(right, "first_gradient"), strict=True)
    ]
    claims.append(Claim("too large: the gradients explode; that of layer 1 is above a thousand times the right start's",
                        min(ratio) > 3, f"the least log₁₀ of the ratio is {min(ratio):.1f}"))  # fmt: skip
    compared = cells.exceeds("start_loss", large, right)
    claims.append(Claim("too large: the loss at the start is higher", compared.holds, f"by {compared}"))
    setup = (
        f"An MLP with relu and {HIDDEN} hidden layers of {WIDTH} units learns scikit-learn's digits from 1,000 rows by "
        f"SGD (learning rate 0.05, batches of 25, {epochs} epochs); 600 other rows are the test rows. Weights "
        "are drawn from "
        "N(0, 2/inputs), which is right for relu (He 2015), or a tenth or ten times that large; or are all 0, or all "
        "0.02. Biases start at 0."
    )
    columns = [
        Column("start_loss", "loss at the start"),
        Column("last_activation", "activation, hidden layer 5, at the start (RMS)"),
        Column("first_gradient", "gradient norm, layer 1, at the start"),
        Column("units", f"distinct units of {WIDTH} after training"),
        Column("train_loss", "training loss"),
        Column("test_accuracy", "test accuracy", percent=True),
    ]
    figures = {
        "start": (
            "Activations and gradients by layer before the first step, mean over the seeds (zeros: not on a log axis)",
            start_figure(cells),
        ),
        "learned": (
            "Training loss (too large: diverges) and test accuracy by epoch, mean over the seeds; bands: deviation",
            learned_figure(cells),
        ),
    }  # fmt: skip
    return Findings(claims, columns, figures, setup)


def start_figure(cells: Cells) -> Figure:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels, ("activations", "gradients"), ("output of the layer, RMS", "gradient norm ‖∂L/∂W‖₂"), strict=True
    ):
        for name in cells.numbers:
            values = np.array(cells.of(name, key), float)
            values[values <= 0] = np.nan
            shown = np.exp(np.nanmean(np.log(values), 0)) if np.isfinite(values).all() else values[0]
            axes.plot(range(1, len(shown) + 1), shown, "o-", color=COLOURS[name], label=name, markersize=4)
        axes.set_yscale("log")
        tidy(axes, "Forward" if key == "activations" else "Backward", "layer, from input to output", label)
    panels[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def learned_figure(cells: Cells) -> Figure:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name in cells.numbers:
        curve(loss, cells, name, "train_loss", name, COLOURS[name], STYLES[name])
        curve(accuracy, cells, name, "test_accuracy", name, COLOURS[name], STYLES[name])
    loss.set_yscale("log")
    loss.set_ylim(top=10)  # too large: starts at 10⁶, and diverges
    tidy(loss, "Training loss", "epoch", "cross-entropy")
    tidy(accuracy, "Test accuracy", "epoch", "test accuracy", percent=True)
    accuracy.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


STUDY = Study(
    "initialization",
    "Initialization",
    "weights that start at zero, too small or too large keep a network from learning; the right size lets it learn.",
    seeds=5,
    run=run,
)
