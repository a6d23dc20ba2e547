"""Learning rates: constant ones too low, right and too high; every schedule; every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim import lr_scheduler as lr

from bp_torch import nn

from .core import Cells, Claim, Column, Findings, Numbers, Study
from .figures import TEST, TRAIN, bars, curve, tidy
from .training import Recipe, mnist1d, train

LOW, RIGHT, HIGH = 0.001, 0.2, 5.0
SCHEDULED = 1.0  # a large rate, which is what schedules are for; chosen with RIGHT by validation losses of seed 100
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BATCH, ROWS = 50, 2000

Schedule = Callable[[Optimizer, int, int], Any]


@dataclass(frozen=True)
class Setting:
    make: Callable[[Any], Optimizer]
    schedule: Schedule | None = None
    """Called with the optimizer, the number of epochs and the number of steps."""
    by_step: bool = False


def sgd(rate: float, **options: Any) -> Callable[[Any], Optimizer]:
    return lambda parameters: SGD(parameters, lr=rate, **options)


def warm_up(optimizer: Optimizer, epochs: int, steps: int) -> Any:
    """A linear rise over a tenth of the steps, then a cosine to 0."""
    rise = max(1, steps // 10)
    parts = [lr.LinearLR(optimizer, 0.01, total_iters=rise), lr.CosineAnnealingLR(optimizer, steps - rise)]
    return lr.SequentialLR(optimizer, parts, [rise])


def custom(optimizer: Optimizer, epochs: int, steps: int) -> Any:
    return lr.LambdaLR(optimizer, lambda t: (1 + 4 * t / epochs) ** -2.0)


def one_cycle(optimizer: Optimizer, epochs: int, steps: int) -> Any:
    """Up to the optimizer's rate and down to almost 0."""
    peak = optimizer.param_groups[0]["lr"]
    return lr.OneCycleLR(optimizer, peak, total_steps=steps + 1, cycle_momentum=False)


def cyclic(mode: str) -> Schedule:
    def make(optimizer: Optimizer, epochs: int, steps: int) -> Any:
        up = max(1, steps // 8)  # four cycles
        return lr.CyclicLR(optimizer, 0.01, SCHEDULED, up, mode=mode, gamma=0.05 ** (1 / steps), cycle_momentum=False)  # type: ignore[arg-type]

    return make


# name: (schedule, by step, whether it decays, so that its promise is a lower loss than the constant rate's)
SCHEDULES: dict[str, tuple[Schedule, bool, bool]] = {
    "step": (lambda o, epochs, steps: lr.StepLR(o, max(1, epochs // 4), 0.3), False, True),
    "exponential": (lambda o, epochs, steps: lr.ExponentialLR(o, 0.01 ** (1 / epochs)), False, True),
    "polynomial": (lambda o, epochs, steps: lr.PolynomialLR(o, epochs, 2.0), False, True),
    "cosine": (lambda o, epochs, steps: lr.CosineAnnealingLR(o, epochs), False, True),
    "warm-up, then cosine": (warm_up, True, True),
    "custom: (1 + 4 t/T)⁻²": (custom, False, True),
    "reduce on plateau": (lambda o, epochs, steps: lr.ReduceLROnPlateau(o, factor=0.3, patience=2), False, True),
    "one cycle": (one_cycle, True, True),
    "cosine restarts": (lambda o, epochs, steps: lr.CosineAnnealingWarmRestarts(o, max(1, epochs // 4)), False, False),
    "cyclic triangular": (cyclic("triangular"), True, False),
    "cyclic triangular2": (cyclic("triangular2"), True, False),
    "cyclic exp_range": (cyclic("exp_range"), True, False),
}  # fmt: skip

OPTIMIZERS: dict[str, Callable[[float], Callable[[Any], Optimizer]]] = {
    "SGD": lambda rate: sgd(rate),
    "SGD, momentum 0.9": lambda rate: sgd(rate, momentum=0.9),
    "SGD, Nesterov 0.9": lambda rate: sgd(rate, momentum=0.9, nesterov=True),
    "Adagrad": lambda rate: lambda parameters: Adagrad(parameters, lr=rate),
    "RMSprop": lambda rate: lambda parameters: RMSprop(parameters, lr=rate),
    "Adam": lambda rate: lambda parameters: Adam(parameters, lr=rate),
    "AdamW": lambda rate: lambda parameters: AdamW(parameters, lr=rate),
}
ADAPTIVE = ("Adagrad", "RMSprop", "Adam", "AdamW")
DEFAULT = 1e-3
"""Torch's default rate of SGD, Adam and AdamW: small."""


def cell(epochs: int) -> Callable[[Setting, int], Numbers]:
    def run(setting: Setting, seed: int) -> Numbers:
        model = nn.MLP(40, [64, 64], 10, activation="relu")
        steps = epochs * -(-ROWS // BATCH)
        make = setting.schedule
        schedule = None if make is None else lambda optimizer: make(optimizer, epochs, steps)
        recipe = Recipe(epochs, setting.make, BATCH, schedule=schedule, by_step=setting.by_step, measure_every=2)
        outcome = train(model, mnist1d(seed, train=ROWS), recipe, seed)
        return outcome.numbers() | {"rates": outcome.rates}

    return run


def run(cells: Cells) -> Findings:
    epochs = 4 if cells.quick else 20
    constants = {f"constant, {what} ({rate:g})": Setting(sgd(rate)) for what, rate in
                 (("too low", LOW), ("right", RIGHT), ("too high", HIGH))}  # fmt: skip
    scheduled = {f"constant at {SCHEDULED:g}": Setting(sgd(SCHEDULED))}
    scheduled |= {name: Setting(sgd(SCHEDULED), make, by_step) for name, (make, by_step, _) in SCHEDULES.items()}
    rates = (1e-3, 1e-1) if cells.quick else RATES
    optimizers = {f"{name}, {rate:g}": Setting(make(rate)) for name, make in OPTIMIZERS.items() for rate in rates}
    cells.run(constants, cell(epochs), "SGD, constant rate")
    cells.run(scheduled, cell(epochs), f"SGD, schedule from {SCHEDULED:g}")
    cells.run(optimizers, cell(epochs), "optimizer, rate")
    return findings(cells, list(constants), list(scheduled), rates, epochs)


def findings(
    cells: Cells, constants: list[str], scheduled: list[str], rates: tuple[float, ...], epochs: int
) -> Findings:
    low, right, high = constants
    claims: list[Claim] = []
    compared = cells.exceeds("train_loss", low, right)
    claims.append(
        Claim(
            "too low a rate learns too slowly: its training loss is higher than the right one's",
            compared.holds,
            f"by {compared}",
        )
    )
    compared = cells.exceeds("test_accuracy", right, high)
    claims.append(
        Claim(
            "too high a rate does not learn: its test accuracy is lower than the right one's",
            compared.holds,
            f"by {compared}",
        )
    )
    constant = scheduled[0]
    for name, (_, _, decays) in SCHEDULES.items():
        compared = cells.exceeds("test_loss", constant, name)
        text = f"{name} ends with a lower test loss than the constant rate that it starts from or reaches"
        claims.append(Claim(text, compared.holds, f"by {compared}", required=decays))
    for name in SCHEDULES:
        compared = cells.exceeds("test_accuracy", name, constant)
        claims.append(
            Claim(
                f"{name} ends with a higher test accuracy than that rate",
                compared.holds,
                f"by {compared}",
                required=False,
            )
        )
        compared = cells.exceeds("train_loss", constant, name)
        claims.append(
            Claim(
                f"{name} ends with a lower training loss than that rate",
                compared.holds,
                f"by {compared}",
                required=False,
            )
        )
    for name in ADAPTIVE:
        compared = cells.exceeds("train_loss", f"SGD, {DEFAULT:g}", f"{name}, {DEFAULT:g}")
        claims.append(
            Claim(
                f"at the small rate {DEFAULT:g}, {name} adapts: a lower training loss than plain SGD at that rate",
                compared.holds,
                f"by {compared}",
            )
        )
    best = {name: best_rate(cells, name, rates) for name in OPTIMIZERS}
    for name, rate in best.items():
        if name != "SGD":
            compared = cells.exceeds("test_accuracy", f"{name}, {rate:g}", f"SGD, {best['SGD']:g}")
            text = f"each at its best rate, {name} ({rate:g}) has a higher test accuracy than SGD ({best['SGD']:g})"
            claims.append(Claim(text, compared.holds, f"by {compared}", required=False))
    setup = (
        f"An MLP 40–64–64–10 with relu learns MNIST-1D from {ROWS:,} rows, {epochs} epochs in batches of {BATCH}; "
        f"1,000 other rows are the test rows. Schedules start from {SCHEDULED:g}, or rise to it, by SGD "
        "without momentum, "
        "and are compared with that rate kept constant. Optimizers have torch's defaults but for the rate; the best "
        "rate of each is chosen by the loss on 500 validation rows."
    )
    columns = [
        Column("train_loss", "training loss"),
        Column("test_loss", "test loss"),
        Column("train_accuracy", "training accuracy", percent=True),
        Column("test_accuracy", "test accuracy", percent=True),
    ]
    chosen = ", ".join(f"{name} {rate:g}" for name, rate in best.items())
    figures = {
        "constant": (
            "Constant rates: training loss and test accuracy by epoch, mean over the seeds",
            constant_figure(cells, constants),
        ),
        "schedules": ("Each schedule's learning rate by step", schedule_figure(cells, scheduled)),
        "schedule_results": ("Where each schedule ends; lines: standard deviation", schedule_results(cells, scheduled)),
        "optimizers": (
            "Test accuracy (%) by optimizer and rate, mean over the seeds; a frame: the best rate by validation loss",
            optimizer_figure(cells, rates, best),
        ),
    }  # fmt: skip
    return Findings(
        claims, columns, figures, setup, [f"Best rates by validation loss: {chosen}.", scheduled_note(cells, constant)]
    )


def scheduled_note(cells: Cells, constant: str) -> str:
    """What else the schedules improve."""
    fits = [name for name in SCHEDULES if cells.exceeds("train_loss", constant, name).holds]
    right = [name for name in SCHEDULES if cells.exceeds("test_accuracy", name, constant).holds]
    return (
        f"A lower training loss than the constant rate {SCHEDULED:g} is reached with: "
        f"{', '.join(fits) or 'none'}; a higher "
        f"test accuracy with: {', '.join(right) or 'none'}. Where neither is, the rate fell so fast that "
        "training ended "
        "early, and the lower test loss is that of a network which overfits less."
    )


def best_rate(cells: Cells, name: str, rates: tuple[float, ...]) -> float:
    def loss(rate: float) -> float:
        values = cells.of(f"{name}, {rate:g}", "val_loss")
        return float(np.mean(values)) if all(map(math.isfinite, values)) else math.inf

    return min(rates, key=loss)


def constant_figure(cells: Cells, names: list[str]) -> Figure:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, colour in zip(names, ("tab:blue", "tab:green", "tab:red"), strict=True):
        curve(loss, cells, name, "train_loss", name, colour)
        curve(accuracy, cells, name, "test_accuracy", name, colour)
    loss.set_yscale("log")
    tidy(loss, "Training loss", "epoch", "cross-entropy")
    tidy(accuracy, "Test accuracy", "epoch", "test accuracy", percent=True)
    accuracy.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def schedule_figure(cells: Cells, names: list[str]) -> Figure:
    lines = -(-len(names) // 5)
    figure = Figure(figsize=(12, 2.1 * lines + 0.3), layout="constrained")
    panels = list(figure.subplots(lines, 5, sharex=True, sharey=True).flat)
    for axes, name in zip(panels, names, strict=False):
        axes.plot(cells.of(name, "rates")[0], color="tab:blue", linewidth=1.2)
        tidy(axes, name)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("learning rate", fontsize=10)
    return figure


def schedule_results(cells: Cells, names: list[str]) -> Figure:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    bars(loss, cells, names, [("train_loss", "training", TRAIN), ("test_loss", "test", TEST)], percent=False)
    tidy(loss, "Loss at the end", "cross-entropy")
    loss.legend(frameon=False, fontsize=8)
    bars(accuracy, cells, names, [("test_accuracy", "", "tab:green")], percent=True)
    accuracy.set_yticklabels([])
    low = min(v for name in names for v in cells.of(name, "test_accuracy"))
    accuracy.set_xlim(max(0.0, low - 0.03), 1)
    tidy(accuracy, "Test accuracy at the end", "test accuracy")
    return figure


def optimizer_figure(cells: Cells, rates: tuple[float, ...], best: dict[str, float]) -> Figure:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    values = np.array(
        [[np.mean(cells.of(f"{name}, {rate:g}", "test_accuracy")) for rate in rates] for name in OPTIMIZERS]
    )
    image = axes.imshow(100 * values, cmap=colormaps["viridis"], vmin=0, vmax=100, aspect="auto")
    for i, name in enumerate(OPTIMIZERS):
        for j, rate in enumerate(rates):
            frame = {"facecolor": "none", "edgecolor": "red", "boxstyle": "round"} if best[name] == rate else None
            colour = "black" if values[i, j] > 0.6 else "white"
            axes.text(j, i, f"{100 * values[i, j]:.1f}", ha="center", va="center", color=colour, bbox=frame)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(OPTIMIZERS)), list(OPTIMIZERS))
    axes.set(xlabel="learning rate", title="Test accuracy, %")
    figure.colorbar(image, ax=axes, label="%")
    return figure


STUDY = Study(
    "learning-rates",
    "Learning rates",
    "too low a rate learns too slowly, too high a one not at all; rates that decay from a large one reach further than "
    "it does, and adaptive optimizers adapt a rate that is too small.",
    seeds=4,
    run=run,
)
