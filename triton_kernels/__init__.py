"""Fused Triton kernels of the layers, one file a layer under the layer's name.

They import torch and triton and nothing of bp_torch; ``bp_torch.backends`` decides when they run.
"""

from __future__ import annotations

from . import (
    activation,
    batch_norm,
    cross_entropy,
    dense,
    dropout,
    elementwise,
    loss,
    mlp,
    nll_loss,
    penalty,
    random,
    residual,
    softmax,
)
from .launch import INTERPRETED

__all__ = [
    "INTERPRETED",
    "activation",
    "batch_norm",
    "cross_entropy",
    "dense",
    "dropout",
    "elementwise",
    "loss",
    "mlp",
    "nll_loss",
    "penalty",
    "random",
    "residual",
    "softmax",
]
