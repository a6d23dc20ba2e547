"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167), with what usually follows it.

    forward    mean = Σ x / n,  var = Σ (x - mean)² / n      over all dimensions but 1: n values a channel
               x̂ = (x - mean) s,  s = 1/√(var + eps)
               z = γ x̂ + β + r
               a = f(z)
               y = m ⊙ a / (1 - p)
    backward   dz = m ⊙ dy / (1 - p) ⊙ f′(z)
               dβ = Σ dz
               dγ = Σ dz x̂
               dr = dz
               dx = γ s (dz - dβ/n - x̂ dγ/n) + (dmean + 2 (x - mean) dvar)/n

With statistics that are given (in evaluation, or those of several processes) the terms through them are theirs:

    backward   dx = γ s dz,  dmean = -γ s dβ,  dvar = -γ s² dγ/2

16-bit inputs are summed and normalized in float32, and their statistics are float32.

The statistics of several processes are in sync_batch_norm.py, the faster way on the CPU in batch_norm_cpu.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import plain_kernels
from .activation import activate, activation_backward, lookup
from .batch_norm_cpu import fused_backward, fused_forward, fused_normalize, is_fused
from .channels import channel, count_of, dims_of, statistics_of
from .dropout import drop, may_draw
from .function import Function, wide

__all__ = ["BatchNormFunction", "NormalizeFunction"]


def _scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """γ s."""
    s = torch.rsqrt(var + eps)
    return s if gamma is None else gamma * s


def _pre_activation(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """z, of a dtype that is wide."""
    if is_fused(x):
        return fused_normalize(x, gamma, beta, residual, mean, var, eps)
    z = (x - channel(wide(mean), x)) * channel(_scale(gamma, wide(var), eps), x)
    z = z if beta is None else z + channel(beta, x)
    return z if residual is None else z + residual


def _activate(z: Tensor, activation: str, parameters: tuple[float, ...]) -> Tensor:
    if activation == "identity":
        return z
    if activation == "relu" and is_fused(z):
        return z.relu_()  # z is ours, and a new tensor costs more than the arithmetic
    return activate(z, activation, parameters)


def _output(
    x: Tensor,
    z: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    p: float,
    activation: str,
    parameters: tuple[float, ...],
) -> Tensor:
    """y, from a z that is ours."""
    return drop(_activate(z, activation, parameters), mask, p).to(_result_dtype(x, residual))


def _result_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _triton(x: Tensor, mask: Tensor | None, *others: Tensor | None) -> ModuleType | None:
    """The Triton kernels, where they shall run. Dropout is a pass of its own there: drawing masks inside the reductions
    made them spill registers.
    """
    return plain_kernels(x, *others) if x.numel() > 0 and may_draw(mask) else None


def _triton_arguments(ctx: Any, *saved: Any) -> tuple[Any, ...]:
    """What the kernels of backward are given after the gradients: y is computed again where that reads less."""
    *inputs, y, _ = saved
    by_output = _by_output(ctx.activation, ctx.parameters)
    y = y if ctx.gated or ctx.dtypes[3] is not None else None
    return *inputs, y, ctx.eps, ctx.activation, ctx.parameters, by_output, ctx.needs_input_grad, ctx.dtypes


def _dz(ctx: Any, dy: Tensor, *saved: Any) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z), wide."""
    dy = wide(dy)
    if ctx.activation == "identity":
        return drop(dy, saved[-1], ctx.p)
    s = _f_prime_from(ctx, *saved)
    return activation_backward(dy, s.to(dy.dtype), ctx.activation, ctx.parameters, saved[-1], ctx.p)


def _f_prime_from(ctx: Any, *saved: Any) -> Tensor:
    """What f′ is computed from: y, or z or f(z) computed again."""
    x, gamma, beta, residual, mean, var, y, _ = saved
    if y is not None:
        kept: Tensor = y
        return kept
    z = _pre_activation(x, gamma, beta, residual, mean, var, ctx.eps)
    by_output = _by_output(ctx.activation, ctx.parameters)
    return _activate(z, ctx.activation, ctx.parameters) if by_output else z


def _by_output(activation: str, parameters: tuple[float, ...]) -> bool:
    """Whether f′ is told by f(z), rather than by z."""
    return activation != "identity" and lookup(activation, parameters, fused=True).saves == "output"


def _save(
    ctx: Any, x: Tensor, mean: Tensor, var: Tensor, y: Tensor, mask: Tensor | None, *others: Tensor | None
) -> None:
    """x, γ, β, r, mean, var, y, m for backward: only those that it reads."""
    gamma, beta, residual = others
    identity = ctx.activation == "identity"
    by_output = _by_output(ctx.activation, ctx.parameters)
    if mask is not None:  # without it y no longer tells f′, unless it tells both
        by_output = by_output and lookup(ctx.activation, ctx.parameters, fused=True).gate
    ctx.gated = by_output and mask is not None
    mask = None if ctx.gated else mask
    again = not identity and not by_output
    statistics = again or any(ctx.needs_input_grad[i] for i in (0, 1, 4, 5))
    ctx.dtypes = [None if t is None else t.dtype for t in (x, gamma, beta, residual, mean, var)]
    ctx.save_for_backward(
        x if statistics else None,
        gamma if statistics else None,
        beta if again or (by_output and residual is None) else None,
        residual if again else None,
        mean if statistics else None,
        var if statistics else None,
        y if by_output else None,
        mask,
    )


def _save_for_jvp(
    ctx: Any, x: Tensor, mean: Tensor, var: Tensor, y: Tensor, mask: Tensor | None, *others: Tensor | None
) -> None:
    """The same for jvp_rule."""
    gamma, beta, residual = others
    by_output = ctx.gated or (mask is None and _by_output(ctx.activation, ctx.parameters))
    if by_output or ctx.activation == "identity":
        beta = residual = None
    ctx.save_for_forward(x, gamma, beta, residual, mean, var, y if by_output else None, None if ctx.gated else mask)


def _results(ctx: Any, *gradients: Tensor | None) -> list[Tensor | None]:
    """The gradients that are needed, each in its input's dtype."""
    return [
        None if g is None or not need else g if g.dtype == dtype else g.to(dtype)
        for g, need, dtype in zip(gradients, ctx.needs_input_grad, ctx.dtypes, strict=False)
    ]


class BatchNormFunction(Function):
    """y = dropout(f(γ x̂ + β + r)) by the statistics of the batch; ``forward`` returns (y, mean, var).

    All three are differentiable. Shapes: x, r, m and y (N, C, ...); γ, β, mean and var (C). γ, β, r and m may be None.
    var is the biased one, over n.

    Saves x, and never the pre-activation: z is computed again, elementwise, where f′ is not told by y. After relu y
    tells f′ and the mask, so that neither is kept; with other activations the mask is.
    """

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        p: float,
        eps: float,
        activation: str,
        parameters: tuple[float, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        triton = _triton(x, mask, gamma, beta, residual)
        if triton is not None:
            a, mean, var = triton.batch_norm.forward(x, gamma, beta, residual, eps, activation, parameters)
            return drop(a, mask, p), mean, var
        if is_fused(x):
            z, mean, var = fused_forward(x, gamma, beta, residual, eps)
        else:
            mean, var = statistics_of(x)
            z = _pre_activation(x, gamma, beta, residual, mean, var, eps)
        return _output(x, z, residual, mask, p, activation, parameters), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, residual, mask, ctx.p, ctx.eps, ctx.activation, ctx.parameters = inputs
        y, mean, var = output
        ctx.set_materialize_grads(False)
        _save(ctx, x, mean, var, y, mask, gamma, beta, residual)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, residual, mask, *_ = inputs
        y, mean, var = output
        _save_for_jvp(ctx, x, mean, var, y, mask, gamma, beta, residual)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        saved = x, gamma, _, _, mean, var, _, mask = ctx.saved_tensors
        if x is None:  # β and r alone need a gradient
            dz = None if dy is None else _dz(ctx, dy, *saved)
            dbeta = None if dz is None or not ctx.needs_input_grad[2] else dz.sum(dims_of(dz))
            return *_results(ctx, None, None, dbeta, dz), None, None, None, None, None
        if dy is not None and (triton := _triton(x, mask, dy, dmean, dvar, *saved[1:-1])) is not None:
            da = drop(dy, mask, ctx.p)
            gradients = triton.batch_norm.backward(da, dmean, dvar, *_triton_arguments(ctx, *saved))
            return *gradients, None, None, None, None, None
        dz = torch.zeros_like(wide(x)) if dy is None else _dz(ctx, dy, *saved)
        if is_fused(x, dz) and dmean is None and dvar is None:
            dx, dgamma, dbeta = fused_backward(ctx, dz, x, gamma, mean, var, training=True)
        else:
            dx, dgamma, dbeta = _gradients(ctx, dz, x, gamma, mean, var)
            n = count_of(x)
            if ctx.needs_input_grad[0]:
                k = _scale(gamma, var, ctx.eps) / n
                xhat = (x - channel(mean, x)) * channel(torch.rsqrt(var + ctx.eps), x)
                dx = dx - channel(k * dbeta, x) - xhat * channel(k * dgamma, x)
                dx = dx if dmean is None else dx + channel(dmean / n, x)
                dx = dx if dvar is None else dx + (x - channel(mean, x)) * channel(2 * dvar / n, x)
        return *_results(ctx, dx, dgamma, dbeta, dz), None, None, None, None, None

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tgamma: Tensor | None, tbeta: Tensor | None, tr: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, _, _, _, mean, var, _, _ = ctx.saved_tensors
        tmean = tvar = torch.zeros_like(mean)
        if tx is not None:
            n = count_of(x)
            tmean = wide(tx).sum(dims_of(x)) / n
            tvar = 2 * ((x - channel(mean, x)) * tx).sum(dims_of(x)) / n
        return _push(ctx, tx, tgamma, tbeta, tr, tmean, tvar), tmean, tvar


class NormalizeFunction(Function):
    """y = dropout(f(γ x̂ + β + r)) by statistics that are given, and differentiable too.

    Shapes: x, r, m and y (N, C, ...); γ, β, mean and var (C). γ, β, r and m may be None.
    """

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        var: Tensor,
        mask: Tensor | None,
        p: float,
        eps: float,
        activation: str,
        parameters: tuple[float, ...],
    ) -> Tensor:
        triton = _triton(x, mask, gamma, beta, residual, mean, var)
        if triton is not None:
            a = triton.batch_norm.apply(x, gamma, beta, residual, mean, var, eps, activation, parameters)
            return drop(a, mask, p)
        z = _pre_activation(x, gamma, beta, residual, mean, var, eps)
        return _output(x, z, residual, mask, p, activation, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, beta, residual, mean, var, mask, ctx.p, ctx.eps, ctx.activation, ctx.parameters = inputs
        _save(ctx, x, mean, var, output, mask, gamma, beta, residual)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, beta, residual, mean, var, mask, *_ = inputs
        _save_for_jvp(ctx, x, mean, var, output, mask, gamma, beta, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = x, gamma, _, _, mean, var, _, mask = ctx.saved_tensors
        triton = None if x is None else _triton(x, mask, dy, *saved[1:-1])
        if triton is not None:
            da = drop(dy, mask, ctx.p)
            gradients = triton.batch_norm.normalize_backward(da, *_triton_arguments(ctx, *saved))
            return *gradients, None, None, None, None, None
        dz = _dz(ctx, dy, *saved)
        dx = dgamma = dbeta = dmean = dvar = None  # type: Any
        if x is None:
            dbeta = dz.sum(dims_of(dz)) if ctx.needs_input_grad[2] else None
        else:
            need_statistics = any(ctx.needs_input_grad[4:6])
            if is_fused(x, dz) and not need_statistics:
                dx, dgamma, dbeta = fused_backward(ctx, dz, x, gamma, mean, var, training=False)
            else:
                dx, dgamma, dbeta = _gradients(ctx, dz, x, gamma, wide(mean), wide(var))
            if need_statistics:
                k = _scale(gamma, wide(var), ctx.eps)
                dmean, dvar = -k * dbeta, -k * torch.rsqrt(wide(var) + ctx.eps) * dgamma / 2
        return *_results(ctx, dx, dgamma, dbeta, dz, dmean, dvar), None, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _push(ctx, *tangents[:6])


def _gradients(
    ctx: Any, dz: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx through x alone, Σ dz x̂ and Σ dz."""
    dbeta = dz.sum(dims_of(x))
    dgamma = ((x - channel(mean, x)) * dz).sum(dims_of(x)) * torch.rsqrt(var + ctx.eps)
    return dz * channel(_scale(gamma, var, ctx.eps), x), dgamma, dbeta


def _push(
    ctx: Any,
    tx: Tensor | None,
    tgamma: Tensor | None,
    tbeta: Tensor | None,
    tr: Tensor | None,
    tmean: Tensor | None,
    tvar: Tensor | None,
) -> Tensor:
    """The tangent of y."""
    x, gamma, beta, residual, mean, var, y, mask = ctx.saved_tensors
    mean, var = wide(mean), wide(var)
    k, s = channel(_scale(gamma, var, ctx.eps), x), torch.rsqrt(var + ctx.eps)
    xhat = (x - channel(mean, x)) * channel(s, x)
    tz = torch.zeros_like(xhat)
    tz = tz if tx is None else tz + k * tx
    tz = tz if tmean is None else tz - k * channel(tmean, x)
    tz = tz if tvar is None else tz - k * xhat * channel(s * tvar / 2, x)
    tz = tz if tgamma is None else tz + xhat * channel(tgamma, x)
    tz = tz if tbeta is None else tz + channel(tbeta, x)
    tz = tz if tr is None else tz + tr
    dtype = x.dtype if ctx.dtypes[3] is None else torch.promote_types(x.dtype, ctx.dtypes[3])
    if ctx.activation == "identity":
        return drop(tz, mask, ctx.p).to(dtype)
    s = _f_prime_from(ctx, x, gamma, beta, residual, mean, var, y, mask)
    return activation_backward(tz, s, ctx.activation, ctx.parameters, mask, ctx.p).to(dtype)
