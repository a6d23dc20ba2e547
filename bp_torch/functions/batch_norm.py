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
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import plain_kernels
from .activation import activate, activation_backward, lookup
from .dropout import drop, may_draw
from .function import Function, call, is_plain

__all__ = ["AllReduceFunction", "BatchNormFunction", "NormalizeFunction", "SyncStatisticsFunction"]

aten = torch.ops.aten


def _wide(t: Tensor) -> Tensor:
    """16-bit tensors in float32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _count(x: Tensor) -> int:
    """n, the number of values a channel, and 1 where there is none, so that sums may be divided by it."""
    return max(x.shape[0] * x.shape[2:].numel(), 1)


def _channel(t: Tensor, x: Tensor) -> Tensor:
    """(C) → (1, C, 1, ...), which broadcasts to x."""
    return t.reshape(1, x.shape[1], *[1] * (x.dim() - 2))


def _scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """γ s."""
    s = torch.rsqrt(var + eps)
    return s if gamma is None else gamma * s


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and biased var, in one pass by Welford's method; zeros for an empty batch."""
    x = _wide(x)
    if x.numel() == 0:
        return x.sum(_dims(x)), x.square().sum(_dims(x))
    var, mean = torch.var_mean(x, _dims(x), correction=0)
    return mean, var


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
    if _fused(x):
        z, _, _ = aten.native_batch_norm(_wide(x), *_native(gamma, beta, mean, var), False, 0.0, eps)
        return _add(z, residual)
    z = (x - _channel(_wide(mean), x)) * _channel(_scale(gamma, _wide(var), eps), x)
    z = z if beta is None else z + _channel(beta, x)
    return z if residual is None else z + residual


def _activate(z: Tensor, activation: str, parameters: tuple[float, ...]) -> Tensor:
    if activation == "identity":
        return z
    if activation == "relu" and _fused(z):
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


# While no graph is recorded, ATen's CPU kernels do several of the passes below in one.

CHUNK = 2**18
"""Elements that one step of a pass takes: what it computes on the way stays in a core's cache."""


def _fused(x: Tensor, dz: Tensor | None = None) -> bool:
    return (
        x.device.type == "cpu"
        and is_plain(x, dz)
        and x.numel() > 0
        and (dz is None or dz.dtype == torch.promote_types(x.dtype, torch.float32))
    )


def _native(*parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else _wide(p) for p in parameters]


def _fused_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean, var.

    ATen adds up a contiguous plane in float64, but rows one by one in their own dtype: at a mean of 1e5 and a deviation
    of 1 its variance was 130 for NHWC float32 data, 850 for (65536, 8). Where that may have cost more than rounding,
    the statistics are taken again.
    """
    x = _wide(x)
    n, channels = _count(x), x.shape[1]
    if n > 1:
        mean, var = x.new_zeros(channels), x.new_zeros(channels)
        z, _, _ = aten.native_batch_norm.default(x, *_native(gamma, beta), mean, var, True, 1.0, eps)
        exact = x.shape[2:].numel() > 1 and x.is_contiguous()
        if not exact:
            # n additions about a mean of k deviations lose about 2⁻²⁶ k √n of one: up to 1e-5 here, that is k² ≤ most.
            most = (2**26 * 1e-5) ** 2 / n
            exact = float(mean.square().sub_(var, alpha=most).amax()) <= 0
        if exact:  # var moved from 0 by its whole way to the unbiased variance
            return _add(z, residual), mean, var.mul_((n - 1) / n)
    return _accurate_forward(x, gamma, beta, residual, eps)


def _accurate_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean, var, whatever the mean.

    ATen returns the variance about its own mean m, var + (mean - m)². A small excess is subtracted, and with a large
    one the statistics are those of x - mean.
    """
    m, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    mean = x.mean(_dims(x))
    excess = (mean - m).square_()
    if bool((excess <= 1e-6 * var).all()):
        var = var.sub_(excess)
        z, _, _ = aten.native_batch_norm(x, *_native(gamma, beta), mean, var, False, 0.0, eps)
    else:
        z = x - _channel(mean, x)
        rest, var = torch.batch_norm_update_stats(z, None, None, 0.0)
        z, _, _ = aten.native_batch_norm(z, *_native(gamma, beta), rest, var, False, 0.0, eps)
        mean = torch.where(mean.isfinite(), mean + rest, mean)  # an infinity stays one
    return _add(z, residual), mean, var


def _add(z: Tensor, residual: Tensor | None) -> Tensor:
    """z + r, in z where it fits."""
    if residual is None:
        return z
    return z.add_(residual) if z.dtype == torch.promote_types(z.dtype, residual.dtype) else z + residual


def _fused_backward(
    ctx: Any, dz: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, var: Tensor, training: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dγ, dβ."""
    s = torch.rsqrt(var + ctx.eps) if training else None
    statistics = (mean, var, None, None) if s is None else (None, None, mean, s)
    needs = list(ctx.needs_input_grad[:3])
    # Whether dz was made here, and is nobody's gradient.
    ours = (ctx.activation != "identity" or ctx.p > 0) and ctx.dtypes[3] is None
    if s is None or not (ours and needs[0] and x.numel() > CHUNK and x.dtype == dz.dtype):
        return aten.native_batch_norm_backward.default(
            dz, _wide(x), *_native(gamma, *statistics), training, ctx.eps, needs
        )
    # A new tensor costs more than the arithmetic: dx is written into dz.
    _, dgamma, dbeta = aten.native_batch_norm_backward.default(
        dz, x, *_native(gamma, *statistics), training, ctx.eps, [False, True, True]
    )
    n = _count(x)
    k = s if gamma is None else gamma * s
    mean, k, of_xhat, shift = (_channel(t, x) for t in (mean, k, k * s * dgamma / -n, k * dbeta / -n))
    step = max(1, CHUNK * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], step):
        i = slice(start, start + step)
        torch.addcmul(shift, dz[i], k, out=dz[i])
        dz[i].addcmul_(x[i] - mean, of_xhat)
    return dz, dgamma if needs[1] else None, dbeta if needs[2] else None


def _dz(ctx: Any, dy: Tensor, *saved: Any) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z), wide."""
    dy = _wide(dy)
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
    return activation != "identity" and lookup(activation, parameters).saves == "output"


def _save(
    ctx: Any, x: Tensor, mean: Tensor, var: Tensor, y: Tensor, mask: Tensor | None, *others: Tensor | None
) -> None:
    """x, γ, β, r, mean, var, y, m for backward and jvp_rule: only those that they read."""
    gamma, beta, residual = others
    identity = ctx.activation == "identity"
    by_output = _by_output(ctx.activation, ctx.parameters)
    if mask is not None:  # without it y no longer tells f′, unless it tells both
        by_output = by_output and lookup(ctx.activation, ctx.parameters).gate
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
    ctx.save_for_forward(
        x, gamma, beta if again else None, residual if again else None, mean, var, y if by_output else None, mask
    )


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
        if _fused(x):
            z, mean, var = _fused_forward(x, gamma, beta, residual, eps)
        else:
            mean, var = _statistics(x)
            z = _pre_activation(x, gamma, beta, residual, mean, var, eps)
        return _output(x, z, residual, mask, p, activation, parameters), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, residual, mask, ctx.p, ctx.eps, ctx.activation, ctx.parameters = inputs
        y, mean, var = output
        ctx.set_materialize_grads(False)
        _save(ctx, x, mean, var, y, mask, gamma, beta, residual)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        saved = x, gamma, _, _, mean, var, _, mask = ctx.saved_tensors
        if x is None:  # β and r alone need a gradient
            dz = None if dy is None else _dz(ctx, dy, *saved)
            dbeta = None if dz is None or not ctx.needs_input_grad[2] else dz.sum(_dims(dz))
            return *_results(ctx, None, None, dbeta, dz), None, None, None, None, None
        if dy is not None and (triton := _triton(x, mask, dy, dmean, dvar, *saved[1:-1])) is not None:
            da = drop(dy, mask, ctx.p)
            gradients = triton.batch_norm.backward(da, dmean, dvar, *_triton_arguments(ctx, *saved))
            return *gradients, None, None, None, None, None
        dz = torch.zeros_like(_wide(x)) if dy is None else _dz(ctx, dy, *saved)
        if _fused(x, dz) and dmean is None and dvar is None:
            dx, dgamma, dbeta = _fused_backward(ctx, dz, x, gamma, mean, var, training=True)
        else:
            dx, dgamma, dbeta = _gradients(ctx, dz, x, gamma, mean, var)
            n = _count(x)
            if ctx.needs_input_grad[0]:
                k = _scale(gamma, var, ctx.eps) / n
                xhat = (x - _channel(mean, x)) * _channel(torch.rsqrt(var + ctx.eps), x)
                dx = dx - _channel(k * dbeta, x) - xhat * _channel(k * dgamma, x)
                dx = dx if dmean is None else dx + _channel(dmean / n, x)
                dx = dx if dvar is None else dx + (x - _channel(mean, x)) * _channel(2 * dvar / n, x)
        return *_results(ctx, dx, dgamma, dbeta, dz), None, None, None, None, None

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tgamma: Tensor | None, tbeta: Tensor | None, tr: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, _, _, _, mean, var, _, _ = ctx.saved_tensors
        tmean = tvar = torch.zeros_like(mean)
        if tx is not None:
            n = _count(x)
            tmean = _wide(tx).sum(_dims(x)) / n
            tvar = 2 * ((x - _channel(mean, x)) * tx).sum(_dims(x)) / n
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
            dbeta = dz.sum(_dims(dz)) if ctx.needs_input_grad[2] else None
        else:
            need_statistics = any(ctx.needs_input_grad[4:6])
            if _fused(x, dz) and not need_statistics:
                dx, dgamma, dbeta = _fused_backward(ctx, dz, x, gamma, mean, var, training=False)
            else:
                dx, dgamma, dbeta = _gradients(ctx, dz, x, gamma, _wide(mean), _wide(var))
            if need_statistics:
                k = _scale(gamma, _wide(var), ctx.eps)
                dmean, dvar = -k * dbeta, -k * torch.rsqrt(_wide(var) + ctx.eps) * dgamma / 2
        return *_results(ctx, dx, dgamma, dbeta, dz, dmean, dvar), None, None, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _push(ctx, *tangents[:6])


def _gradients(
    ctx: Any, dz: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx through x alone, Σ dz x̂ and Σ dz."""
    dbeta = dz.sum(_dims(x))
    dgamma = ((x - _channel(mean, x)) * dz).sum(_dims(x)) * torch.rsqrt(var + ctx.eps)
    return dz * _channel(_scale(gamma, var, ctx.eps), x), dgamma, dbeta


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
    mean, var = _wide(mean), _wide(var)
    k, s = _channel(_scale(gamma, var, ctx.eps), x), torch.rsqrt(var + ctx.eps)
    xhat = (x - _channel(mean, x)) * _channel(s, x)
    tz = torch.zeros_like(xhat)
    tz = tz if tx is None else tz + k * tx
    tz = tz if tmean is None else tz - k * _channel(tmean, x)
    tz = tz if tvar is None else tz - k * xhat * _channel(s * tvar / 2, x)
    tz = tz if tgamma is None else tz + xhat * _channel(tgamma, x)
    tz = tz if tbeta is None else tz + _channel(tbeta, x)
    tz = tz if tr is None else tz + tr
    dtype = x.dtype if ctx.dtypes[3] is None else torch.promote_types(x.dtype, ctx.dtypes[3])
    if ctx.activation == "identity":
        return drop(tz, mask, ctx.p).to(dtype)
    s = _f_prime_from(ctx, x, gamma, beta, residual, mean, var, y, mask)
    return activation_backward(tz, s, ctx.activation, ctx.parameters, mask, ctx.p).to(dtype)


class AllReduceFunction(Function):
    """t = Σ over the group's ranks of their t.

    Backward: dt = Σ over ranks of their dt, for the sum of all ranks' losses.
    """

    @staticmethod
    def forward(t: Tensor, group: Any) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor | None, ...]:
        return call(AllReduceFunction, dt, ctx.group), None

    @staticmethod
    def jvp_rule(ctx: Any, tt: Tensor, *_: None) -> Tensor:
        return call(AllReduceFunction, tt, ctx.group)


class SyncStatisticsFunction(Function):
    """mean, var and count n of a channel over all rows of all ranks; a rank may have none.

    Each rank's own statistics merge by the formula of Chan, Golub and LeVeque (1979, STAN-CS-79-773), in float64:
    mean = Σ nᵣ meanᵣ / n and var = Σ nᵣ (varᵣ + (meanᵣ - mean)²) / n.

    Backward: with dmean and dvar summed over ranks, dx = (dmean + 2 (x - mean) dvar)/n.
    """

    @staticmethod
    def forward(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        triton = _triton(x, None)
        if triton is not None:
            mean, rest, var = triton.batch_norm.statistics(x)
        else:
            mean = _wide(x).sum(_dims(x)) / _count(x)
            z = x - _channel(mean, x)  # its own mean is what rounding lost
            rest, var = torch.batch_norm_update_stats(z, None, None, 0.0) if _fused(z) else _statistics(z)
        rows = torch.full_like(mean, x.shape[0] * x.shape[2:].numel())
        own = torch.stack([mean.double() + rest, var.double(), rows.double()])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        means, variances, counts = torch.stack(parts, dim=1)
        count = counts.sum(0)
        n = count.clamp(min=1)
        total_mean = (counts * means).sum(0) / n
        total_var = (counts * (variances + (means - total_mean) ** 2)).sum(0) / n
        return total_mean.to(mean.dtype), total_var.to(var.dtype), count[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.group = inputs
        mean, _, count = output
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, mean, count)
        ctx.save_for_forward(x, mean, count)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, mean, count = ctx.saved_tensors
        dmean, dvar = call(AllReduceFunction, torch.stack([dmean, dvar]), ctx.group) / count.to(mean.dtype)
        dx = _channel(dmean, x) + (x - _channel(mean, x)) * _channel(2 * dvar, x)
        return dx.to(x.dtype), None

    @staticmethod
    def jvp_rule(ctx: Any, tx: Tensor, *_: None) -> tuple[Tensor, Tensor, None]:
        x, mean, count = ctx.saved_tensors
        own = torch.stack([_wide(tx).sum(_dims(x)), 2 * ((x - _channel(mean, x)) * tx).sum(_dims(x))])
        tmean, tvar = call(AllReduceFunction, own, ctx.group) / count.to(mean.dtype)
        return tmean, tvar, None
