"""Functions and modules that are right in a plain call and wrong in another use, each beside its corrected twin.

Other uses are: outputs or inputs without a gradient, forward mode, vmap, complex numbers, zeros, other batch sizes,
tied weights, copies, seeds, transforms that are compiled.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from defects import Dropout, RowScale
from torch import Tensor, nn
from torch.autograd import Function

import bp_torch.functions.function


class SineAndCosine(Function):
    """y = sin(x), z = cos(x), either of which the loss may leave out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dz: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.cos() - dz * x.sin()


class NeedsBoth(SineAndCosine):
    """A gradient that is not there is None, which cannot be multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return SineAndCosine.forward(ctx, x)


class Multiply(Function):
    """y = x w, without a backward yet."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class Times(Multiply):
    """y = x w, each alone batched or not, along any dimension."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return dy * w, dy * x

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor) -> Any:
        x, w = (t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip((x, w), in_dims, strict=True))
        return Times.apply(x, w), 0


class ZeroForNone(Times):
    """The rule takes in_dim 0 for "not batched"."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, w: Tensor) -> Any:
        x, w = (t.movedim(d, 0) if d else t.unsqueeze(0) for t, d in zip((x, w), in_dims, strict=True))
        return Times.apply(x, w), 0


class RunningSum(Function):
    """y = sums of x from the first column on."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.cumsum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.flip(-1).cumsum(-1).flip(-1)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return RunningSum.apply(x.movedim(in_dims[0], 0)), 0


class IgnoresInDims(RunningSum):
    """The rule is right where the batch is the first dimension."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return RunningSum.apply(x), 0


class Rotate(Function):
    """y = x w², w complex, y as pairs; torch's gradient of a complex number has its conjugate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.view_as_real(x * w * w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dz = torch.view_as_complex(dy.contiguous())
        return (dz * (w * w).conj()).real, (2 * dz * x * w.conj()).sum(0)


class NoConjugate(Rotate):
    """As if w were real."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dz = torch.view_as_complex(dy.contiguous())
        return (dz * (w * w).conj()).real, (2 * dz * x * w).sum(0)


class Rotation(nn.Module):
    """A module whose parameter and buffer are complex."""

    formula: Any = staticmethod(Rotate.apply)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.polar(torch.linspace(0.5, 1, 3), torch.linspace(0, 2, 3)))
        self.register_buffer("phase", torch.polar(torch.ones(3), torch.linspace(1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self.formula(x, self.w)) * self.phase


class RotationNoConjugate(Rotation):
    formula = staticmethod(NoConjugate.apply)


class Magnitude(Function):
    """y = √(x²), with the derivative 0 at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.square().sqrt()
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.sign()


class ZeroTimesInfinity(Magnitude):
    """x/√(x²), which is 0/0."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x / x.square().sqrt()


class Product(Function):
    """y = x₁ x₂ x₃ …, whose derivative by xᵢ is the product of the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.prod(-1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        columns = range(x.shape[-1])
        others = [x[..., [j for j in columns if j != i]].prod(-1) for i in columns]
        return dy.unsqueeze(-1) * torch.stack(others, -1)


class Quotient(Product):
    """The product divided by xᵢ, and 0 where that is 0."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = (dy * x.prod(-1)).unsqueeze(-1) / x
        return torch.where(x == 0, torch.zeros_like(x), dx)


class Centre(Function):
    """y = x - mean over rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy - dy.mean(0)


class OneBatchSize(Centre):
    """Backward divides by the number of rows of the first call."""

    rows: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if not OneBatchSize.rows:
            OneBatchSize.rows.append(x.shape[0])
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy - dy.sum(0) / OneBatchSize.rows[0]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(5, 5, bias=False) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Gate(Function):
    """y = x σ(w), one w for each column."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * torch.sigmoid(w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        s = torch.sigmoid(w)
        dx = dy * s if ctx.needs_input_grad[0] or torch.compiler.is_compiling() else None
        return dx, (dy * x * s * (1 - s)).sum(0)


class GateFrozen(Gate):
    """The weight's gradient is made of the input's, which is there only if the input needs one."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        s = torch.sigmoid(w)
        dx = dy * s if ctx.needs_input_grad[0] else torch.zeros_like(x)
        return dx, (dx * x * (1 - s)).sum(0)


class Scale(Multiply):
    """y = x w; while compiling no gradient is left out."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        need_x, need_w = (need or torch.compiler.is_compiling() for need in ctx.needs_input_grad)
        return dy * w if need_x else None, (dy * x).sum(0) if need_w else None


class TrustsNeeds(Scale):
    """Gradients are left out where Dynamo says that nobody needs them."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        return dy * w if need_x else None, (dy * x).sum(0) if need_w else None


class Lookup(nn.Module):
    """A scale that state_dict saves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ForgetsState(Lookup):
    """state_dict leaves the scale out."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass


class CopyScales(Lookup):
    """What a constructor does once is done again to each copy."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.no_grad():
            self.scale.mul_(2)


class SumOfRows(Function):
    """dw = Σ dy x over rows, with a rule that sums over the batch as well."""

    @staticmethod
    def forward(dy: Tensor, x: Tensor) -> Tensor:
        return (dy * x).sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        dy, x = ctx.saved_tensors
        return dz * x, dz * dy

    @staticmethod
    def vmap(info: Any, in_dims: Any, dy: Tensor, x: Tensor) -> Any:
        if in_dims[1] is None:
            return (dy.movedim(in_dims[0], 0) * x).sum(1), 0
        rows = [t.movedim(d, 0).flatten(0, 1) for t, d in zip((dy, x), in_dims, strict=True)]
        return SumOfRows.apply(*rows), None


class SumsSamples(Scale):
    """The gradient of each sample is that of the whole batch."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return dy * w, SumOfRows.apply(dy, x)


class Sine(bp_torch.functions.function.Function):
    """y = sin(x), in both modes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.cos()

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tx * x.cos()


class OtherSign(Sine):
    """The rule of forward mode has the sign of the cosine's."""

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor) -> Tensor:
        return -Sine.jvp_rule(ctx, tx)


class Blend(bp_torch.functions.function.Function):
    """y = sin(x) + cos(w), in both modes."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x.sin() + w.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        x, w = ctx.saved_tensors
        return (None, None) if dy is None else (dy * x.cos(), -dy * w.sin())

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tw: Tensor | None) -> Tensor:
        x, w = ctx.saved_tensors
        moves = [t * factor for t, factor in ((tx, x.cos()), (tw, -w.sin())) if t is not None]
        return sum(moves[1:], moves[0])


class FirstTangent(Blend):
    """Where both inputs have a tangent, the rule of forward mode takes one."""

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, tw: Tensor | None) -> Tensor:
        return Blend.jvp_rule(ctx, tx, None if tx is not None else tw)


class AnyOrder(RowScale):
    """The sum over rows turns round with each call, as the order of atomic additions does."""

    turned: ClassVar[list[bool]] = [False]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        AnyOrder.turned[0] = not AnyOrder.turned[0]
        dw = torch.zeros_like(w)
        for row in range(len(x))[:: -1 if AnyOrder.turned[0] else 1]:
            dw = dw + dy[row] * x[row]
        return dy * w, dw


class NumpyDropout(Dropout):
    """The mask is drawn by numpy, whose seed torch.manual_seed does not set."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.from_numpy(np.random.rand(*x.shape) >= 0.5).to(x.device)  # noqa: NPY002
        ctx.save_for_backward(mask)
        return x * mask * 2


def tanh_and_a_little(x: Tensor) -> Tensor:
    """tanh², off by 1e-5."""
    return torch.tanh(x) ** 2 + 1e-5
