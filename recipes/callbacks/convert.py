"""bp_torch's layers in a LightningModule that nobody edited."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

import bp_torch


class ConvertLayers(Callback):
    """Run `bp_torch.convert` on the LightningModule before it trains, and print what was converted.

    Modules change in place: parameters, optimizers, hooks and the state_dict's keys stay, so that checkpoints load into
    the unconverted model and the other way round. What `configure_model` or the module's own `setup` builds is
    converted too. Outputs and gradients are those of torch.nn up to rounding; a dropout mask comes from the same
    generator and is another mask.

    Args:
        fuse: as in `bp_torch.convert`.
        revert: give the module its torch.nn layers back when the trainer is done.
        verbose: print the report.

    After `setup`, `report` is the `ConversionReport`.
    """

    report: bp_torch.ConversionReport | None = None

    def __init__(self, fuse: bool = True, revert: bool = False, verbose: bool = True) -> None:
        self.fuse, self.revert, self.verbose = fuse, revert, verbose

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._convert(pl_module)

    def _late(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._convert(pl_module)

    # configure_model, which may build layers, comes after setup, and before these.
    on_fit_start = on_validation_start = on_test_start = on_predict_start = _late

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.revert:
            bp_torch.revert(pl_module)

    def _convert(self, pl_module: LightningModule) -> None:
        bp_torch.convert(pl_module, self.fuse)
        report = bp_torch.conversion_report(pl_module)
        if self.verbose and (self.report is None or report.rows != self.report.rows):
            rank_zero_info(f"bp_torch.convert({type(pl_module).__name__}):\n{report}")
        self.report = report
