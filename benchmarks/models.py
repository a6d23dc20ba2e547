"""The models that are timed: written with torch.nn alone; ``bp_torch.convert`` makes the others of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.optim import Optimizer

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Model:
    """One row: a model, a batch, a loss and an optimizer."""

    name: str
    shape: tuple[int, ...]
    build: Callable[[float], Module]
    """Makes the model with this dropout probability; the same weights whatever the probability."""
    batch: Callable[[], tuple[Tensor, ...]]
    """Inputs and targets in float32 on the CPU."""
    loss: Loss
    """Of the model, of torch.nn.functional or bp_torch.functional, and of the batch."""
    optimizer: Callable[[Iterable[Parameter]], Optimizer]
    p: float = 0.0
    hidden: int = 0
    """Elements of all hidden layers' outputs for the batch, where saved bytes are stated for each of them."""
    autocast: bool = True
    """Whether it is trained under autocast where the benchmark's dtype has 16 bits. Parameters are float32 always."""
    channels_last: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}" + (" channels_last" if self.channels_last else "")


def sgd(parameters: Iterable[Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, foreach=True)


def adamw(parameters: Iterable[Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


def classification(model: Module, functional: Any, x: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = functional.cross_entropy(model(x), target)
    return loss


def helmholtz(model: Module, functional: Any, x: Tensor, source: Tensor) -> Tensor:
    """A physics-informed loss: the residual of u + ∂²u/∂x² + ∂²u/∂y² = source at the points x."""
    x = x.detach().requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(du[:, axis].sum(), x, create_graph=True)[0][:, axis] for axis in range(x.shape[1])
    )
    loss: Tensor = functional.mse_loss(u.squeeze(1) + laplacian, source)
    return loss


def gradient_penalty(model: Module, functional: Any, x: Tensor) -> Tensor:
    """A critic's loss with the penalty of Wasserstein networks: 10 (‖∇ₓ model‖ - 1)²."""
    x = x.detach().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    loss: Tensor = y.mean() + 10 * (dx.norm(dim=1) - 1).square().mean()
    return loss


def _labelled(rows: int, classes: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(rows, *shape), torch.randint(classes, (rows,)))


def mlp(rows: int, width: int, depth: int, norm: bool = False, p: float = 0.5) -> Model:
    """``depth`` hidden layers: linear, batch norm if there is one, relu, dropout; then 10 classes."""

    def build(p: float) -> Module:
        layers: list[Module] = []
        for _ in range(depth):
            layers += [nn.Linear(width, width, bias=not norm), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
            layers += [nn.Dropout(p)]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    return Model(
        "mlp_batch_norm" if norm else "mlp", (rows, width, depth), build, _labelled(rows, 10, width),
        classification, sgd, p, hidden=rows * width * depth,
    )  # fmt: skip


class TabularBlock(Module):
    """x + dropout(linear(dropout(relu(linear(BN(x)))))), the block of Gorishniy et al., arXiv 2106.11959."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(p))
        self.output = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.output(self.hidden(self.norm(x))))
        return y


def tabular_resnet(rows: int, width: int, blocks: int, features: int = 64) -> Model:
    def build(p: float) -> Module:
        head = [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2)]
        return nn.Sequential(nn.Linear(features, width), *(TabularBlock(width, p) for _ in range(blocks)), *head)

    return Model(
        "tabular_resnet", (rows, width, blocks), build, _labelled(rows, 2, features), classification, adamw, 0.2
    )


class BasicBlock(Module):
    """relu(BN(conv(relu(BN(conv(x))))) + shortcut), He et al., arXiv 1512.03385."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.convolution2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or before != channels:
            self.shortcut.extend([nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.convolution1(x))
        z: Tensor = self.relu(self.norm2(self.convolution2(y)) + self.shortcut(x))
        return z


def resnet18(rows: int, size: int, channels: int = 64, channels_last: bool = False) -> Model:
    """ResNet-18 of images ``size`` wide, with torch's convolutions and pooling, and 10 classes."""

    def build(p: float) -> Module:
        layers: list[Module] = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        before = channels
        for stage in range(4):
            for block in range(2):
                width = channels * 2**stage
                layers.append(BasicBlock(before, width, 2 if stage and not block else 1))
                before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))

    return Model(
        "resnet18", (rows, 3, size, size), build, _labelled(rows, 10, 3, size, size), classification, sgd,
        channels_last=channels_last,
    )  # fmt: skip


def physics_informed(points: int, width: int, depth: int) -> Model:
    """A tanh network of two coordinates, trained on second derivatives of its output."""

    def build(p: float) -> Module:
        layers: list[Module] = [nn.Linear(2, width), nn.Tanh()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(width, 1))

    return Model(
        "physics_informed", (points, width, depth), build, lambda: (torch.rand(points, 2), torch.randn(points)),
        helmholtz, adamw, autocast=False,
    )  # fmt: skip


def critic(rows: int, width: int, depth: int) -> Model:
    def build(p: float) -> Module:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.LeakyReLU(0.2))]
        return nn.Sequential(*layers, nn.Linear(width, 1))

    return Model(
        "gradient_penalty", (rows, width, depth), build, lambda: (torch.randn(rows, width),), gradient_penalty, adamw,
        autocast=False,
    )  # fmt: skip


def tiny() -> Iterator[Model]:
    """Every model once, for a test of the benchmark itself."""
    yield from (mlp(64, 16, 2), mlp(64, 16, 2, norm=True), tabular_resnet(32, 8, 2, 6))
    yield from (resnet18(4, 32, 4), resnet18(4, 32, 4, channels_last=True))
    yield from (physics_informed(16, 8, 2), critic(16, 8, 2))


def cpu(quick: bool) -> Iterator[Model]:
    yield from (mlp(1024, 512, 3), mlp(1024, 512, 3, norm=True), physics_informed(1024, 128, 4))
    if not quick:
        yield from (tabular_resnet(1024, 256, 4), resnet18(16, 64), critic(1024, 256, 3))


def cuda(quick: bool) -> Iterator[Model]:
    yield from (mlp(65536, 1024, 8), mlp(65536, 1024, 8, norm=True), tabular_resnet(65536, 512, 8))
    yield from (resnet18(128, 224, channels_last=True), physics_informed(65536, 256, 6))
    if not quick:
        yield from (resnet18(128, 224), critic(16384, 1024, 4), mlp(256, 256, 3))
