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

The statistics of several processes are in sync_batch_norm.py, faster ways in aten/batch_norm.py and gpu/batch_norm.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mode import wide
from .channels import channel, count_of, dims_of, statistics_of
from .epilogue import Epilogue
from .function import Function

__all__ = ["BatchNormFunction", "NormalizeFunction", "Saved", "gradients_of", "normalize", "result_dtype"]


class Saved(NamedTuple):
    """The tensors that backward reads, None where it reads them not: y where it tells f′, else z is computed again."""

    x: Any
    gamma: Any
    beta: Any
    r: Any
    mean: Any
    var: Any
    y: Any
    m: Any


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
        r: Tensor | None,
        m: Tensor | None,
        eps: float,
        e: Epilogue,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = statistics_of(x)
        y, _ = e.forward(normalize(x, gamma, beta, r, mean, var, eps), m)
        return y.to(result_dtype(x, r)), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, r, m, ctx.eps, ctx.e = inputs
        y, mean, var = output
        ctx.set_materialize_grads(False)
        _save(ctx, Saved(x, gamma, beta, r, mean, var, y, m))

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, r, m, *_ = inputs
        y, mean, var = output
        _save_for_jvp(ctx, Saved(x, gamma, beta, r, mean, var, y, m))

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, gamma, _, _, mean, var, *_ = saved = Saved(*ctx.saved_tensors)
        if x is None:  # β and r alone need a gradient
            return *_without_statistics(ctx, dy, saved), None, None, None
        dz = torch.zeros_like(wide(x)) if dy is None else _dz(ctx, dy, saved)
        dx, dgamma, dbeta = _gradients(ctx, dz, x, gamma, mean, var)
        n = count_of(x)
        if ctx.needs_input_grad[0]:
            k = _scale(gamma, var, ctx.eps) / n
            xhat = (x - channel(mean, x)) * channel(torch.rsqrt(var + ctx.eps), x)
            dx = dx - channel(k * dbeta, x) - xhat * channel(k * dgamma, x)
            dx = dx if dmean is None else dx + channel(dmean / n, x)
            dx = dx if dvar is None else dx + (x - channel(mean, x)) * channel(2 * dvar / n, x)
        return *gradients_of(ctx, dx, dgamma, dbeta, dz), None, None, None

    @staticmethod
    def jvp_rule(
        ctx: Any, tx: Tensor | None, tgamma: Tensor | None, tbeta: Tensor | None, tr: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        saved = Saved(*ctx.saved_tensors)
        x, mean = saved.x, saved.mean
        tmean = tvar = torch.zeros_like(mean)
        if tx is not None:
            n = count_of(x)
            tmean = wide(tx).sum(dims_of(x)) / n
            tvar = 2 * ((x - channel(mean, x)) * tx).sum(dims_of(x)) / n
        return _push(ctx, saved, tx, tgamma, tbeta, tr, tmean, tvar), tmean, tvar


class NormalizeFunction(Function):
    """y = dropout(f(γ x̂ + β + r)) by statistics that are given, and differentiable too.

    Shapes: x, r, m and y (N, C, ...); γ, β, mean and var (C). γ, β, r and m may be None.
    """

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        r: Tensor | None,
        mean: Tensor,
        var: Tensor,
        m: Tensor | None,
        eps: float,
        e: Epilogue,
    ) -> Tensor:
        y, _ = e.forward(normalize(x, gamma, beta, r, mean, var, eps), m)
        return y.to(result_dtype(x, r))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, beta, r, mean, var, m, ctx.eps, ctx.e = inputs
        _save(ctx, Saved(x, gamma, beta, r, mean, var, output, m))

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, beta, r, mean, var, m, *_ = inputs
        _save_for_jvp(ctx, Saved(x, gamma, beta, r, mean, var, output, m))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, _, _, mean, var, *_ = saved = Saved(*ctx.saved_tensors)
        if x is None:
            return *_without_statistics(ctx, dy, saved), None, None, None, None, None
        dz, mean, var = _dz(ctx, dy, saved), wide(mean), wide(var)
        dx, dgamma, dbeta = _gradients(ctx, dz, x, gamma, mean, var)
        dmean = dvar = None
        if any(ctx.needs_input_grad[4:6]):
            k = _scale(gamma, var, ctx.eps)
            dmean, dvar = -k * dbeta, -k * torch.rsqrt(var + ctx.eps) * dgamma / 2
        return *gradients_of(ctx, dx, dgamma, dbeta, dz, dmean, dvar), None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _push(ctx, Saved(*ctx.saved_tensors), *tangents[:6])


def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    r: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """z = γ x̂ + β + r, of a dtype that is wide."""
    z = (x - channel(wide(mean), x)) * channel(_scale(gamma, wide(var), eps), x)
    z = z if beta is None else z + channel(beta, x)
    return z if r is None else z + r


def result_dtype(x: Tensor, r: Tensor | None) -> torch.dtype:
    return x.dtype if r is None else torch.promote_types(x.dtype, r.dtype)


def gradients_of(ctx: Any, *gradients: Tensor | None) -> list[Tensor | None]:
    """Those that are needed, each in its input's dtype."""
    return [
        None if g is None or not need else g if g.dtype == dtype else g.to(dtype)
        for g, need, dtype in zip(gradients, ctx.needs_input_grad, ctx.dtypes, strict=False)
    ]


def _scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """γ s."""
    s = torch.rsqrt(var + eps)
    return s if gamma is None else gamma * s


def _gradients(
    ctx: Any, dz: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx through x alone, Σ dz x̂ and Σ dz."""
    dbeta = dz.sum(dims_of(x))
    dgamma = ((x - channel(mean, x)) * dz).sum(dims_of(x)) * torch.rsqrt(var + ctx.eps)
    return dz * channel(_scale(gamma, var, ctx.eps), x), dgamma, dbeta


def _without_statistics(ctx: Any, dy: Tensor | None, saved: Saved) -> list[Tensor | None]:
    """dβ and dr, where nothing else needs a gradient."""
    dz = None if dy is None else _dz(ctx, dy, saved)
    dbeta = None if dz is None or not ctx.needs_input_grad[2] else dz.sum(dims_of(dz))
    return gradients_of(ctx, None, None, dbeta, dz)


def _dz(ctx: Any, dy: Tensor, saved: Saved) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z), wide."""
    dy, s = wide(dy), _f_prime_from(ctx, saved)
    dz: Tensor = ctx.e.backward(dy, s if s is None else s.to(dy.dtype), saved.m)
    return dz


def _f_prime_from(ctx: Any, saved: Saved) -> Tensor | None:
    """What f′ is computed from: y, or z or f(z) computed again."""
    if saved.y is not None or not ctx.e.told_by:
        return saved.y
    z = normalize(*saved[:6], ctx.eps)
    return ctx.e.activate(z) if ctx.e.told_by == "a" else z


def _save(ctx: Any, of: Saved) -> None:
    """For backward: only what it reads."""
    kept = ctx.e.keeps(of.m)
    ctx.gated = kept == "y" and of.m is not None  # y tells the mask as well
    again = kept in ("z", "a")
    statistics = again or any(ctx.needs_input_grad[i] for i in (0, 1, 4, 5))
    ctx.dtypes = [None if t is None else t.dtype for t in of[:6]]
    ctx.save_for_backward(
        *Saved(
            x=of.x if statistics else None,
            gamma=of.gamma if statistics else None,
            beta=of.beta if again or (kept == "y" and of.r is None) else None,
            r=of.r if again else None,
            mean=of.mean if statistics else None,
            var=of.var if statistics else None,
            y=of.y if kept == "y" else None,
            m=None if ctx.gated else of.m,
        )
    )


def _save_for_jvp(ctx: Any, of: Saved) -> None:
    """The same for jvp_rule, which reads x and the statistics always."""
    kept = ctx.e.keeps(of.m)
    of = of._replace(y=of.y if kept == "y" else None, m=None if ctx.gated else of.m)
    ctx.save_for_forward(*(of if kept in ("z", "a") else of._replace(beta=None, r=None)))


def _push(
    ctx: Any,
    saved: Saved,
    tx: Tensor | None,
    tgamma: Tensor | None,
    tbeta: Tensor | None,
    tr: Tensor | None,
    tmean: Tensor | None,
    tvar: Tensor | None,
) -> Tensor:
    """The tangent of y."""
    x, gamma = saved.x, saved.gamma
    mean, var = wide(saved.mean), wide(saved.var)
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
    return ctx.e.backward(tz, _f_prime_from(ctx, saved), saved.m).to(dtype)
