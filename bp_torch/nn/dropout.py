"""Dropout: torch.nn's classes, with their arguments and repr."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._leaf import as_leaf

__all__ = ["AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]


class Dropout(torch.nn.Dropout):
    """y = m ⊙ x / (1 - p) in training, x in evaluation."""

    def forward(self, input: Tensor) -> Tensor:
        if (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(torch.nn.Dropout1d):
    """Dropout of whole channels: (N, C, L) or (C, L)."""

    def forward(self, input: Tensor) -> Tensor:
        if (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(torch.nn.Dropout2d):
    """Dropout of whole channels: (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        if (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(torch.nn.Dropout3d):
    """Dropout of whole channels: (N, C, D, H, W) or (C, D, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        if (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(torch.nn.AlphaDropout):
    """Dropout to SELU's lower limit, which keeps mean 0 and variance 1. As in torch, ``inplace`` is not looked at."""

    def forward(self, input: Tensor) -> Tensor:
        if (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    """Alpha dropout of whole channels: (N, C, ...). As in torch, ``inplace`` is not looked at."""

    def forward(self, input: Tensor) -> Tensor:
        if (leaf := as_leaf(self, input)) is not None:
            return leaf
        return functional.feature_alpha_dropout(input, self.p, self.training)
