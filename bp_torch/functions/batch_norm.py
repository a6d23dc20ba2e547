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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..mode import wide
from .channels import channel, count_of, dims_of, statistics_of
from .epilogue import Epilogue
from .function import Function

__all__ = ["BatchNormFunction", "NormalizeFunction", "Saved", "needed", "normalize", "result_dtype"]


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

    def normalized(self, eps: float) -> Tensor:
        """z, again."""
        return normalize(self.x, self.gamma, self.beta, self.r, self.mean, self.var, eps)

    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Of the inputs, in the order of their gradients."""
        inputs = (self.x, self.gamma, self.beta, self.r, self.mean, self.var)
        return tuple(None if t is None else t.dtype for t in inputs)

    def told_by_y(self, e: Epilogue) -> bool:
        """Whether y tells f′, and the mask as well if there is one."""
        return e.keeps(self.m) == "y"

    def needed(self, e: Epilogue, needs: Sequence[bool]) -> Saved:
        """Only what backward reads, for inputs whose gradients are needed or not."""
        by_y = self.told_by_y(e)
        again = bool(e.told_by) and not by_y
        statistics = again or any(needs[i] for i in (0, 1, 4, 5))
        return Saved(
            x=self.x if statistics else None,
            gamma=self.gamma if statistics else None,
            beta=self.beta if again or (by_y and self.r is None) else None,
            r=self.r if again else None,
            mean=self.mean if statistics else None,
            var=self.var if statistics else None,
            y=self.y if by_y else None,
            m=None if by_y else self.m,
        )

    def needed_forward(self, e: Epilogue) -> Saved:
        """Only what forward mode reads: x and the statistics always."""
        if self.told_by_y(e):
            return self._replace(beta=None, r=None, m=None)
        return self._replace(y=None) if e.told_by else self._replace(beta=None, r=None, y=None)


class BatchNormFunction(Function):
    """y = dropout(f(γ x̂ + β + r)) by the statistics of the batch; ``forward`` returns (y, mean, var).

    All three are differentiable. Shapes: x, r, m and y (N, C, ...); γ, β, mean and var (C). γ, β, r and m may be None.
    var is the biased one, over n.

    Saves x, and never the pre-activation: z is computed again, elementwise, where f′ is not told by y. After relu y
    tells f′ and the mask, so that neither is kept; with other activations the mask is.
    """

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, m: Tensor | None,
        eps: float, e: Epilogue,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mean, var = statistics_of(x)
        y, _ = e.forward(normalize(x, gamma, beta, r, mean, var, eps), m)
        return y.to(result_dtype(x, r)), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, r, m, ctx.eps, ctx.e = inputs
        y, mean, var = output
        ctx.set_materialize_grads(False)
        of = Saved(x, gamma, beta, r, mean, var, y, m)
        ctx.dtypes = of.dtypes()
        ctx.save_for_backward(*of.needed(ctx.e, ctx.needs_input_grad))

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, beta, r, m, *_ = inputs
        y, mean, var = output
        ctx.save_for_forward(*Saved(x, gamma, beta, r, mean, var, y, m).needed_forward(ctx.e))

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None = None, dvar: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, gamma, _, _, mean, var, *_ = saved = Saved(*ctx.saved_tensors)
        dz = None if dy is None else _dz(ctx.e, ctx.eps, dy, saved)
        dx = dgamma = dbeta = None
        if x is None:  # β and r alone need a gradient
            dbeta = None if dz is None else dz.sum(dims_of(dz))
        else:
            dz = torch.zeros_like(wide(x)) if dz is None else dz
            n, s, k = count_of(x), torch.rsqrt(var + ctx.eps), _scale(gamma, var, ctx.eps)
            dx, dgamma, dbeta = _through_x(dz, x, mean, s, k)
            if ctx.needs_input_grad[0]:
                xhat = (x - channel(mean, x)) * channel(s, x)
                dx = dx - channel(k / n * dbeta, x) - xhat * channel(k / n * dgamma, x)
                dx = dx if dmean is None else dx + channel(dmean / n, x)
                dx = dx if dvar is None else dx + (x - channel(mean, x)) * channel(2 * dvar / n, x)
        return *needed(ctx.needs_input_grad, ctx.dtypes, dx, dgamma, dbeta, dz), None, None, None

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
        ty = _push(ctx.e, ctx.eps, ctx.dtypes[3], saved, tx, tgamma, tbeta, tr, tmean, tvar)
        return ty, tmean, tvar


class NormalizeFunction(Function):
    """y = dropout(f(γ x̂ + β + r)) by statistics that are given, and differentiable too.

    Shapes: x, r, m and y (N, C, ...); γ, β, mean and var (C). γ, β, r and m may be None.
    """

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, mean: Tensor, var: Tensor,
        m: Tensor | None, eps: float, e: Epilogue,
    ) -> Tensor:  # fmt: skip
        y, _ = e.forward(normalize(x, gamma, beta, r, mean, var, eps), m)
        return y.to(result_dtype(x, r))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, beta, r, mean, var, m, ctx.eps, ctx.e = inputs
        of = Saved(x, gamma, beta, r, mean, var, output, m)
        ctx.dtypes = of.dtypes()
        ctx.save_for_backward(*of.needed(ctx.e, ctx.needs_input_grad))

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gamma, beta, r, mean, var, m, *_ = inputs
        ctx.save_for_forward(*Saved(x, gamma, beta, r, mean, var, output, m).needed_forward(ctx.e))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, _, _, mean, var, *_ = saved = Saved(*ctx.saved_tensors)
        dz = _dz(ctx.e, ctx.eps, dy, saved)
        dx = dgamma = dbeta = dmean = dvar = None
        if x is None:  # β and r alone need a gradient
            dbeta = dz.sum(dims_of(dz))
        else:
            s, k = torch.rsqrt(wide(var) + ctx.eps), _scale(gamma, wide(var), ctx.eps)
            dx, dgamma, dbeta = _through_x(dz, x, wide(mean), s, k)
            if any(ctx.needs_input_grad[4:6]):
                dmean, dvar = -k * dbeta, -k * s * dgamma / 2
        return *needed(ctx.needs_input_grad, ctx.dtypes, dx, dgamma, dbeta, dz, dmean, dvar), None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _push(ctx.e, ctx.eps, ctx.dtypes[3], Saved(*ctx.saved_tensors), *tangents[:6])


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, mean: Tensor, var: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """z = γ x̂ + β + r, of a dtype that is wide."""
    z = (x - channel(wide(mean), x)) * channel(_scale(gamma, wide(var), eps), x)
    z = z if beta is None else z + channel(beta, x)
    return z if r is None else z + r


def result_dtype(x: Tensor, r: Tensor | None) -> torch.dtype:
    return x.dtype if r is None else torch.promote_types(x.dtype, r.dtype)


def needed(
    needs: Sequence[bool], dtypes: Sequence[torch.dtype | None], *gradients: Tensor | None
) -> list[Tensor | None]:
    """Those gradients that are needed, each in its input's dtype."""
    return [
        None if g is None or not need else g if g.dtype == dtype else g.to(dtype)
        for g, need, dtype in zip(gradients, needs, dtypes, strict=False)
    ]


def _scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """γ s."""
    s = torch.rsqrt(var + eps)
    return s if gamma is None else gamma * s


def _through_x(dz: Tensor, x: Tensor, mean: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx through x alone, Σ dz x̂ and Σ dz; k = γ s."""
    dbeta = dz.sum(dims_of(x))
    dgamma = ((x - channel(mean, x)) * dz).sum(dims_of(x)) * s
    return dz * channel(k, x), dgamma, dbeta


def _dz(e: Epilogue, eps: float, dy: Tensor, saved: Saved) -> Tensor:
    """m ⊙ dy / (1 - p) ⊙ f′(z), wide."""
    dy, s = wide(dy), _f_prime_from(e, eps, saved)
    return e.backward(dy, s if s is None else s.to(dy.dtype), saved.m)


def _f_prime_from(e: Epilogue, eps: float, saved: Saved) -> Tensor | None:
    """What f′ is computed from: y, or z or f(z) computed again."""
    if saved.y is not None or not e.told_by:
        y: Tensor | None = saved.y
        return y
    z = saved.normalized(eps)
    return e.activate(z) if e.told_by == "a" else z


def _push(
    e: Epilogue,
    eps: float,
    r_dtype: torch.dtype | None,
    saved: Saved,
    tx: Tensor | None,
    tgamma: Tensor | None,
    tbeta: Tensor | None,
    tr: Tensor | None,
    tmean: Tensor | None,
    tvar: Tensor | None,
) -> Tensor:
    """The tangent of y."""
    x, mean, var = saved.x, wide(saved.mean), wide(saved.var)
    k, s = channel(_scale(saved.gamma, var, eps), x), torch.rsqrt(var + eps)
    xhat = (x - channel(mean, x)) * channel(s, x)
    tz = torch.zeros_like(xhat)
    tz = tz if tx is None else tz + k * tx
    tz = tz if tmean is None else tz - k * channel(tmean, x)
    tz = tz if tvar is None else tz - k * xhat * channel(s * tvar / 2, x)
    tz = tz if tgamma is None else tz + xhat * channel(tgamma, x)
    tz = tz if tbeta is None else tz + channel(tbeta, x)
    tz = tz if tr is None else tz + tr
    dtype = x.dtype if r_dtype is None else torch.promote_types(x.dtype, r_dtype)
    return e.backward(tz, _f_prime_from(e, eps, saved), saved.m).to(dtype)
