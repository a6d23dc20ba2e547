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
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backends import plain_kernels
from .activation import ActivationFunction, activation_backward, lookup
from .dense import DenseFunction
from .function import Function, call, is_plain

__all__ = ["MLPFunction"]


class MLPFunction(Function):
    """y = MLP(x); ``layers`` is W_1, b_1, ..., W_n, b_n.

    Shapes: x (..., I), W_1 (H_1, I), W_l (H_l, H_(l-1)), b_l (H_l), y (..., H_n). Any b may be None.

    ``forward`` returns (y, s_1, ..., s_(n-1)): for each hidden layer the pre-activation z, or the activation a where
    that tells f′. They are differentiable like y. With ``recompute`` it returns y alone and keeps no activations:
    backward computes them again from x.

    Where all hidden layers have one width, one Triton kernel serves forward and one backward, up to widths of 64
    (float32, and backward on ROCm: 32).
    """

    @staticmethod
    def forward(
        x: Tensor, activation: str, parameters: tuple[float, ...], recompute: bool, *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        if recompute:
            return (_forward(x, activation, parameters, layers, "")[0],)
        return _forward(x, activation, parameters, layers, _kept(activation, parameters))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.activation, ctx.parameters, ctx.recompute, *layers = inputs
        ctx.set_materialize_grads(False)
        # Without need: the layers below the lowest that is trained.
        lowest = next((i for i, need in enumerate((ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])) if need), 0)
        ctx.first = (lowest + 1) // 2  # 0: x itself; l: the parameters of layer l
        ctx.save_for_backward(x, *layers, *output[1:])

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, _, _, *layers = inputs
        ctx.save_for_forward(x, *layers, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *ds: Tensor | None) -> tuple[Tensor | None, ...]:
        x, layers, s = _saved(ctx)
        Ws, bs = _tensors(layers[::2]), layers[1::2]
        constants = ctx.activation, ctx.parameters
        if not any(ctx.needs_input_grad):
            return (None,) * (4 + len(layers))
        if dy is not None and all(d is None for d in ds):
            triton = plain_kernels(dy, x, *layers, *s)
            if triton is not None and triton.mlp.fits(x, Ws, True):
                output = _kept(*constants) == "a"
                dx, dWs, dbs = triton.mlp.backward(dy, x, Ws, s, *constants, output)
                found = [g for pair in zip(dWs, dbs, strict=True) for g in pair]
                given = zip(found, ctx.needs_input_grad[4:], strict=True)
                dx = dx if ctx.needs_input_grad[0] else None
                return dx, None, None, None, *(g if need else None for g, need in given)
        grads: list[Tensor | None] = [None] * len(layers)
        dx, dz = None, dy
        for index in range(len(Ws) - 1, -1, -1):
            need_W, need_b = ctx.needs_input_grad[4 + 2 * index : 6 + 2 * index]
            if dz is not None:
                rows = _rows(dz)
                before = x if index == 0 else _activated(s[index - 1], *constants) if need_W else None
                grads[2 * index] = rows.mT @ _rows(before) if need_W and before is not None else None
                grads[2 * index + 1] = rows.sum(0) if need_b and bs[index] is not None else None
            if index + 1 <= ctx.first:
                break
            da = None if dz is None else (_rows(dz) @ Ws[index]).reshape(*dz.shape[:-1], Ws[index].shape[1])
            if index == 0:
                dx = da
            else:
                dz = _below(da, ds[index - 1] if ds else None, s[index - 1], *constants)
        return dx, None, None, None, *grads

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor | None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        x, layers, s = _saved(ctx)
        Ws = _tensors(layers[::2])
        tlayers, kept, a, ta = tangents[3:], [], x, tx
        for index, W in enumerate(Ws):
            tW, tb = tlayers[2 * index : 2 * index + 2]
            t = a.new_zeros((*x.shape[:-1], W.shape[0]))
            t = t if ta is None else t + ta @ W.mT
            t = t if tW is None else t + a @ tW.mT
            t = t if tb is None else t + tb
            ta = t
            if index < len(s):
                a = _activated(s[index], ctx.activation, ctx.parameters)
                ta = _pulled(t, s[index], ctx.activation, ctx.parameters)
                kept.append(ta if _kept(ctx.activation, ctx.parameters) == "a" else t)
        assert ta is not None
        return (ta,) if ctx.recompute else (ta, *kept)


def _forward(
    x: Tensor, activation: str, parameters: tuple[float, ...], layers: Sequence[Tensor | None], store: str
) -> tuple[Tensor, ...]:
    """y, and z or a of each hidden layer (neither for "")."""
    Ws, bs = _tensors(layers[::2]), layers[1::2]
    triton = plain_kernels(x, *layers)
    if triton is not None and triton.mlp.fits(x, Ws):
        results: tuple[Tensor, ...] = triton.mlp.forward(x, Ws, bs, activation, parameters, store)
        return results
    kept = []
    for W, b in zip(Ws[:-1], bs, strict=False):
        output = DenseFunction.forward(x, W, b, None, None, 0.0, activation, parameters)
        x, s = output if isinstance(output, tuple) else (output, output)
        kept.append(s)
    y = DenseFunction.forward(x, Ws[-1], bs[-1], None, None, 0.0, "identity", ())
    assert isinstance(y, Tensor)
    return (y, *kept) if store else (y,)


def _kept(activation: str, parameters: tuple[float, ...]) -> str:
    """What f′ is computed from: ``z`` or ``a``."""
    return "z" if activation != "identity" and lookup(activation, parameters, fused=True).saves == "input" else "a"


def _saved(ctx: Any) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """x, the layers and s, computed again where it was not kept."""
    x, *rest = ctx.saved_tensors
    count = len(ctx.needs_input_grad) - 4
    layers, s = tuple(rest[:count]), tuple(rest[count:])
    if ctx.recompute:
        s = _forward(x, ctx.activation, ctx.parameters, layers, _kept(ctx.activation, ctx.parameters))[1:]
    return x, layers, s


def _activated(s: Tensor, activation: str, parameters: tuple[float, ...]) -> Tensor:
    """a from s."""
    if _kept(activation, parameters) == "a":
        return s
    if is_plain(s):
        return ActivationFunction.forward(s, activation, parameters)
    a: Tensor = call(ActivationFunction, s, activation, parameters)
    return a


def _pulled(da: Tensor, s: Tensor, activation: str, parameters: tuple[float, ...]) -> Tensor:
    """da ⊙ f′."""
    return da if activation == "identity" else activation_backward(da, s, activation, parameters)


def _below(
    da: Tensor | None, ds: Tensor | None, s: Tensor, activation: str, parameters: tuple[float, ...]
) -> Tensor | None:
    """dz of a hidden layer, from the gradients of its activation and of its saved output."""
    if _kept(activation, parameters) == "a":
        da = ds if da is None else da if ds is None else da + ds
        return None if da is None else _pulled(da, s, activation, parameters)
    dz = None if da is None else _pulled(da, s, activation, parameters)
    return ds if dz is None else dz if ds is None else dz + ds


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _tensors(given: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in given if t is not None]
