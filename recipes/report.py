"""What a run ends with: a table on the screen, and a Markdown report with figures in the folder of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import figures
from .data import ArrayData

FILES = ("report.md", "metrics.csv", "config.yaml", "checkpoints/best.ckpt", "tensorboard")


@dataclass
class Outcome:
    """All that a report says about a run of a classifier."""

    run: Path
    command: str
    history: list[dict[str, float]]
    best_epoch: int
    reason: str
    parameters: int
    test: dict[str, float]
    baselines: dict[str, dict[str, float]]
    logits: Tensor
    data: ArrayData

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Accuracy and loss on the test split: this run's first, then each baseline's."""
        return {"this run, best checkpoint": self.test} | self.baselines

    @property
    def facts(self) -> dict[str, str]:
        """What else to know, in the order in which it is told."""
        rows = {name: len(y) for name, (_, y) in self.data.splits.items()}
        return {
            "epochs run": f"{len(self.history)}, the best was {self.best_epoch}",
            "why it stopped": self.reason,
            "training time": f"{self.seconds:.0f} s, with validation, on {torch.get_num_threads()} CPU thread(s)",
            "parameters": f"{self.parameters:,}",
            "rows": ", ".join(f"{name} {count:,}" for name, count in rows.items()),
            "seed": str(self.data.seed),
            "files": f"{self.run}: {', '.join(name for name in FILES if (self.run / name).exists())}",
        }


def show(outcome: Outcome, console: Console | None = None) -> None:
    """Print the results and the facts."""
    console = console or Console()
    results = Table("", "test accuracy", "test loss", title="Results", title_justify="left")
    for name, scores in outcome.results.items():
        results.add_row(name, f"{scores['accuracy']:.2%}", f"{scores['loss']:.4f}")
    facts = Table.grid(padding=(0, 2))
    for name, fact in outcome.facts.items():
        facts.add_row(name, fact)
    console.print(results, facts, soft_wrap=True)


def write(outcome: Outcome) -> Path:
    """Write `report.md` and `figures/*.png` into the folder of the run; return the report's path."""
    predicted = outcome.logits.argmax(1)
    x, y = outcome.data.splits["test"]
    mistakes = Mistakes(outcome.data.classes, y, predicted, outcome.logits.softmax(1))
    drawn: dict[str, tuple[str, Figure]] = {
        "curves": ("Loss and accuracy", figures.curves(outcome.history, outcome.best_epoch, outcome.test)),
        "learning_rate": ("Learning rate", figures.learning_rate(outcome.history)),
    }
    if any(name.startswith("grad_norm/") for name in outcome.history[0]):
        drawn["gradient_norms"] = ("Gradient norm by layer", figures.gradient_norms(outcome.history))
    drawn["confusion"] = ("Confusion matrix", figures.confusion(mistakes.confusion(), outcome.data.classes))
    if x.ndim == 4:
        images = x[mistakes.rows].mean(1).numpy()
        drawn["misclassified"] = ("Misclassified", figures.misclassified(images, mistakes.captions()))

    folder = outcome.run / "figures"
    folder.mkdir(exist_ok=True)
    for name, (_, figure) in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    report = outcome.run / "report.md"
    report.write_text(_markdown(outcome, mistakes, {name: title for name, (title, _) in drawn.items()}), "utf-8")
    return report


class Mistakes:
    """The rows of the test split whose class was not the predicted one."""

    def __init__(self, classes: Sequence[str], y: Tensor, predicted: Tensor, probability: Tensor) -> None:
        self.classes, self.y, self.predicted, self.probability = classes, y, predicted, probability
        self.rows = (y != predicted).nonzero().flatten()

    def confusion(self) -> np.ndarray:
        n = len(self.classes)
        return torch.bincount(self.y * n + self.predicted, minlength=n * n).reshape(n, n).numpy()

    def table(self) -> list[tuple[int, str, str, float]]:
        """(row, true class, predicted class, its probability) of each."""
        triples = [(i, int(self.y[i]), int(self.predicted[i])) for i in self.rows.tolist()]
        return [(i, self.classes[t], self.classes[p], float(self.probability[i, p])) for i, t, p in triples]

    def captions(self) -> list[str]:
        return [f"{true}, read as {said}\n(p = {p:.2f})" for _, true, said, p in self.table()]


def _markdown(outcome: Outcome, mistakes: Mistakes, drawn: dict[str, str]) -> str:
    lines = [f"# {outcome.run.parent.name}, {outcome.run.name}", "", "```", outcome.command, "```", ""]
    lines += ["| | test accuracy | test loss |", "|---|---|---|"]
    for name, scores in outcome.results.items():
        lines.append(f"| {name} | {scores['accuracy']:.2%} | {scores['loss']:.4f} |")
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {fact} |" for name, fact in outcome.facts.items()]
    lines += ["", "All settings are in `config.yaml`, each epoch's numbers in `metrics.csv`.", ""]
    for name, title in drawn.items():
        lines += [f"## {title}", "", f"![{title}](figures/{name}.png)", ""]
    if table := mistakes.table():
        lines += ["| row of the test split | true | predicted | its probability |", "|---|---|---|---|"]
        lines += [f"| {i} | {true} | {said} | {p:.3f} |" for i, true, said, p in table] + [""]
    return "\n".join(lines)
