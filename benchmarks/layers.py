"""The layers and shapes that are timed: each by bp_torch and by torch, on the same inputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch.functional as bpF

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """One row: a computation of the inputs and of the dropout probability."""

    name: str
    shape: tuple[int, ...]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: Callable[[], Inputs]
    """Makes the inputs in float32 on the CPU; those that need gradients say so."""
    passes: tuple[int, int] = (0, 0)
    """Tensors of the input's size that forward and backward read or write at least."""
    gemm: bool = False
    """The products x Wᵀ and, in backward, dy W and dyᵀ x of the first two inputs are the floor."""
    p: float = 0.0
    channels_last: bool = False
    bare: Callable[..., Tensor] | None = None
    """ATen's operator, without torch.nn.functional's Python, where the overhead of a call is wanted."""

    @property
    def title(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}" + (" channels_last" if self.channels_last else "")


def normal(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    return (scale * torch.randn(shape)).requires_grad_(grad)


def linear(rows: int, width: int, inner: int, p: float = 0.5) -> Layer:
    def inputs() -> Inputs:
        return normal(rows, inner, grad=True), normal(width, inner, scale=1 / math.sqrt(inner)), normal(width)

    return Layer(
        "linear_relu_dropout" if p else "linear_relu", (rows, width, inner),
        lambda x, W, b, p: bpF.dense(x, W, b, activation="relu", p=p),
        lambda x, W, b, p: F.dropout(F.relu(F.linear(x, W, b)), p),
        inputs, gemm=True, p=p,
    )  # fmt: skip


def plain_linear(rows: int, width: int, inner: int) -> Layer:
    return Layer(
        "linear", (rows, width, inner), lambda x, W, b, p: bpF.linear(x, W, b), lambda x, W, b, p: F.linear(x, W, b),
        linear(rows, width, inner).inputs, gemm=True,
    )  # fmt: skip


def dropout(*shape: int) -> Layer:
    return Layer(
        "dropout", shape, lambda x, p: bpF.dropout(x, p), lambda x, p: F.dropout(x, p),
        lambda: (normal(*shape),), (2, 2), p=0.5,
    )  # fmt: skip


def relu_residual(*shape: int, p: float = 0.5) -> Layer:
    """relu of a residual connection: what stands at the end of a block."""
    return Layer(
        "residual_dropout_relu", shape, lambda x, r, p: bpF.residual(x, r, p=p, activation="relu"),
        lambda x, r, p: F.relu(r + F.dropout(x, p)),
        lambda: (normal(*shape), normal(*shape)), (3, 4), p=p,
    )  # fmt: skip


def dropout_residual(*shape: int) -> Layer:
    return Layer(
        "dropout_residual", shape, lambda x, r, p: bpF.dropout_add(x, r, p), lambda x, r, p: r + F.dropout(x, p),
        lambda: (normal(*shape), normal(*shape)), (3, 2), p=0.5,
    )  # fmt: skip


def batch_norm(*shape: int, residual: bool = False, channels_last: bool = False) -> Layer:
    def inputs() -> Inputs:
        tensors = [normal(*shape), normal(shape[1]), normal(shape[1])] + ([normal(*shape)] if residual else [])
        if channels_last:
            return tuple(
                t.detach().to(memory_format=torch.channels_last).requires_grad_() if t.dim() == 4 else t
                for t in tensors
            )
        return tuple(tensors)

    def ours(x: Tensor, w: Tensor, b: Tensor, *rest: Any) -> Tensor:
        return bpF.batch_norm_act(x, None, None, w, b, rest[0] if residual else None, True, activation="relu")

    def theirs(x: Tensor, w: Tensor, b: Tensor, *rest: Any) -> Tensor:
        y = F.batch_norm(x, None, None, w, b, training=True)
        return F.relu(y + rest[0] if residual else y)

    return Layer(
        "batch_norm_residual_relu" if residual else "batch_norm_relu", shape, ours, theirs, inputs,
        (4, 6) if residual else (3, 5), channels_last=channels_last,
    )  # fmt: skip


def softmax(*shape: int) -> Layer:
    return Layer(
        "softmax", shape, lambda x, p: bpF.softmax(x, -1), lambda x, p: F.softmax(x, -1),
        lambda: (normal(*shape),), (2, 3),
    )  # fmt: skip


def cross_entropy(rows: int, classes: int) -> Layer:
    return Layer(
        "cross_entropy", (rows, classes),
        lambda x, target, p: bpF.cross_entropy(x, target), lambda x, target, p: F.cross_entropy(x, target),
        lambda: (normal(rows, classes), torch.randint(classes, (rows,))), (1, 2),
    )  # fmt: skip


def mse(*shape: int) -> Layer:
    return Layer(
        "mse", shape, lambda x, t, p: bpF.mse_loss(x, t), lambda x, t, p: F.mse_loss(x, t),
        lambda: (normal(*shape), normal(*shape, grad=False)), (2, 3),
    )  # fmt: skip


def narrow_mlp(rows: int, width: int, hidden: int) -> Layer:
    """``hidden`` relu layers and a linear one, all of one width. The floor keeps no activations."""
    layers = hidden + 1

    def inputs() -> Inputs:
        weights = [normal(width, width, scale=math.sqrt(2 / width)) for _ in range(layers)]
        return normal(rows, width), *weights, *(normal(width) for _ in range(layers))

    def theirs(x: Tensor, *rest: Any) -> Tensor:
        for W, b in zip(rest[:hidden], rest[layers:-2], strict=True):
            x = F.relu(F.linear(x, W, b))
        return F.linear(x, rest[hidden], rest[-2])

    return Layer(
        "narrow_mlp", (rows, width, hidden),
        lambda x, *rest: bpF.mlp(x, rest[:layers], rest[layers:-1]), theirs, inputs, (2, 3),
    )  # fmt: skip


def overhead() -> Iterator[Layer]:
    """Calls so small that the time is that of the call."""
    tiny = (8, 8)
    yield dataclasses.replace(plain_linear(8, 8, 8), bare=lambda x, W, b, p: F.linear(x, W, b))
    yield Layer(
        "relu", tiny, lambda x, p: bpF.relu(x), lambda x, p: F.relu(x), lambda: (normal(*tiny),), (2, 3),
        bare=lambda x, p: torch.relu(x),
    )  # fmt: skip
    yield dataclasses.replace(dropout(*tiny), bare=lambda x, p: torch.dropout(x, p, True))
    yield Layer(
        "batch_norm", tiny,
        lambda x, w, b, p: bpF.batch_norm(x, None, None, w, b, True),
        lambda x, w, b, p: F.batch_norm(x, None, None, w, b, True),
        batch_norm(*tiny).inputs, (3, 5),
        bare=lambda x, w, b, p: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled),
    )  # fmt: skip
    # Typed by torch as if the reduction were a string; 1 is the mean.
    cross_entropy_loss: Any = torch._C._nn.cross_entropy_loss
    mse_loss: Any = torch._C._nn.mse_loss
    yield dataclasses.replace(
        cross_entropy(*tiny), bare=lambda x, target, p: cross_entropy_loss(x, target, None, 1, -100, 0.0)
    )
    yield dataclasses.replace(mse(*tiny), bare=lambda x, t, p: mse_loss(x, t, 1))


def tiny() -> Iterator[Layer]:
    """Every layer once, for a test of the benchmark itself."""
    yield from (
        linear(8, 6, 5),
        plain_linear(8, 6, 5),
        dropout(64, 64),
        relu_residual(64, 64),
        dropout_residual(64, 64),
    )
    yield from (batch_norm(16, 8), batch_norm(2, 4, 3, 3, residual=True, channels_last=True))
    yield from (softmax(4, 9), cross_entropy(6, 5), mse(4, 4), narrow_mlp(4, 4, 2))


def cpu(quick: bool) -> Iterator[Layer]:
    yield from (linear(64, 64, 64), linear(256, 512, 512), plain_linear(64, 64, 64))
    yield from (dropout(4096, 1024), batch_norm(4096, 1024), batch_norm(65536, 128))
    yield from (cross_entropy(64, 10), mse(4096, 1024), softmax(1024, 1024), narrow_mlp(4096, 64, 4))
    if not quick:
        yield from (linear(4096, 1024, 1024), cross_entropy(1024, 32000), relu_residual(4096, 1024))
        yield from (dropout_residual(4096, 1024), batch_norm(32, 64, 56, 56, residual=True))


def cuda(quick: bool) -> Iterator[Layer]:
    yield from (linear(65536, 1024, 1024), linear(65536, 1024, 256), linear(64, 64, 64), plain_linear(64, 64, 64))
    yield from (dropout(65536, 1024), relu_residual(65536, 1024), dropout_residual(65536, 1024))
    yield from (batch_norm(65536, 1024), batch_norm(32, 64, 112, 112), batch_norm(32, 64, 112, 112, channels_last=True))
    yield from (softmax(32768, 1024), softmax(4096, 32768), cross_entropy(8192, 32000), mse(16384, 4096))
    yield narrow_mlp(65536, 64, 4)
    if not quick:
        yield from (linear(16384, 4096, 4096), linear(1024, 512, 512, p=0.0), linear(65536, 64, 64))
        for channels_last in (False, True):
            yield batch_norm(32, 256, 28, 28, channels_last=channels_last)
            yield batch_norm(128, 256, 56, 56, residual=True, channels_last=channels_last)
            yield batch_norm(128, 512, 28, 28, channels_last=channels_last)
        yield from (softmax(16384, 4096), softmax(8192, 8192), softmax(2048, 65536), softmax(1024, 131072))
        yield from (cross_entropy(4096, 128256), cross_entropy(64, 10), mse(1024, 1024))
