"""Vanishing gradients: 50 layers, and what ReLU, batch norm and residual connections do about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bp_torch import nn

from ..callbacks.gradient_flow import FlowRecorder, heat_map, positive_range
from .core import Cells, Claim, Column, Findings, Numbers, Study
from .figures import curve, tidy
from .training import Recipe, digits, train

LAYERS, WIDTH, CLASSES = 50, 32, 10
GAIN = {"sigmoid": 1.0, "tanh": 1.0, "relu": math.sqrt(2)}
REMEDIES = ("plain", "batch norm", "residual", "both")
COLOURS = dict(zip(REMEDIES, ("tab:red", "tab:blue", "tab:green", "tab:purple"), strict=True))
VANISHED = 1e-6


@dataclass(frozen=True)
class Setting:
    activation: str
    norm: bool
    residual: bool


def network(setting: Setting, layers: int = LAYERS) -> torch.nn.Sequential:
    """A linear layer, `layers` - 2 blocks, an output layer: `layers` weight matrices.

    A block is h ← W f(h) + b, with batch norm h ← W f(BN(h)) + b; as a residual block h ← h + that. The weights are
    drawn with variance gain²/width (Glorot; He for relu), those inside residual blocks with a `layers`-th of it, so
    that the sum of the blocks keeps its size.
    """
    blocks: list[torch.nn.Module] = [nn.Linear(64, WIDTH)]
    torch.nn.init.normal_(blocks[0].weight, std=1 / math.sqrt(64))  # type: ignore[arg-type]
    for _ in range(layers - 2):
        linear = nn.Linear(WIDTH, WIDTH)
        std = GAIN[setting.activation] / math.sqrt(WIDTH) / (math.sqrt(layers) if setting.residual else 1)
        torch.nn.init.normal_(linear.weight, std=std)
        torch.nn.init.zeros_(linear.bias)
        before = (
            nn.BatchNormAct1d(WIDTH, activation=setting.activation) if setting.norm else _activation(setting.activation)
        )
        block = torch.nn.Sequential(before, linear)
        blocks.append(nn.Residual(block) if setting.residual else block)
    return torch.nn.Sequential(*blocks, _activation(setting.activation), nn.Linear(WIDTH, CLASSES))


def _activation(name: str) -> torch.nn.Module:
    return {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}[name]()


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def cell(epochs: int) -> Callable[[Setting, int], Numbers]:
    def run(setting: Setting, seed: int) -> Numbers:
        model = network(setting)
        recorder = FlowRecorder(model, records=64)
        matrices = [i for i, layer in enumerate(recorder.layers.values()) if isinstance(layer, torch.nn.Linear)]

        def before(step: int) -> None:
            if recorder.recorded(step):
                recorder.before_step(step)

        recipe = Recipe(epochs, adam, batch=50, measure_every=max(1, epochs // 15))
        numbers = train(model, digits(seed), recipe, seed, (before, recorder.after_step)).numbers()
        norms = recorder.measure("norm")[:, matrices]
        numbers |= {"steps": recorder.steps, "norms": norms}
        start = max(float(norms[0, 0]), 1e-45)  # what is less than float32 holds is 0
        numbers["first"], numbers["last"] = start, float(norms[0, -1])
        numbers["log_ratio"] = math.log10(start / float(norms[0, -1]))
        middle = norms.mean(0)
        numbers["log_ratio_training"] = math.log10(max(float(middle[0]), 1e-45) / max(float(middle[-1]), 1e-45))
        return numbers

    return run


def run(cells: Cells) -> Findings:
    epochs = 1 if cells.quick else 10
    for activation in GAIN:
        settings = {
            f"{activation}, {remedy}": Setting(
                activation, remedy in ("batch norm", "both"), remedy in ("residual", "both")
            )
            for remedy in REMEDIES
        }
        cells.run(settings, cell(epochs), activation)
    return findings(cells, epochs)


def findings(cells: Cells, epochs: int) -> Findings:
    claims: list[Claim] = []
    vanishing = [max(cells.of(f"{name}, plain", "log_ratio")) for name in GAIN]
    text = (
        f"with sigmoid the gradient vanishes: at the start that of layer 1 is below {VANISHED:g} of that of "
        f"layer {LAYERS}, "
        "for every seed"
    )
    evidence = f"the largest log₁₀ of the ratio is {vanishing[0]:.1f}"
    claims.append(Claim(text, vanishing[0] < math.log10(VANISHED), evidence))
    compared = cells.exceeds("log_ratio", "relu, plain", "sigmoid, plain")
    claims.append(
        Claim("relu in place of sigmoid lessens it: log₁₀ of that ratio rises", compared.holds, f"by {compared}")
    )
    for remedy in REMEDIES[1:]:
        compared = cells.exceeds("log_ratio", f"sigmoid, {remedy}", "sigmoid, plain")
        text = "batch norm and residual connections together lessen" if remedy == "both" else f"{remedy} lessens"
        claims.append(Claim(f"{text} it for sigmoid: log₁₀ of that ratio rises", compared.holds, f"by {compared}"))
    better = [("relu, plain", "sigmoid, plain"), *((f"sigmoid, {remedy}", "sigmoid, plain") for remedy in REMEDIES[1:])]
    for name, plain in better:
        compared = cells.exceeds("test_accuracy", name, plain)
        claims.append(
            Claim(f"more is learned: test accuracy of {name} against {plain}", compared.holds, f"by {compared}")
        )
    for activation in ("tanh", "relu"):
        for remedy in REMEDIES[1:]:
            name, plain = f"{activation}, {remedy}", f"{activation}, plain"
            learned = cells.exceeds("test_accuracy", name, plain)
            claims.append(
                Claim(
                    f"test accuracy of {name} is above that of {plain}", learned.holds, f"by {learned}", required=False
                )
            )
    for activation in GAIN:
        for remedy in ("batch norm", "residual"):
            learned = cells.exceeds("test_accuracy", f"{activation}, both", f"{activation}, {remedy}")
            claims.append(Claim(f"test accuracy of {activation}, both is above that of {activation}, {remedy}",
                                learned.holds, f"by {learned}", required=False))  # fmt: skip
    setup = (
        f"Networks of {LAYERS} weight matrices (64–{WIDTH}–…–{WIDTH}–{CLASSES}) learn scikit-learn's digits "
        "from 1,000 rows by "
        f"Adam (learning rate 0.001, batches of 50, {epochs} epochs); 600 other rows are the test rows. A block is "
        "h ← W f(h) + b, with batch norm h ← W f(BN(h)) + b, and a residual block adds that to h. Weights are drawn by "
        "Glorot's rule, for relu by He's; inside residual blocks with a fiftieth of the variance, so that a sum of 48 "
        "blocks keeps its size."
    )
    columns = [
        Column("first", "gradient norm, layer 1, step 0"),
        Column("last", f"gradient norm, layer {LAYERS}, step 0"),
        Column("log_ratio", "log₁₀ of the ratio, step 0"),
        Column("log_ratio_training", "log₁₀ of the ratio, mean of training"),
        Column("train_accuracy", "training accuracy", percent=True),
        Column("test_accuracy", "test accuracy", percent=True),
    ]
    figures = {
        "at_start": (
            f"Gradient norm by layer before the first step; thin: each seed; {LAYERS} layers",
            start_figure(cells),
        ),
        "over_time": ("Gradient norm by layer and step, first seed; grey: 0", time_figure(cells)),
        "learned": ("Test accuracy by epoch, mean over the seeds; bands: standard deviation", learned_figure(cells)),
    }
    note = "A gradient below 10⁻⁴⁵ is 0 in float32; it is counted as 10⁻⁴⁵."
    return Findings(claims, columns, figures, setup, [note, explosion_note(cells)])


def explosion_note(cells: Cells) -> str:
    """Where the gradient grows towards the input instead."""
    means = {name: float(np.mean(cells.of(name, "log_ratio"))) for name in cells.numbers}
    grown = [f"{name} (10^{mean:.1f})" for name, mean in means.items() if mean > 1]
    return (
        "A remedy for vanishing may make gradients explode: at the start, layer 1 has more than ten times "
        "the gradient of "
        f"layer {LAYERS} in: {', '.join(grown) or 'none of them'}."
    )


def start_figure(cells: Cells) -> Figure:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, activation in zip(panels, GAIN, strict=True):
        for remedy in REMEDIES:
            runs = np.array([norms[0] for norms in cells.of(f"{activation}, {remedy}", "norms")])
            runs[runs <= 0] = np.nan
            layers = np.arange(1, runs.shape[1] + 1)
            axes.plot(layers, runs.T, color=COLOURS[remedy], linewidth=0.5, alpha=0.5)
            mean = np.exp(np.mean(np.log(runs), 0))
            axes.plot(layers, mean, color=COLOURS[remedy], linewidth=1.8, label=remedy)
        axes.set_yscale("log")
        tidy(axes, activation, "layer, from input to output", "gradient norm ‖∂L/∂W‖₂" if axes is panels[0] else "")
    panels[-1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def time_figure(cells: Cells) -> Figure:
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(len(GAIN), len(REMEDIES), sharey=True)
    everything = np.concatenate([cells.of(name, "norms")[0].ravel() for name in cells.numbers])
    low, high = positive_range(everything)
    scale = LogNorm(max(low, 1e-12), high)
    for line, activation in zip(panels, GAIN, strict=True):
        for axes, remedy in zip(line, REMEDIES, strict=True):
            name = f"{activation}, {remedy}"
            image = heat_map(axes, cells.of(name, "steps")[0], cells.of(name, "norms")[0], scale)
            axes.set_title(name, fontsize=10)
            axes.tick_params(labelsize=7)
    figure.colorbar(image, ax=panels, label="gradient norm ‖∂L/∂W‖₂ (darkest: 10⁻¹² or less)")
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("layer, the first at the bottom", fontsize=10)
    return figure


def learned_figure(cells: Cells) -> Figure:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, activation in zip(panels, GAIN, strict=True):
        for remedy in REMEDIES:
            curve(axes, cells, f"{activation}, {remedy}", "test_accuracy", remedy, COLOURS[remedy])
        tidy(axes, activation, "epoch", "test accuracy" if axes is panels[0] else "", percent=True)
    panels[-1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


STUDY = Study(
    "vanishing-gradients",
    "Vanishing gradients",
    "in deep networks gradients vanish; ReLU, batch normalization and residual connections are remedies.",
    seeds=3,
    run=run,
)
