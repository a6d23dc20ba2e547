"""What a run comes to, which tasks, callbacks and reports read, and a part of its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:  # they make one, and their parts
    from .data import Data
    from .modules import Task

FILES = ("report.md", "metrics.csv", "config.yaml", "checkpoints/best.ckpt", "tensorboard")


@dataclass
class Section:
    """A part of a report: a figure, lines of Markdown, or both."""

    name: str
    """Of the figure's file."""
    title: str
    figure: Figure | None = None
    text: Sequence[str] = ()


@dataclass
class Outcome:
    """All that a report says about a run."""

    run: Path
    command: str
    history: list[dict[str, float]]
    best_epoch: int
    reason: str
    parameters: int
    test: dict[str, float]
    baselines: dict[str, dict[str, float]]
    outputs: Tensor
    """What `predict_step` gave for the test split."""
    task: Task
    data: Data
    rates: Sequence[tuple[int, float]] = ()
    """(step, learning rate) of each optimizer step."""
    callbacks: Sequence[Any] = ()
    """The trainer's. Those that have `report_sections(outcome)` add to the report."""
    failure: str | None = None
    """Why the run ended before its time, if it did, and what there is of it."""
    status: int = 0
    """The exit status of the command."""

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.history)

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """The metrics on the test split: this run's first, then each baseline's."""
        return {"this run": self.test} | self.baselines

    @property
    def facts(self) -> dict[str, str]:
        """What else to know, in the order in which it is told."""
        rows = {name: len(tensors[0]) for name, tensors in self.data.splits.items()}
        return {
            "epochs run": f"{len(self.history)}, tested after epoch {self.best_epoch}",
            "why it stopped": self.reason,
            "training time": f"{self.seconds:.0f} s, with validation, on {torch.get_num_threads()} CPU thread(s)",
            "parameters": f"{self.parameters:,}",
            "rows": ", ".join(f"{name} {count:,}" for name, count in rows.items()),
            "seed": str(self.data.seed),
            "files": f"{self.run}: {', '.join(name for name in FILES if (self.run / name).exists())}",
        }
