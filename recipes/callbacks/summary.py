"""What is about to be trained, as a table on the screen."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import summarize
from rich import get_console
from rich.table import Table


class Summary(ModelSummary):
    """Each layer's name, class and number of parameters.

    Lightning's own also has a column of operations, which stays at 0 without an example input.

    Args:
        max_depth: of the layers shown; -1 shows all.
    """

    def __init__(self, max_depth: int = 2) -> None:
        super().__init__(max_depth)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self._max_depth:
            return
        summary = summarize(pl_module, max_depth=self._max_depth)
        table: Any = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("layer", no_wrap=True)
        table.add_column("class")
        table.add_column("parameters", justify="right")
        for name, kind, count in zip(summary.layer_names, summary.layer_types, summary.param_nums, strict=True):
            table.add_row(name, kind, f"{count:,}" if count > 0 else "")
        frozen = summary.total_parameters - summary.trainable_parameters
        table.add_row("all", "", f"{summary.total_parameters:,}" + (f", {frozen:,} frozen" if frozen else ""))
        get_console().print(table)
