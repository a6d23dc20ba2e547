"""Dropout: torch.nn's classes, with their arguments and repr."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._leaf import Leaf

__all__ = ["AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]


class Dropout(torch.nn.Dropout, Leaf):
    """y = m ⊙ x / (1 - p) in training, x in evaluation."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d, Leaf):
    """Dropout of whole channels: (N, C, L) or (C, L)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d, Leaf):
    """Dropout of whole channels: (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d, Leaf):
    """Dropout of whole channels: (N, C, D, H, W) or (C, D, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout, Leaf):
    """Dropout to SELU's lower limit, which keeps mean 0 and variance 1. As in torch, ``inplace`` is not looked at."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout, Leaf):
    """Alpha dropout of whole channels: (N, C, ...). As in torch, ``inplace`` is not looked at."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.feature_alpha_dropout(input, self.p, self.training)
