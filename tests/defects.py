"""Deliberately wrong Functions and modules, each beside its corrected twin.

Each is the least code that has its defect.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Linear(Function):
    """y = x Wᵀ + b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return x @ W.t() + b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, _ = inputs
        ctx.save_for_backward(x, W)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W = ctx.saved_tensors
        return dy @ W, dy.t() @ x, dy.sum(0)


class BiasOff(Linear):
    """The bias's gradient is 1 % too large."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, W = ctx.saved_tensors
        return dy @ W, dy.t() @ x, 1.01 * dy.sum(0)


class Square(Function):
    """y = tanh(x)²; backward recomputes from the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x) ** 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        a = torch.tanh(x)
        return dy * 2 * a * (1 - a**2)


class SavedIntermediate(Function):
    """Backward uses tanh(x), computed in forward, which a second derivative takes for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a = torch.tanh(x)
        ctx.save_for_backward(a)
        return a**2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return dy * 2 * a * (1 - a**2)


class ReLU(Function):
    """y = max(x, 0), NaN kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x <= 0, torch.zeros_like(x), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy * (y > 0)


class NaNSwallowed(ReLU):
    """The comparison is the other way round, so that NaN becomes 0."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.zeros_like(x))


class KeepsOutput(ReLU):
    """The output is kept for forward mode as well, which holds it where an exception ends the call."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)


class KeepsEachOutput(ReLU):
    """Each output is kept, for a plot that nobody draws."""

    kept: ClassVar[list[Tensor]] = []

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ReLU.setup_context(ctx, inputs, output)
        KeepsEachOutput.kept.append(output.detach())


class KeepsEachInput(ReLU):
    """Each input is kept."""

    kept: ClassVar[list[Tensor]] = []

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ReLU.setup_context(ctx, inputs, output)
        KeepsEachInput.kept.append(inputs[0].detach())


class SharesState(Function):
    """What backward needs lies in one place, where the next call overwrites it."""

    gate: ClassVar[dict[str, Tensor]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        SharesState.gate["on"] = x > 0
        return ReLU.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * SharesState.gate["on"]


class Masked(Function):
    """y = x [x > 0], the mask on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.on = x.detach() > 0
        return ReLU.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.on


class FreesItsMask(Masked):
    """The first backward frees what the second needs: `Tensor * None` is a TypeError, "unsupported operand"."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        on, ctx.on = ctx.on, None
        return dy * on


class Misspelled(Function):
    """There is no backward, and torch says so by a NotImplementedError."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return ReLU.forward(x)

    @staticmethod
    def backwards(ctx: Any, dy: Tensor) -> Tensor:
        return dy


class DenseStrides(ReLU):
    """Backward reads its upstream gradient as a kernel does that is handed a pointer: row by row, without strides."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        flat = dy.as_strided((dy.untyped_storage().nbytes() // dy.element_size(),), (1,), 0)
        index = torch.arange(dy.numel()) % flat.numel() + dy.storage_offset()
        return flat[index % flat.numel()].reshape(dy.shape) * (y > 0)


class OverwritesSaved(ReLU):
    """Backward writes its result over the tensor that it saved."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            gate = y.detach()
            gate.copy_(dy * (y > 0))
        return gate


class OverwritesGradient(ReLU):
    """Backward writes its result over the upstream gradient, as if nobody else had it."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return dy.mul_(y > 0)


class KeepsUnsaved(Function):
    """The input is kept as an attribute: an in-place change of it goes unnoticed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 3 * ctx.x**2


class Softplus(Function):
    """y = log(1 + eˣ), without overflow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * torch.sigmoid(x)


class Overflows(Softplus):
    """The formula as it is written in a book."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.log(1 + torch.exp(x))


class Float32Inside(Softplus):
    """Accumulates in float32, whatever the dtype: right for lower ones, wrong for float64."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return Softplus.forward(x.float()).to(x.dtype)


class Float32Constant(Softplus):
    """A constant of the backward is held in float32."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        third = torch.tensor(1 / 3, dtype=torch.float32).item()
        return dy * torch.sigmoid(x) * (3 * third)


BLOCK = 16


class RowScale(Function):
    """y = x w, block of rows by block of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return dy * w, (dy * x).sum(0)


class LastBlockDropped(RowScale):
    """From the second block on, rows are only computed in whole blocks of 16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        y = torch.zeros_like(x)
        rows = x.shape[0] // BLOCK * BLOCK if x.shape[0] > BLOCK else x.shape[0]
        y[:rows] = x[:rows] * w
        return y


class Int32Offsets(RowScale):
    """Reads its input by offsets that are computed in 32 bits, as a kernel does that forgets to widen them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        size = x.untyped_storage().nbytes() // x.element_size()
        flat = x.detach().as_strided((size,), (1,), 0)
        offsets = torch.tensor(x.storage_offset(), dtype=torch.int32)
        for dim, stride in enumerate(x.stride()):
            shape = [-1 if d == dim else 1 for d in range(x.dim())]
            index = torch.arange(x.shape[dim], dtype=torch.int64) * stride
            offsets = offsets + index.to(torch.int32).reshape(shape)  # wraps beyond 2³¹
        return flat[offsets.long() % max(size, 1)] * w if size else x * w


class Dropout(Function):
    """y = m x / (1 - p), m from torch's generator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.rand_like(x) >= 0.5
        ctx.save_for_backward(mask)
        return x * mask * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return dy * mask * 2


class DeafDropout(Dropout):
    """The mask's seed comes from Python's generator: torch.manual_seed is not heard, and a recompute draws another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(random.randrange(2**31))
        mask = (torch.rand(x.shape, generator=generator, dtype=torch.float32) >= 0.5).to(x.device)
        ctx.save_for_backward(mask)
        return x * mask * 2


class BatchNorm(nn.BatchNorm1d):
    """Batch norm whose derivative is a Function's."""

    formula: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.1)
                self.running_var.lerp_(x.var(0, correction=0), 0.1)
        return self.formula(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Normalize(Function):
    """y = γ (x - mean)/√(var + 1e-5) + β; in training mean and var are x's own, recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, g: Tensor, b: Tensor, training: bool) -> Tensor:
        # Copies: a later call in training moves the running statistics.
        ctx.save_for_backward(x, mean.clone(), var.clone(), g)
        ctx.training = training
        return statistics(x, mean, var, training)[0] * g + b

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return gradients(*ctx.saved_tensors, dy, ctx.training, ctx.training)


class NormalizeAsIfTraining(Normalize):
    """The backward of training, in evaluation too."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return gradients(*ctx.saved_tensors, dy, ctx.training, True)


def statistics(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """x̂ and √(var + 1e-5)."""
    if training:
        mean, var = x.mean(0), x.var(0, correction=0)
    sd = (var + 1e-5).sqrt()
    return (x - mean) / sd, sd


def gradients(
    x: Tensor, mean: Tensor, var: Tensor, g: Tensor, dy: Tensor, training: bool, through: bool
) -> tuple[Any, ...]:
    z, sd = statistics(x, mean, var, training)
    dz = dy * g
    if through:  # the statistics depend on x
        dz = dz - dz.mean(0) - z * (dz * z).mean(0)
    return dz / sd, None, None, (dy * z).sum(0), dy.sum(0), None


class RightBatchNorm(BatchNorm):
    formula = staticmethod(Normalize.apply)


class EvaluationAsTraining(BatchNorm):
    formula = staticmethod(NormalizeAsIfTraining.apply)


def two_pass(x: Tensor) -> Tensor:
    """Normalized rows."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def one_pass(x: Tensor) -> Tensor:
    """The variance as the mean of squares minus the square of the mean."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / (x.square().mean(-1, keepdim=True) - mean.square() + 1e-5).sqrt()


def whole(x: Tensor) -> Tensor:
    return torch.where(x.mean() > 0, x.sin(), x.cos())


def breaks_graph(x: Tensor) -> Tensor:
    """A Python branch on a tensor's value."""
    return x.sin() if x.mean() > 0 else x.cos()
