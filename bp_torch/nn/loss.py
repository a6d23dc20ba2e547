"""Losses: torch.nn's classes, with their arguments, buffers and repr, over this package's Functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._leaf import Leaf

__all__ = ["BCEWithLogitsLoss", "CrossEntropyLoss", "HuberLoss", "L1Loss", "MSELoss", "NLLLoss", "SmoothL1Loss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss, Leaf):
    """-log softmax(x)_t, or -Σ q log softmax(x) for probabilities q."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss, Leaf):
    """-x_t of log-probabilities x."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(
            input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
        )


class MSELoss(torch.nn.MSELoss, Leaf):
    """(x - t)²."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss, Leaf):
    """|x - t|."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss, Leaf):
    """e²/(2β) where |e| < β, else |e| - β/2, with e = x - t."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss, Leaf):
    """e²/2 where |e| ≤ δ, else δ (|e| - δ/2), with e = x - t."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss, Leaf):
    """-w (π t log σ(x) + (1 - t) log(1 - σ(x)))."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
