"""Models as people write them, for the tests of conversion, and what these compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bp_torch


class BasicBlock(nn.Module):
    """The residual block of a ResNet: its forward is code, and one ReLU object is called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([BasicBlock(4), BasicBlock(4)])
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class AutoEncoder(nn.Module):
    """One activation object in three places, and one layer in two."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        middle = nn.Linear(3, 3)
        self.encoder = nn.Sequential(nn.Linear(6, 3), self.act, middle, nn.Sigmoid())
        self.decoder = nn.Sequential(middle, nn.ReLU(), nn.Linear(3, 6), self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6), nn.GELU(approximate="tanh"),
        nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.LeakyReLU(0.2, inplace=True),
        nn.Dropout(0.1, inplace=True), nn.Linear(6, 3), nn.LogSoftmax(dim=1),
    )  # fmt: skip


def tabular() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ELU(0.7), nn.Dropout(0.0), nn.Linear(8, 2))


def vgg() -> nn.Sequential:
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip
    return nn.Sequential(features, nn.Flatten(), nn.Linear(6, 5), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(5, 2))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=nn.GELU(), batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4, 5)),
    "tabular": (tabular, (4, 5)),
    "vgg": (vgg, (3, 3, 6, 6)),
    "resnet": (ResNet, (2, 3, 5, 5)),
    "encoder": (encoder, (2, 3, 8)),
    "autoencoder": (AutoEncoder, (4, 6)),
}


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout draws other masks from the same generator when it is fused; p = 0 makes training comparable."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), list(torch.autograd.grad(y.sin().sum(), [x, *model.parameters()]))


def types(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(module)) for path, module in model.named_modules(remove_duplicate=False)]


def state(model: nn.Module) -> tuple[list[str], dict]:
    state_dict = model.state_dict()
    return list(state_dict), state_dict._metadata


def statuses(model: nn.Module) -> list[str]:
    """What conversion_report says of each module."""
    return [row.status for row in bp_torch.conversion_report(model)]
