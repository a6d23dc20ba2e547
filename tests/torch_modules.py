"""torch.nn's own modules, as subjects that check() must find correct."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from seeds import seeded
from torch import Tensor, nn


def t(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def learn(tensor: Tensor) -> Tensor:
    return tensor.requires_grad_()


def classes(n: int, *shape: int) -> Tensor:
    return torch.randint(n, shape, generator=seeded(1))


def image() -> tuple[Any, ...]:
    return (t(2, 3, 4, 4),)


def rows() -> tuple[Any, ...]:
    return (t(4, 5),)


ACTIVATIONS = [
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "RReLU",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
]

Row = tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]

MODULES: dict[str, Row] = {name: (getattr(nn, name), rows) for name in ACTIVATIONS}
MODULES |= {
    "GELU-tanh": (lambda: nn.GELU("tanh"), rows),
    "ReLU-in-place": (lambda: nn.ReLU(inplace=True), rows),
    "Threshold": (lambda: nn.Threshold(0.1, 20.0), rows),
    "GLU": (nn.GLU, lambda: (t(4, 6),)),
    "Identity": (nn.Identity, rows),
    "Linear": (lambda: nn.Linear(5, 3), rows),
    "Linear-no-bias-3d": (lambda: nn.Linear(5, 3, bias=False), lambda: (t(2, 3, 5),)),
    "Bilinear": (lambda: nn.Bilinear(5, 4, 3), lambda: (t(4, 5), t(4, 4, seed=2))),
    "Conv1d": (lambda: nn.Conv1d(3, 2, 3, padding=1), lambda: (t(2, 3, 7),)),
    "Conv2d": (lambda: nn.Conv2d(3, 2, 3, stride=2), image),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 2, 2), image),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), image),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), image),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), image),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), image),
    "Flatten": (nn.Flatten, image),
    "Dropout": (nn.Dropout, lambda: (t(8, 16),)),
    "Dropout2d": (nn.Dropout2d, image),
    "AlphaDropout": (nn.AlphaDropout, lambda: (t(8, 16),)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), lambda: (t(6, 5),)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), image),
    "BatchNorm1d-eval": (lambda: nn.BatchNorm1d(5).eval(), rows),
    "BatchNorm1d-no-statistics": (lambda: nn.BatchNorm1d(5, affine=False, track_running_stats=False), rows),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), image),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), lambda: (t(2, 6, 4),)),
    "LayerNorm": (lambda: nn.LayerNorm(5), rows),
    "RMSNorm": (lambda: nn.RMSNorm(5), rows),
    "Softmax": (lambda: nn.Softmax(-1), rows),
    "Softmax-dim-0": (lambda: nn.Softmax(0), rows),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), rows),
    "Softmin": (lambda: nn.Softmin(-1), rows),
    "Embedding": (lambda: nn.Embedding(7, 4), lambda: (classes(7, 5),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4), lambda: (classes(7, 5, 2),)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, lambda: (t(6, 4), classes(4, 6))),
    "CrossEntropyLoss-smoothing": (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=1), lambda: (t(6, 4), classes(4, 6))
    ),
    "CrossEntropyLoss-none": (lambda: nn.CrossEntropyLoss(reduction="none"), lambda: (t(6, 4), classes(4, 6))),
    "NLLLoss": (nn.NLLLoss, lambda: (t(6, 4), classes(4, 6))),
    "MSELoss": (nn.MSELoss, lambda: (t(4, 5), t(4, 5, seed=2))),
    "MSELoss-sum": (lambda: nn.MSELoss(reduction="sum"), lambda: (t(4, 5), t(4, 5, seed=2))),
    "L1Loss": (nn.L1Loss, lambda: (t(4, 5), t(4, 5, seed=2))),
    "SmoothL1Loss": (nn.SmoothL1Loss, lambda: (t(4, 5), t(4, 5, seed=2))),
    "HuberLoss": (nn.HuberLoss, lambda: (t(4, 5), t(4, 5, seed=2))),
    "BCELoss": (nn.BCELoss, lambda: (learn(t(4, 5).sigmoid()), t(4, 5, seed=2).sigmoid())),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, lambda: (t(4, 5), t(4, 5, seed=2).sigmoid())),
    "KLDivLoss": (
        lambda: nn.KLDivLoss(reduction="batchmean"),
        lambda: (learn(t(4, 5).log_softmax(-1)), t(4, 5, seed=2).softmax(-1)),
    ),
    "PoissonNLLLoss": (nn.PoissonNLLLoss, lambda: (learn(t(4, 5)), t(4, 5, seed=2).abs())),
    "CosineEmbeddingLoss": (
        nn.CosineEmbeddingLoss, lambda: (t(4, 5), t(4, 5, seed=2), torch.tensor([1, -1, 1, -1]))
    ),
    "TripletMarginLoss": (nn.TripletMarginLoss, lambda: (t(4, 5), t(4, 5, seed=2), t(4, 5, seed=3))),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: (t(2, 3, 4), t(2, 3, 4, seed=2), t(2, 3, 4, seed=3)),
    ),
    "GRU": (lambda: nn.GRU(4, 3, batch_first=True), lambda: (t(2, 3, 4),)),
    "LSTM": (lambda: nn.LSTM(4, 3), lambda: (t(3, 2, 4),)),
    "RNNCell": (lambda: nn.RNNCell(4, 3), lambda: (t(2, 4), t(2, 3, seed=2))),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), lambda: (t(2, 3, 4),)
    ),
    "Sequential": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)),
        lambda: (t(6, 5),),
    ),
}  # fmt: skip
