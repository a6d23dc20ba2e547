"""A report at the end of training, for any LightningModule in any Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .run import PerFit, replace_file, stop_reason

Row = dict[str, float]
STAGES = ("train_", "val_", "valid_", "validation_", "test_", "train/", "val/", "valid/", "validation/", "test/")


class Report(PerFit):
    """Write `<name>.md` and its figures when training ends, or is interrupted.

    It holds what the module logged by epoch, with the lowest and the highest value of each metric and their epochs; the
    learning rate of each parameter group; why training stopped; the time; and the layers with their parameters.

    Args:
        folder: where to write; None is the trainer's `default_root_dir`.
        name: of the report's file, and of its figures: `figures/<name>_metrics.png`, `figures/<name>_lr.png`.

    `rows` are the epochs, as the report has them; they travel in checkpoints, so a resumed run tells all its epochs.
    """

    def __init__(self, folder: str | Path | None = None, name: str = "training_report") -> None:
        if not name or Path(name).name != name:
            raise ValueError(f"name must be a file's name without folders, got {name!r}")
        self.folder, self.name = folder, name
        self.forget()

    def forget(self) -> None:
        self.rows: list[Row] = []
        self.started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete(trainer)
        self.started = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rates = {
            f"optimizer {i + 1}, group {j + 1}": float(group["lr"])
            for i, optimizer in enumerate(trainer.optimizers)
            for j, group in enumerate(optimizer.param_groups)
        }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step})
        self.rows[-1] |= {f"lr of {name}": rate for name, rate in self.rates.items()}
        self.rows[-1]["seconds"] = time.monotonic() - self.started
        self._complete(trainer)

    def _complete(self, trainer: Trainer) -> None:
        """Metrics into the last row; again later, for what the module logs after this callback was called."""
        if self.rows and self.rows[-1]["epoch"] in (trainer.current_epoch, trainer.current_epoch + 1):
            self.rows[-1] |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete(trainer)
        self._write(trainer, pl_module, stop_reason(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        words = " ".join(str(exception).split())
        self._write(trainer, pl_module, f"{type(exception).__name__}{': ' if words else ''}{words}")

    def _write(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir if self.folder is None else self.folder)
        figures = {"metrics": metrics_figure(self.rows), "lr": learning_rate_figure(self.rows)} if self.rows else {}
        for name, figure in figures.items():
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / "figures" / f"{self.name}_{name}.png", dpi=110)
        path = folder / f"{self.name}.md"
        text = self.markdown(pl_module, reason, figures)
        replace_file(path, lambda file: file.write(text.encode()))
        rank_zero_info(f"report: {path}")

    def markdown(self, module: torch.nn.Module, reason: str, figures: Sequence[str] | dict[str, Figure] = ()) -> str:
        lines = [f"# {type(module).__name__}", "", "| | |", "|---|---|"]
        last = self.rows[-1] if self.rows else {"epoch": 0, "step": 0}
        total = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        lines += [f"| why it stopped | {_cell(reason)} |", f"| epochs, steps | {last['epoch']}, {last['step']} |"]
        lines.append(f"| time | {sum(row['seconds'] for row in self.rows):.1f} s, with validation |")
        lines += [f"| parameters | {total:,}, of which {trained:,} are trained |", ""]
        names = metric_names(self.rows)
        if names:
            lines += ["## Metrics", "", "| metric | last | lowest (epoch) | highest (epoch) |", "|---|---|---|---|"]
            for name in names:
                seen = [(row[name], int(row["epoch"])) for row in self.rows if name in row]
                finite = [pair for pair in seen if math.isfinite(pair[0])]
                low, high = (
                    "–" if not finite else f"{pair[0]:.5g} ({pair[1]})" for pair in _ends(finite or [(math.nan, 0)])
                )
                lines.append(f"| {name} | {seen[-1][0]:.5g} | {low} | {high} |")
            lines.append("")
        if figures:
            lines += [f"![Metrics by epoch](figures/{self.name}_metrics.png)", "", "## Learning rate", ""]
            lines += [f"![Learning rate by epoch](figures/{self.name}_lr.png)", ""]
        lines += ["## Layers", "", "| layer | class | parameters | shapes |", "|---|---|---|---|"]
        for name, layer in module.named_modules():
            own = list(layer.named_parameters(recurse=False))
            if own:
                shapes = ", ".join(f"{key} {'×'.join(map(str, p.shape)) or '1'}" for key, p in own)
                frozen = "" if any(p.requires_grad for _, p in own) else " (frozen)"
                count = sum(p.numel() for _, p in own)
                lines.append(f"| {name or '(module)'} | {type(layer).__name__}{frozen} | {count:,} | {shapes} |")
        if self.rows:
            lines += ["", "## Epochs", "", "| epoch | seconds | " + " | ".join(names) + " |"]
            lines.append("|---" * (len(names) + 2) + "|")
            for row in self.rows:
                cells = [f"{row[name]:.5g}" if name in row else "" for name in names]
                lines.append(f"| {int(row['epoch'])} | {row['seconds']:.2f} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, ""])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _ends(pairs: list[tuple[float, int]]) -> tuple[tuple[float, int], tuple[float, int]]:
    """The first lowest and the first highest."""
    return min(pairs), max(pairs, key=lambda pair: (pair[0], -pair[1]))


def metric_names(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in ("epoch", "step", "seconds") and not name.startswith("lr of ")]


def metrics_figure(rows: Sequence[Row], shown: int = 12) -> Figure:
    """A panel for each metric; those that differ in the stage alone, such as train_loss and val_loss, share one."""
    panels: dict[str, list[str]] = {}
    for name in metric_names(rows):
        stage = next((s for s in STAGES if name.startswith(s)), "")
        panels.setdefault(name.removeprefix(stage), []).append(name)
    left_out = max(0, len(panels) - shown)
    panels = dict(list(panels.items())[:shown])
    columns = max(1, min(3, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.3 * lines + 0.2), layout="constrained")
    for place, (title, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        values = []
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
            values += [value for _, value in points]
        if min(values) > 0 and max(values) > 50 * min(values):
            axes.set_yscale("log")
        _finish(axes, title, "epoch", title)
        axes.legend(frameon=False, fontsize=8)
    if not panels:
        figure.text(0.5, 0.5, "the module logged no metric", ha="center")
    if left_out:
        figure.suptitle(f"{left_out} more metrics stand in the table", fontsize=9)
    return figure


def learning_rate_figure(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(7, 3.3), layout="constrained")
    axes = figure.add_subplot()
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("lr of "))
    for name in names:
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name.removeprefix("lr of "))
    _finish(axes, "Learning rate", "epoch", "learning rate of the epoch's last step")
    axes.set_ylim(bottom=0)
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _finish(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
