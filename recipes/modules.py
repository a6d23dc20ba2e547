"""The one page of Lightning that every classification recipe shares: what varies is in the YAML files."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bp_torch import nn


class Classifier(LightningModule):
    """Softmax cross-entropy over a network's logits.

        logits = network(x), x flattened to (N, features)    loss = mean over rows of -log softmax(logits)[class]

    Args:
        network: any module from (N, features) to (N, classes), such as `bp_torch.nn.MLP`.
        optimizer: called with the parameters; matrices in one group, biases and norm parameters in a second one that
            is exempt from weight decay.
        schedule: called with the optimizer; None keeps the learning rate.
        interval: whether the schedule advances with each epoch or with each optimizer step.
        monitor: the metric that `ReduceLROnPlateau` watches.
        label_smoothing: as in `CrossEntropyLoss`; training loss only.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: LRSchedulerCallable | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val_loss",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        self.network = network
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.interval, self.monitor = interval, monitor
        self.training_loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.flatten(1))

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = self.training_loss(logits, y) if self.training else self.loss(logits, y)
        accuracy = (logits.argmax(1) == y).float().mean()
        metrics = {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(y))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logits, (N, classes)."""
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self))
        if self.make_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def _scheduler(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.make_schedule is not None
        schedule = self.make_schedule(optimizer)
        if not isinstance(schedule, ReduceLROnPlateau):
            return {"scheduler": schedule, "interval": self.interval}
        # Lightning advances this one at the end of an epoch, but after the epoch's checkpoint is saved, so a resumed
        # run would be an epoch behind. "Every so many steps" comes before, and is the same moment otherwise.
        self.trainer.estimated_stepping_batches  # noqa: B018  counts the batches of an epoch
        frequency = int(self.trainer.num_training_batches) if self.interval == "epoch" else 1
        return {"scheduler": schedule, "interval": "step", "frequency": frequency, "monitor": self.monitor}


def parameter_groups(module: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices, and biases with norm scales, which weight decay leaves alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
