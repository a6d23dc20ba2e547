"""Two classes: the task, its ensemble of networks, and what its report shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bp_torch import nn

from ..data import Data, gathered
from ..figures import TEST, TRAIN, VAL, axes_at
from ..modules import Batch, Classifier, Metrics
from ..outcome import Outcome, Section
from .scores import Calibration, auc, binary_scores, calibrate, costs, reliability


class Mean(torch.nn.Module):
    """Networks that differ in their start and their dropout, as one module.

        softmax(forward(x)) = mean over members of softmax(member(x))

    Args:
        members: modules from x to logits (N, classes).
    """

    def __init__(self, members: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("members must be at least 1, got 0")

    def each(self, x: Tensor) -> Tensor:
        """The members' logits, (members, N, classes)."""
        return torch.stack([member(x) for member in self.members])

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the mean probabilities, (N, classes)."""
        return self.each(x).log_softmax(-1).logsumexp(0) - math.log(len(self.members))


class Ensemble(Mean):
    """Multilayer perceptrons, each of which sees a part of the inputs in training: dropout on the inputs.

    Args:
        members: how many; ≥ 1.
        in_features, hidden_features, out_features, activation, norm, dropout: of each, as in `bp_torch.nn.MLP`.
        input_dropout: the share of inputs that each member loses in training, in each row anew.
    """

    def __init__(
        self,
        members: int,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int = 2,
        activation: str = "relu",
        norm: str | None = None,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
    ) -> None:
        super().__init__(
            nn.MLP(in_features, hidden_features, out_features, activation=activation, norm=norm, dropout=dropout)
            for _ in range(members)
        )
        self.input_dropout = nn.Dropout(input_dropout)

    def each(self, x: Tensor) -> Tensor:
        return torch.stack([member(self.input_dropout(x)) for member in self.members])


class BinaryClassifier(Classifier):
    """A classifier of two classes, of which class 1 is to be found, with calibrated probabilities.

    Each member of a `Mean` is trained by its own loss; their mean probability is measured. `val_auc` can be
    monitored. After training, the calibration is fitted to the validation split; accuracy, Brier score, calibration
    error and loss are those of calibrated probabilities.

    Args:
        calibration: how logits become probabilities; see `scores.calibrate`.
        The others: as in `Classifier`.
    """

    formats: ClassVar[dict[str, str]] = {"auc": ".4f", "accuracy": ".2%"} | dict.fromkeys(
        ("brier", "ece", "loss"), ".4f"
    )

    def __init__(self, *args: Any, calibration: Calibration = "scaling", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calibration = calibration
        self.seen: list[tuple[Tensor, Tensor]] = []

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        x, y = batch[:2]
        if self.training and isinstance(self.network, Mean):
            logits = self.network.each(x.flatten(1))
            loss = self.training_loss(logits.flatten(0, 1), y.repeat(len(logits)))
            return loss, {"accuracy": (logits.mean(0).argmax(1) == y).float().mean()}
        return super().loss_and_metrics(batch)

    def on_validation_epoch_start(self) -> None:
        self.seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen.append((batch[1], log_odds(self(batch[0]))))

    def on_validation_epoch_end(self) -> None:
        y, z = (gathered(torch.cat(parts)).numpy() for parts in zip(*self.seen, strict=True))
        self.log("val_auc", auc(y, z) if 0 < y.sum() < len(y) else 0.5, sync_dist=True)

    def probabilities(self, outputs: Tensor, data: Data) -> np.ndarray:
        """Calibrated probabilities of class 1, (N,), for outputs of `predict_step`."""
        training = self.training
        with torch.no_grad():
            self.eval()
            z = torch.cat([log_odds(self(x)) for x, *_ in data.in_order("val")]).double().cpu().numpy()
            self.train(training)
        calibration = calibrate(data.splits["val"][-1].numpy(), z, self.calibration)
        return calibration(log_odds(outputs).double().numpy())

    def test_metrics(self, outputs: Tensor, data: Data) -> dict[str, float]:
        y, z = data.splits["test"][-1].numpy(), log_odds(outputs).double().numpy()
        return binary_scores(y, z, self.probabilities(outputs, data))

    def predictions(self, outputs: Tensor, data: Data) -> tuple[list[str], Iterable[Sequence[object]]]:
        y, p = data.splits["test"][-1], self.probabilities(outputs, data)
        header = ["row", "true", "predicted", f"p({data.classes[1]})"]
        return header, (
            [row, data.classes[true], data.classes[int(value >= 0.5)], f"{value:.6f}"]
            for row, (true, value) in enumerate(zip(y.tolist(), p, strict=True))
        )

    def report_sections(self, outcome: Outcome) -> list[Section]:
        data = outcome.data
        y, z = data.splits["test"][-1].numpy(), log_odds(outcome.outputs).double().numpy()
        trained = 1 / (1 + np.exp(-z))
        ranked = {"this run": (trained, TRAIN)} | baseline_probabilities(data)
        calibrated = self.probabilities(outcome.outputs, data), TRAIN
        models = {"as trained": (trained, "gray"), f"calibrated ({self.calibration})": calibrated}
        models |= baseline_probabilities(data)
        return [
            Section("roc", "Ranking", roc_figure(y, ranked, data.classes[1])),
            Section("reliability", "Reliability", reliability_figure(y, models, data.classes[1])),
        ]


class RiskClassifier(BinaryClassifier):
    """Whether to lend: the expected cost beside the probabilities. A missed row of class 1 costs `data.cost_ratio`."""

    formats: ClassVar[dict[str, str]] = dict.fromkeys(("auc", "cost", "brier", "ece", "loss"), ".4f")

    def test_metrics(self, outputs: Tensor, data: Any) -> dict[str, float]:
        y, p = data.splits["test"][-1].numpy(), self.probabilities(outputs, data)
        cost = float(costs(y, p, 1 / (1 + data.cost_ratio), data.cost_ratio)[0])
        return super().test_metrics(outputs, data) | {"cost": cost}

    def report_sections(self, outcome: Outcome) -> list[Section]:
        data: Any = outcome.data
        y = data.splits["test"][-1].numpy()
        models = {"this run": (self.probabilities(outcome.outputs, data), TRAIN)} | baseline_probabilities(data)
        figure = cost_figure(y, models, data.cost_ratio)
        text = [
            f"Refusing a good loan costs 1, granting a bad one {data.cost_ratio:g}. The table's cost is that of",
            f"refusing where the probability of bad is at least 1 / (1 + {data.cost_ratio:g}), the dotted line.",
        ]
        return [*super().report_sections(outcome), Section("cost", "Cost by threshold", figure, text)]


def log_odds(logits: Tensor) -> Tensor:
    """log p₁ / p₀, (N,), of the logits of two classes."""
    return logits[:, 1] - logits[:, 0]


Models = dict[str, tuple[np.ndarray, str]]


def baseline_probabilities(data: Any) -> Models:
    """What the baselines said for the test split, if they were fitted, each with a colour."""
    fitted = getattr(data, "baseline_probabilities", {})
    colours = (VAL, TEST, "tab:purple", "tab:brown")
    return {name: (p, colour) for (name, p), colour in zip(fitted.items(), colours, strict=False)}


def roc_figure(y: np.ndarray, models: Models, found: str) -> Figure:
    """Share of class 1 found against share of class 0 taken for it, for every threshold."""
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = axes_at(
        figure, (1, 1, 1), "Every threshold, test split", "share of the others taken for it", f"{found} found"
    )
    axes.plot([0, 1], [0, 1], color="lightgray")
    for name, (p, colour) in models.items():
        order = np.argsort(-p, kind="stable")
        last = np.append(np.diff(p[order]) != 0, True)  # of each group of equal probabilities
        found_share, taken = (np.append(0, (np.cumsum(y[order] == k) / (y == k).sum())[last]) for k in (1, 0))
        axes.plot(taken, found_share, color=colour, label=f"{name}: AUC {auc(y, p):.4f}")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def reliability_figure(y: np.ndarray, models: Models, found: str) -> Figure:
    """What was said against what was, in ten bins of equal count."""
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    title = "Ten bins of equal count, test split"
    axes = axes_at(figure, (1, 1, 1), title, f"mean probability of {found} in the bin", f"share of {found} in the bin")
    top = 0.0
    for name, (p, colour) in models.items():
        said, was, rows = reliability(y, p)
        top = max(top, said.max(), was.max())
        error = float((rows * np.abs(said - was)).sum() / rows.sum())
        axes.plot(said, was, "o-", color=colour, markersize=4, label=f"{name}: error {error:.4f}")
    axes.plot([0, top], [0, top], color="lightgray", zorder=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


def cost_figure(y: np.ndarray, models: Models, ratio: float) -> Figure:
    """Mean cost of a row against the threshold above which a loan is refused."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = axes_at(
        figure, (1, 1, 1), f"A missed bad loan costs {ratio:g}, a refused good one 1", "threshold", "mean cost"
    )
    threshold = np.linspace(0, 1, 501)
    for name, (p, colour) in models.items():
        cost = costs(y, p, threshold, ratio)
        chosen = costs(y, p, 1 / (1 + ratio), ratio)[0]
        axes.plot(threshold, cost, color=colour, label=f"{name}: {chosen:.4f} at the threshold")
    axes.axhline(
        ratio * y.mean(), color="gray", linestyle="--", linewidth=1, label=f"grant all: {ratio * y.mean():.4f}"
    )
    axes.axhline(1 - y.mean(), color="gray", linestyle="-.", linewidth=1, label=f"refuse all: {1 - y.mean():.4f}")
    axes.axvline(1 / (1 + ratio), color="gray", linestyle=":", label=f"1 / (1 + {ratio:g}) = {1 / (1 + ratio):.3f}")
    axes.legend(frameon=False, fontsize=9)
    axes.set_ylim(bottom=0)
    return figure
