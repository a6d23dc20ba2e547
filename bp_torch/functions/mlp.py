"""A whole multilayer perceptron as one Function: hidden layers with one activation, and a linear output layer.

Forward, with a_0 = x, for the hidden layers l = 1 ... n - 1 and the output layer n::

    z_l = a_(l-1) W_lᵀ + b_l
    a_l = f(z_l)
    y   = z_n

Backward, from dz_n = dy down to the first layer::

    dW_l     = dz_lᵀ a_(l-1)
    db_l     = Σ dz_l over rows
    da_(l-1) = dz_l W_l
    dz_(l-1) = da_(l-1) ⊙ f′(z_(l-1))
    dx       = da_0

Faster ways are in aten/mlp.py and gpu/mlp.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .activation import ActivationFunction
from .dense import DenseFunction, product_tangent, rows
from .epilogue import Epilogue
from .function import Function, call

__all__ = ["MLPFunction", "gradients", "kept_of", "layer_by_layer", "saved_of"]


class MLPFunction(Function):
    """y = MLP(x); ``layers`` is W_1, b_1, ..., W_n, b_n.

    Shapes: x (..., I), W_1 (H_1, I), W_l (H_l, H_(l-1)), b_l (H_l), y (..., H_n). Any b may be None.

    ``forward`` returns (y, s_1, ..., s_(n-1)): for each hidden layer the pre-activation z, or the activation a where
    that tells f′. They are differentiable like y. With ``recompute`` it returns y alone and keeps no activations:
    backward computes them again from x.
    """

    @staticmethod
    def forward(x: Tensor, e: Epilogue, recompute: bool, *layers: Tensor | None) -> tuple[Tensor, ...]:
        return kept_of(layer_by_layer(DenseFunction.forward, x, e, layers), recompute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.e, ctx.recompute, *layers = inputs
        ctx.set_materialize_grads(False)
        # Without need: the layers below the lowest that is trained.
        lowest = next((i for i, need in enumerate((ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])) if need), 0)
        ctx.first = (lowest + 1) // 2  # 0: x itself; l: the parameters of layer l
        ctx.save_for_backward(x, *layers, *output[1:])

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, _, *layers = inputs
        ctx.save_for_forward(x, *layers, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *ds: Tensor | None) -> tuple[Tensor | None, ...]:
        x, layers, s = saved_of(
            ctx.saved_tensors, len(ctx.needs_input_grad), ctx.e, ctx.recompute, DenseFunction.forward
        )
        return gradients(ctx.e, ctx.first, ctx.needs_input_grad, dy, ds, x, layers, s, _activate, Epilogue.pull)

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        count = len(ctx.needs_input_grad)
        x, layers, s = saved_of(ctx.saved_tensors, count, ctx.e, ctx.recompute, DenseFunction.forward)
        tlayers, kept, a, ta = tangents[2:], [], x, tx
        for index, W in enumerate(layers[::2]):
            tz = product_tangent(a, W, ta, *tlayers[2 * index : 2 * index + 2])
            ta = tz
            if index < len(s):
                a = s[index] if by_output(ctx.e) else _activate(ctx.e, s[index])
                ta = ctx.e.pull(tz, s[index])
                kept.append(ta if by_output(ctx.e) else tz)
        assert ta is not None
        return (ta,) if ctx.recompute else (ta, *kept)


def layer_by_layer(
    dense: Callable[..., Any], x: Tensor, e: Epilogue, layers: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """y, and z or a of each hidden layer, by DenseFunction's ``forward``, or one that gives the same."""
    kept = []
    for W, b in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        output = dense(x, W, b, None, None, e)
        x, s = output if isinstance(output, tuple) else (output, output)
        kept.append(s)
    y = dense(x, *layers[-2:], None, None, Epilogue())
    return (y, *kept)


def kept_of(results: tuple[Tensor, ...], recompute: bool) -> tuple[Tensor, ...]:
    return results[:1] if recompute else results


def by_output(e: Epilogue) -> bool:
    """Whether a is kept, rather than z."""
    return e.told_by != "z"


def saved_of(
    saved: Sequence[Any], arguments: int, e: Epilogue, recompute: bool, dense: Callable[..., Any]
) -> tuple[Tensor, tuple[Any, ...], tuple[Tensor, ...]]:
    """x, the layers and s, computed again where it was not kept; ``arguments`` is the number of forward's."""
    x, *rest = saved
    count = arguments - 3
    layers, s = tuple(rest[:count]), tuple(rest[count:])
    return x, layers, layer_by_layer(dense, x, e, layers)[1:] if recompute else s


def gradients(
    e: Epilogue,
    first: int,
    needs: Sequence[bool],
    dy: Tensor | None,
    ds: Sequence[Tensor | None],
    x: Tensor,
    layers: tuple[Any, ...],
    s: tuple[Tensor, ...],
    activate: Callable[[Epilogue, Tensor], Tensor],
    pull: Callable[[Epilogue, Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, ...]:
    """backward, with f and its pullback; ``first`` is the lowest layer that is trained, and 0 is x itself."""
    Ws, bs = layers[::2], layers[1::2]
    grads: list[Tensor | None] = [None] * len(layers)
    dx, dz = None, dy
    if not any(needs):
        return None, None, None, *grads
    for index in range(len(Ws) - 1, -1, -1):
        need_W, need_b = needs[3 + 2 * index : 5 + 2 * index]
        if dz is not None:
            if need_W:
                below = x if index == 0 else s[index - 1] if by_output(e) else activate(e, s[index - 1])
                grads[2 * index] = rows(dz).mT @ rows(below)
            grads[2 * index + 1] = rows(dz).sum(0) if need_b and bs[index] is not None else None
        if index + 1 <= first:
            break
        da = None if dz is None else (rows(dz) @ Ws[index]).reshape(*dz.shape[:-1], Ws[index].shape[1])
        if index == 0:
            dx = da
            break
        d = ds[index - 1] if ds else None
        if by_output(e):
            da, d = _sum(da, d), None
        dz = _sum(None if da is None else pull(e, da, s[index - 1]), d)
    return dx, None, None, *grads


def _activate(e: Epilogue, z: Tensor) -> Tensor:
    a: Tensor = call(ActivationFunction, z, e)
    return a


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
