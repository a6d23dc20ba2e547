"""What a run ends with: a table on the screen, and a Markdown report with figures in the folder of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import figures
from .outcome import Outcome, Section


def cells(outcome: Outcome, scores: dict[str, float]) -> list[str]:
    """The metrics of one line of the table of results, as text."""
    return [format(scores[name], style) if name in scores else "" for name, style in outcome.task.formats.items()]


def show(outcome: Outcome, console: Console | None = None) -> None:
    """Print the results and the facts."""
    console = console or Console()
    names = [f"test {name}" for name in outcome.task.formats]
    results = Table("", *names, title="Results", title_justify="left")
    for name, scores in outcome.results.items():
        results.add_row(name, *cells(outcome, scores))
    facts = Table.grid(padding=(0, 2))
    for name, fact in outcome.facts.items():
        facts.add_row(name, fact)
    console.print(results, facts, soft_wrap=True)


def write(outcome: Outcome) -> Path:
    """Write `report.md` and `figures/*.png` into the folder of the run; return the report's path."""
    sections = [
        Section("curves", "Training", figures.curves(outcome.history, outcome.best_epoch, outcome.test)),
        Section("learning_rate", "Learning rate", figures.learning_rate(outcome.history, outcome.rates)),
    ]
    if any(name.startswith("grad_norm/") for name in outcome.history[0]):
        norms = figures.gradient_norms(outcome.history)
        sections.append(Section("gradient_norms", "Gradient norm by layer", norms))
    if {"penalty", "l1_penalty"} & set(outcome.history[0]):
        sections.append(Section("penalty", "Penalty", figures.penalty(outcome.history)))
    for part in (*outcome.callbacks, outcome.task):
        if hasattr(part, "report_sections"):
            sections += part.report_sections(outcome)

    folder = outcome.run / "figures"
    folder.mkdir(exist_ok=True)
    for section in sections:
        if section.figure is not None:
            section.figure.savefig(folder / f"{section.name}.png", dpi=150)
    report = outcome.run / "report.md"
    report.write_text(_markdown(outcome, sections), "utf-8")
    return report


def classification_sections(outcome: Outcome) -> list[Section]:
    """The confusion matrix, and the rows whose class was not the predicted one; images are shown."""
    x, y = outcome.data.splits["test"][:2]
    probability = outcome.outputs.softmax(1)
    mistakes = Mistakes(outcome.data.classes, y, probability.argmax(1), probability)
    confusion = figures.confusion(mistakes.confusion(), outcome.data.classes)
    sections = [Section("confusion", "Confusion matrix", confusion)]
    figure = None
    if x.ndim == 4:
        figure = figures.misclassified(x[mistakes.rows].mean(1).numpy(), mistakes.captions())
    if figure is not None or mistakes.rows.numel():
        sections.append(Section("misclassified", "Misclassified", figure, mistakes.markdown()))
    return sections


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

    def markdown(self, shown: int = 100) -> list[str]:
        if not (table := self.table()):
            return []
        lines = ["| row of the test split | true | predicted | its probability |", "|---|---|---|---|"]
        lines += [f"| {i} | {true} | {said} | {p:.3f} |" for i, true, said, p in table[:shown]]
        return [*lines, *([f"\nThe first {shown} of {len(table)}."] if len(table) > shown else [])]


def _markdown(outcome: Outcome, sections: Sequence[Section]) -> str:
    names = list(outcome.task.formats)
    lines = [f"# {outcome.run.parent.name}, {outcome.run.name}", "", "```", outcome.command, "```", ""]
    lines += ["| | " + " | ".join(f"test {name}" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, scores in outcome.results.items():
        lines.append(f"| {name} | " + " | ".join(cells(outcome, scores)) + " |")
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {name} | {fact} |" for name, fact in outcome.facts.items()]
    lines += ["", "All settings are in `config.yaml`, each epoch's numbers in `metrics.csv`.", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.figure is not None:
            lines += [f"![{section.title}](figures/{section.name}.png)", ""]
        lines += [*section.text, *([""] if section.text else [])]
    return "\n".join(lines)
