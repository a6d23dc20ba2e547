"""Functional forms of batch normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import assert_later
from ..functions.batch_norm import BatchNormFunction, NormalizeFunction
from ..functions.dropout import draw_mask
from ..functions.epilogue import Epilogue
from ..functions.function import call
from ..functions.sync_batch_norm import SyncStatisticsFunction
from ..mode import is_exported, is_ordinary
from . import activation as activations
from . import dropout as dropouts
from ._common import check_bool, check_tensor, epilogue_of, overridable

__all__ = ["batch_norm", "batch_norm_act", "sync_batch_norm"]


@overridable(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = γ (x - mean)/√(var + eps) + β, as :func:`torch.nn.functional.batch_norm`.

    Args:
        input: x, (N, C, ...).
        running_mean, running_var: (C), or both None. Evaluation normalizes by them; training moves them in place
            towards the batch's mean and its unbiased variance.
        weight, bias: γ and β, (C), or None.
        training: whether the batch's own statistics are used.
        momentum: how far the running statistics move.
        eps: added to the variance.

    A 16-bit input may have parameters and statistics of its own dtype or of float32; the output has the input's dtype.

    Raises:
        ValueError: one value a channel in training, eps out of range, or one running statistic without the other.
        RuntimeError: sizes, dtypes or devices that do not fit, or no running statistics in evaluation.
    """
    return _batch_norm(
        "batch_norm", input, running_mean, running_var, weight, bias, None, training, momentum, eps, Epilogue(),
        None,
    )  # fmt: skip


def _in_parts(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, training: bool, momentum: float, eps: float, activation: str | None,
    activation_parameters: Mapping[str, float] | None, p: float, generator: torch.Generator | None,
    dropout_training: bool | None,
) -> Tensor:  # fmt: skip
    """:func:`batch_norm_act` as torch's batch norm and what follows it, one by one."""
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    if activation is not None:
        y = activations.activation(y, activation, activation_parameters)
    drops = training if dropout_training is None else dropout_training
    return y if p == 0 else dropouts.dropout(y, p, drops, generator=generator)


@overridable(_in_parts)
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_parameters: Mapping[str, float] | None = None,
    p: float = 0.0,
    generator: torch.Generator | None = None,
    dropout_training: bool | None = None,
) -> Tensor:
    """y = dropout(f(γ (x - mean)/√(var + eps) + β + residual)), in one Function.

    Args:
        residual: added before the activation, of the input's shape, or None.
        activation: f, a key of the activation table; None is the identity.
        activation_parameters: f's parameters that differ from the default, such as ``{"negative_slope": 0.2}``.
        p: the probability that dropout sets an element to zero.
        generator: draws the dropout mask; None is torch's default generator.
        dropout_training: dropout acts only where this is true; None is ``training``. They differ where batch norm
            is frozen and dropout is not, and where evaluation has no running statistics.

    The other arguments and errors are those of :func:`batch_norm`. An unknown activation or parameter and a p outside
    [0, 1] are ValueErrors.
    """
    drops = training if dropout_training is None else dropout_training
    e = epilogue_of("batch_norm_act", activation, activation_parameters, p, drops)
    return _batch_norm(
        "batch_norm_act", input, running_mean, running_var, weight, bias, residual, training, momentum, eps,
        e, generator,
    )  # fmt: skip


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    activation: str | None = None,
    activation_parameters: Mapping[str, float] | None = None,
    p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`batch_norm_act` in training, by the statistics of all rows of all ranks of ``process_group``.

    Every rank of the group must call it, in forward and in backward; ranks may differ in N, and N may be 0. The
    gradients are those of the sum of all ranks' losses. One value a channel over all ranks is a ValueError, and in a
    compiled graph a RuntimeError.
    """
    e = epilogue_of("sync_batch_norm", activation, activation_parameters, p)
    x, gamma, beta = _check("sync_batch_norm", input, running_mean, running_var, weight, bias, residual, True, eps)
    mean, var, count = call(SyncStatisticsFunction, x, process_group)
    message = "sync_batch_norm(): 'input': expected more than 1 value per channel over all ranks, got 1"
    n: int | Tensor = count
    if torch.compiler.is_compiling():
        assert_later(count != 1, message)  # a graph has no numbers to look at
    else:
        n = int(count)
        if n == 1:
            raise ValueError(message)
    _update(running_mean, running_var, mean, var, n, momentum)
    mask = draw_mask(x, p, generator) if p > 0 else None
    return call(NormalizeFunction, x, gamma, beta, residual, mean, var, mask, eps, e)


def _batch_norm(
    function: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    e: Epilogue,
    generator: torch.Generator | None,
) -> Tensor:
    if function == "batch_norm" and _is_nothing(input, running_mean, training):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)  # torch's answer
    x, gamma, beta = _check(function, input, running_mean, running_var, weight, bias, residual, training, eps)
    check_bool(function, "training", training)
    if not hasattr(momentum, "__float__"):
        raise TypeError(f"{function}(): 'momentum': expected a number, got {type(momentum).__name__}")
    if is_exported() and not isinstance(momentum, Tensor):
        # One node, which others know and fold into the layer before it.
        y = F.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, eps)
        y = y if residual is None else y + residual
        y = y if e.name == "identity" else activations._call(e.name, y, *e.parameters)
        return y if e.p == 0 else dropouts.dropout(y, e.p, True, generator=generator)
    if training:
        n = x.shape[0] * x.shape[2:].numel()
        if n == 1:
            raise ValueError(
                f"{function}(): 'input': expected more than 1 value per channel when training, "
                f"got input size {tuple(x.shape)}"
            )
        mask = draw_mask(x, e.p, generator) if e.p > 0 else None
        y, mean, var = call(BatchNormFunction, x, gamma, beta, residual, mask, eps, e)
        _update(running_mean, running_var, mean, var, n, momentum)
        return y
    assert running_mean is not None
    assert running_var is not None
    if torch.is_grad_enabled():
        # A training step between this forward and its backward moves the buffers; the backward must not see that.
        running_mean, running_var = running_mean.clone(), running_var.clone()
    mask = draw_mask(x, e.p, generator) if e.p > 0 else None
    return call(
        NormalizeFunction,
        x,
        gamma,
        beta,
        residual,
        running_mean,
        running_var,
        mask,
        eps,
        e,
    )


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, n: Any, momentum: Any
) -> None:
    """Move the running statistics in place: by ``momentum``, towards mean and the unbiased var · n/(n - 1).

    They stay where they are if n, a number or a tensor, is not above 1.
    """
    if running_mean is None or running_var is None:
        return
    if isinstance(n, Tensor):
        momentum = ((n > 1) * momentum).to(running_mean.dtype)
        unbiased = n / (n - 1).clamp(min=1)
    elif n > 1:
        unbiased = n / (n - 1)
    else:
        return
    if is_ordinary(running_mean, running_var):
        # As torch's kernels do, without counting as a change in place: who saved a buffer, such as a checkpoint its
        # arguments, does not mind that it moves.
        running_mean, running_var = running_mean.data, running_var.data
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    running_var.lerp_((var.detach() * unbiased).to(running_var.dtype), momentum)


def _is_nothing(x: Any, running_mean: Any, training: bool) -> bool:
    """Whether x is empty, and something is missing that torch needs for numbers alone."""
    return isinstance(x, Tensor) and x.numel() == 0 and (x.dim() < 2 or (running_mean is None and not training))


def _fits(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any, training: bool, eps: float
) -> bool:
    """Whether all is as it should be, and of one dtype: the usual case, in as little time as can be."""
    if not (isinstance(x, Tensor) and x.dim() > 1 and eps > 0):
        return False
    dtype, device, shape = x.dtype, x.device, x.shape
    if dtype not in (torch.float32, torch.float64) or (running_mean is None) != (running_var is None):
        return False
    for t in (running_mean, running_var, weight, bias):
        if t is not None and not (
            isinstance(t, Tensor) and t.dtype is dtype and t.shape == shape[1:2] and t.device == device
        ):
            return False
    if residual is not None and not (isinstance(residual, Tensor) and residual.shape == shape):
        return False
    return training or running_mean is not None


def _check(
    function: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """torch's errors; input, weight and bias, these with one dimension."""
    if _fits(input, running_mean, running_var, weight, bias, residual, training, eps):
        return input, weight, bias
    of_channel = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    check_tensor(function, input=input, residual=residual, **of_channel)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{function}(): 'eps': expected {'> 0 in training' if training else '≥ 0'}, got {eps}")
    if input.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise NotImplementedError(f"{function}(): 'input': expected a floating dtype, got {input.dtype}")
    if input.dim() < 2:
        raise RuntimeError(f"{function}(): 'input': expected shape (N, C, ...), got {tuple(input.shape)}")
    for name in ("running_mean", "running_var"):
        if of_channel[name] is None and not training:
            raise RuntimeError(f"{function}(): '{name}': expected a Tensor in evaluation mode, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{function}(): expected 'running_mean' and 'running_var' either both or neither, got one")
    allowed = {input.dtype} if input.dtype.itemsize > 2 else {input.dtype, torch.float32}
    for name, tensor in of_channel.items():
        if tensor is None:
            continue
        if tensor.numel() != input.shape[1]:
            raise RuntimeError(f"{function}(): '{name}': expected {input.shape[1]} elements, got {tensor.numel()}")
        if tensor.dtype not in allowed:
            expected = " or ".join(sorted(map(str, allowed)))
            raise RuntimeError(f"{function}(): '{name}': expected dtype {expected}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(f"{function}(): '{name}': expected device {input.device}, got {tensor.device}")
        allowed = {tensor.dtype}  # the parameters and statistics share one dtype
    if residual is not None and residual.shape != input.shape:
        raise RuntimeError(
            f"{function}(): 'residual': expected shape {tuple(input.shape)} of 'input', got {tuple(residual.shape)}"
        )
    gamma, beta = (t if t is None or t.dim() == 1 else t.reshape(input.shape[1]) for t in (weight, bias))
    return input, gamma, beta
