"""Softmax modules: torch.nn's classes over this package's Functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from ._leaf import Leaf

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]


class Softmax(torch.nn.Softmax, Leaf):
    """y = exp(x)/Σ exp(x) along ``dim``."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax, Leaf):
    """y = x - log Σ exp(x) along ``dim``."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(torch.nn.Softmin, Leaf):
    """y = exp(-x)/Σ exp(-x) along ``dim``."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmin(input, self.dim, _stacklevel=5)


class Softmax2d(torch.nn.Softmax2d, Leaf):
    """Softmax over the channels of (N, C, H, W) or (C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        # A traced input has no dimensions yet.
        if not isinstance(input, torch.fx.Proxy) and input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: 'input': expected 3 or 4 dimensions, got {input.dim()}")
        return functional.softmax(input, -3, _stacklevel=5)
