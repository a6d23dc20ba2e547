"""Functional forms of the losses, with torch.nn.functional's names and signatures.

All take ``reduction``: "none", "mean" or "sum"; ``size_average`` and ``reduce`` are torch's former names for it.
Scores that are a subclass of Tensor, with classes, have torch's own operators: those of a DTensor may stay sharded over
the classes (:func:`torch.distributed.tensor.parallel.loss_parallel`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import are_transforms_active, is_autocast_enabled
from ..functions.classes import class_dim
from ..functions.cross_entropy import CrossEntropyFunction, CrossEntropyProbabilitiesFunction
from ..functions.function import call
from ..functions.loss import BCEWithLogitsFunction, ErrorLossFunction
from ..functions.nll_loss import NLLLossFunction
from ..mode import PLAIN
from ._common import check_tensor, overridable, to_float32, warn

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "huber_loss",
    "l1_loss",
    "mse_loss",
    "nll_loss",
    "smooth_l1_loss",
]


@overridable(F.cross_entropy)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy of logits, as :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...).
        target: classes () or (N, d1, ...), int64 or uint8; or probabilities of the input's shape.
        weight: a weight for each class, (C). Differentiable with probabilities, a constant with classes.
        ignore_index: positions of this class do not count. Only with classes.
        label_smoothing: ε in [0, 1]: the share of the target that is spread over all classes.

    Raises:
        IndexError: a class outside [0, C), on the CPU.
        ValueError: batches of different sizes; an unknown ``reduction``.
        RuntimeError: other shapes or dtypes that do not fit; ε > 1; ``ignore_index`` with probabilities; a class weight
            that requires a gradient where it is a constant.
    """
    _check_integer("cross_entropy", "ignore_index", ignore_index)
    if _is_usual(input, target, weight, size_average, reduce, reduction) and 0 <= label_smoothing <= 1:
        usual: Tensor = call(
            CrossEntropyFunction, input, target, None, ignore_index, float(label_smoothing), reduction
        )[0]
        return usual
    name = "cross_entropy"
    _check_given(name, input=input, target=target)
    check_tensor(name, weight=weight)
    if type(input) not in PLAIN and input.shape != target.shape:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )  # fmt: skip
    reduction = _reduction(name, size_average, reduce, reduction)
    if label_smoothing > 1:
        raise RuntimeError(f"{name}(): 'label_smoothing': expected a number from 0 to 1, got {label_smoothing}")
    smoothing = max(float(label_smoothing), 0.0)  # torch reads a negative number as none
    if (
        input.numel() == 0 and input.dim() > 0 and input.shape[class_dim(input.shape)] == 0
    ):  # no classes: torch's own answer
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    if input.shape == target.shape:
        return _probabilities(input, target, weight, ignore_index, smoothing, reduction)
    x, w = to_float32(input, weight)
    t = _class_target(name, x, target, w)
    loss: Tensor = call(CrossEntropyFunction, x, t, w, ignore_index, smoothing, reduction)[0]
    return loss


def _probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, reduction: str
) -> Tensor:
    name = "cross_entropy"
    if not target.is_floating_point():
        raise RuntimeError(
            f"{name}(): 'target': expected a floating dtype for class probabilities (a target of the input's shape, "
            f"{tuple(input.shape)}), got {target.dtype}"
        )
    if ignore_index >= 0:
        raise RuntimeError(f"{name}(): 'ignore_index': expected none with class probabilities, got {ignore_index}")
    _check_logits(name, input)
    _check_class_weight(name, input, weight)
    x, q, w = to_float32(input, target, weight)
    dtype = torch.promote_types(x.dtype, q.dtype)
    dtype = dtype if w is None else torch.promote_types(dtype, w.dtype)
    loss: Tensor = call(CrossEntropyProbabilitiesFunction, x, q, w, smoothing, reduction, dtype)[0]
    return loss


@overridable(F.nll_loss)
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood -w_t x_t of log-probabilities x, as :func:`torch.nn.functional.nll_loss`.

    Arguments, shapes and errors: as :func:`cross_entropy` with classes.
    """
    _check_integer("nll_loss", "ignore_index", ignore_index)
    if _is_usual(input, target, weight, size_average, reduce, reduction):
        usual: Tensor = call(NLLLossFunction, input, target, None, ignore_index, reduction)[0]
        return usual
    _check_given("nll_loss", input=input, target=target)
    check_tensor("nll_loss", weight=weight)
    if type(input) not in PLAIN:
        return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    reduction = _reduction("nll_loss", size_average, reduce, reduction)
    x, w = to_float32(input, weight)
    t = _class_target("nll_loss", x, target, w)
    loss: Tensor = call(NLLLossFunction, x, t, w, ignore_index, reduction)[0]
    return loss


@overridable(F.mse_loss)
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """(x - t)², as :func:`torch.nn.functional.mse_loss`.

    Args:
        input: x, any shape.
        target: t, of the same shape; another that broadcasts is accepted with a warning, as torch does.
        weight: of the input's shape: multiplies the squares, and the mean divides by its sum.

    Raises:
        RuntimeError: shapes that do not broadcast.
        ValueError: a weight of another shape; an unknown ``reduction``.
        NotImplementedError: integers alone.
    """
    reduction = _reduction("mse_loss", size_average, reduce, reduction)
    return _error_loss("mse", input, target, weight, 0.0, reduction)


@overridable(F.l1_loss)
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """|x - t|, as :func:`torch.nn.functional.l1_loss`. Arguments and errors: as :func:`mse_loss`."""
    reduction = _reduction("l1_loss", size_average, reduce, reduction)
    return _error_loss("l1", input, target, weight, 0.0, reduction)


@overridable(F.smooth_l1_loss)
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """e²/(2β) where |e| < β, else |e| - β/2, with e = x - t, as :func:`torch.nn.functional.smooth_l1_loss`.

    β = 0 is :func:`l1_loss`. Other arguments and errors: as :func:`mse_loss`; RuntimeError for β < 0.
    """
    reduction = _reduction("smooth_l1_loss", size_average, reduce, reduction)
    if not beta >= 0:
        raise RuntimeError(f"smooth_l1_loss(): 'beta': expected a number ≥ 0, got {beta}")
    return _error_loss("smooth_l1" if beta > 0 else "l1", input, target, None, float(beta), reduction)


@overridable(F.huber_loss)
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """e²/2 where |e| ≤ δ, else δ (|e| - δ/2), with e = x - t, as :func:`torch.nn.functional.huber_loss`.

    The mean of a weighted loss divides by the number of elements, as torch's does. Other arguments and errors: as
    :func:`mse_loss`; RuntimeError for δ ≤ 0.
    """
    reduction = _reduction("huber_loss", None, None, reduction)
    if delta <= 0:
        raise RuntimeError(f"huber_loss(): 'delta': expected a number > 0, got {delta}")
    return _error_loss("huber", input, target, weight, float(delta), reduction)


@overridable(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """-w (π t log σ(x) + (1 - t) log(1 - σ(x))), as :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        input: logits x, any shape.
        target: t in [0, 1], of the same shape, floating.
        weight: w, broadcasts to the input; a constant, but for torch.func's transforms.
        pos_weight: π, broadcasts to the input; a constant, but for torch.func's transforms.

    Raises:
        ValueError: a target of another shape; an unknown ``reduction``.
        RuntimeError: weights that do not broadcast, or that require a gradient; an integer target.
        NotImplementedError: an integer input.
    """
    plain = weight is None and pos_weight is None and size_average is None and reduce is None
    if plain and reduction in _REDUCTIONS and _are_alike(input, target):
        usual: Tensor = call(BCEWithLogitsFunction, input, target, None, None, reduction)
        return usual
    name = "binary_cross_entropy_with_logits"
    _check_given(name, input=input, target=target)
    check_tensor(name, weight=weight, pos_weight=pos_weight)
    reduction = _reduction(name, size_average, reduce, reduction)
    if target.shape != input.shape:
        raise ValueError(
            f"{name}(): 'target': expected the shape of 'input', {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if not input.is_floating_point():
        raise NotImplementedError(f"{name}(): 'input': expected a floating dtype, got {input.dtype}")
    if not target.is_floating_point():
        raise RuntimeError(f"{name}(): 'target': expected a floating dtype, got {target.dtype}")
    for key, given in (("weight", weight), ("pos_weight", pos_weight)):
        if given is None:
            continue
        if not are_transforms_active():  # there torch's operator is made of others, too
            _check_constant(name, key, given)
        try:
            fits = torch.broadcast_shapes(given.shape, input.shape) == input.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise RuntimeError(
                f"{name}(): {key!r}: expected a shape that broadcasts to {tuple(input.shape)}, got {tuple(given.shape)}"
            )
    x, t, w, pi = to_float32(input, target, weight, pos_weight)
    loss: Tensor = call(BCEWithLogitsFunction, x, t, w, pi, reduction)
    return loss


_REDUCTIONS = ("none", "mean", "sum")


def _is_usual(input: Any, target: Any, weight: Any, size_average: Any, reduce: Any, reduction: str) -> bool:
    """Logits (N, C) and classes (N), and nothing to refuse, cast or weigh: the usual case, found in little time."""
    if not (type(input) in PLAIN and isinstance(target, Tensor)):
        return False
    shape = input.shape
    return (
        weight is None
        and size_average is None
        and reduce is None
        and len(shape) == 2
        and shape[1] > 0
        and target.shape == shape[:1]
        and target.dtype is torch.int64
        and input.dtype in (torch.float32, torch.float64)
        and reduction in _REDUCTIONS
        and not is_autocast_enabled()
    )


def _are_alike(input: Any, target: Any) -> bool:
    """Whether both are tensors of one shape and of one dtype that is not to be cast."""
    return (
        isinstance(input, Tensor)
        and isinstance(target, Tensor)
        and input.dtype is target.dtype
        and input.dtype in (torch.float32, torch.float64)
        and input.shape == target.shape
        and not is_autocast_enabled()
    )


def _reduction(function: str, size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        whole, reduced = size_average is None or size_average, reduce is None or reduce
        reduction = "none" if not reduced else "mean" if whole else "sum"
        warn(f"size_average and reduce args will be deprecated, please use reduction={reduction!r} instead.", 3)
    if reduction == "elementwise_mean":
        warn("reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.", 3)
        return "mean"
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{function}(): 'reduction': expected 'none', 'mean' or 'sum', got {reduction!r}")
    return reduction


def _check_integer(function: str, name: str, value: Any) -> None:
    if type(value) is not int and not hasattr(value, "__index__"):
        raise TypeError(f"{function}(): {name!r}: expected an int, got {type(value).__name__}")


def _check_given(function: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}(): '{name}': expected a Tensor, got {type(tensor).__name__}")


def _error_loss(
    error: str, input: Tensor, target: Tensor, weight: Tensor | None, parameter: float, reduction: str
) -> Tensor:
    """The losses of x - t."""
    if weight is None and _are_alike(input, target):
        usual: Tensor = call(ErrorLossFunction, input, target, None, error, parameter, reduction, input.dtype)
        return usual
    name = f"{error}_loss"
    _check_given(name, input=input, target=target)
    check_tensor(name, weight=weight)
    x, t, w = input, target, weight
    if t.shape != x.shape:
        warn(
            f"Using a target size ({t.size()}) that is different to the input size ({x.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )
        try:
            x, t = torch.broadcast_tensors(x, t)
        except RuntimeError as problem:
            raise RuntimeError(
                f"{name}(): 'target': expected a shape that broadcasts with 'input', {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            ) from problem
    if w is not None and w.shape != input.shape:
        raise ValueError(
            f"{name}(): 'weight': expected the shape of 'input', {tuple(input.shape)}, got {tuple(w.shape)}"
        )
    if w is None and error in ("mse", "smooth_l1") and x.dtype != t.dtype and torch.bool in (x.dtype, t.dtype):
        # These operators of torch promote a bool, which ``-`` refuses.
        x, t = x.to(torch.promote_types(x.dtype, t.dtype)), t.to(torch.promote_types(x.dtype, t.dtype))
    dtype = torch.promote_types(x.dtype, t.dtype)
    if error == "huber" and not x.is_floating_point() and dtype.is_floating_point:
        raise RuntimeError(f"{name}(): 'input': expected a floating dtype, got {x.dtype}")
    if not dtype.is_floating_point:
        # Integers and complex numbers have torch's own, where torch has one.
        if error == "l1" or (error == "mse" and w is not None):
            return getattr(F, name)(input, target, reduction=reduction, weight=w)
        raise NotImplementedError(f"{name}(): 'input', 'target': expected a floating dtype, got {x.dtype}, {t.dtype}")
    # torch composes the weighted forms of other operators, and autocast acts on those.
    x, t = to_float32(x, t, cpu=w is None or error == "huber")
    if w is not None and error != "huber":
        (w,) = to_float32(w, cpu=False)
        reduction = "weighted mean" if reduction == "mean" else reduction
    dtype = x.dtype if error == "huber" and x.is_floating_point() else torch.promote_types(x.dtype, t.dtype)
    dtype = dtype if w is None else torch.promote_types(dtype, w.dtype)
    loss: Tensor = call(ErrorLossFunction, x, t, w, error, parameter, reduction, dtype)
    return loss


def _check_logits(function: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise NotImplementedError(f"{function}(): 'input': expected a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise IndexError(f"{function}(): 'input': expected shape (C) or (N, C, ...), got ()")


def _check_constant(function: str, name: str, weight: Tensor) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{function}(): {name!r}: expected a constant, got a tensor that requires a gradient")


def _check_class_weight(function: str, x: Tensor, w: Tensor | None) -> None:
    K = x.shape[class_dim(x.shape)]
    if w is not None and w.shape != (K,):
        raise RuntimeError(f"{function}(): 'weight': expected shape ({K},), one for each class, got {tuple(w.shape)}")


def _class_target(function: str, x: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    """The target, checked against logits and weights, as int64 of shape (N, d1, ...), or () for logits (C)."""
    if not x.is_floating_point():
        raise NotImplementedError(f"{function}(): 'input': expected a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{function}(): 'input': expected shape (C) or (N, C, ...), got ()")
    if t.dtype != torch.int64 and not (t.dtype == torch.uint8 and x.dim() <= 2):
        raise RuntimeError(f"{function}(): 'target': expected classes of dtype int64, got {t.dtype}")
    expected = (*x.shape[:1], *x.shape[2:]) if x.dim() > 1 else ()
    got = tuple(t.shape)
    if got != expected and not (x.dim() == 1 and got == (1,)):
        message = f"{function}(): 'target': expected shape {expected} for 'input' of {tuple(x.shape)}, got {got}"
        wrong_batch = x.dim() > 1 and t.dim() > 0 and got[0] != expected[0]
        raise (ValueError if wrong_batch or (x.dim() == 1 and t.dim() == 1) else RuntimeError)(message)
    _check_class_weight(function, x, w)
    if w is not None:
        _check_constant(function, "weight", w)
        if w.dtype != x.dtype:
            raise RuntimeError(f"{function}(): 'weight': expected the dtype of 'input', {x.dtype}, got {w.dtype}")
    t = t.long()
    return t.reshape(()) if x.dim() == 1 else t
