"""Which implementation runs: the torch formulas, or the Triton kernels. The only importer of the kernels.

The Triton path serves CUDA and ROCm tensors of float32, bfloat16 and float16 in eager mode. Everything else (float64,
the CPU, functorch transforms, fake tensors, tensor subclasses, compilers) runs the torch formulas, which torch.compile
then fuses itself. With ``TRITON_INTERPRET=1``, set before the first use, the Triton path also accepts CPU tensors where
the backend ``"triton"`` is asked for: that is how kernels are tested without a GPU.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import settings
from ._torch import tree_leaves, tree_map_only
from .mode import is_ordinary
from .settings import Setting, Settings

__all__ = [
    "backend",
    "batch_invariant",
    "current_backend",
    "is_batch_invariant",
    "kernels",
    "kernels_for",
    "mask_of",
    "warmup",
]

NAMES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


settings.default = Settings(_checked(os.environ.get("BP_TORCH_BACKEND", "auto"), "BP_TORCH_BACKEND"), False)
settings.triton_was_asked_for = settings.default.backend == "triton"
_package: ModuleType | None = None
_unusable: str | None = None
_warned: set[str] = set()


def current_backend() -> str:
    """``"auto"``, ``"torch"`` or ``"triton"``."""
    return settings.current().backend if settings.were_set else settings.default.backend


def backend(name: str) -> Setting:
    """Choose the implementation inside a ``with`` block, or of a decorated function.

    Args:
        name: ``"auto"``, kernels where they can run; ``"torch"``, never; ``"triton"``, as auto, with one warning that
            says why where they cannot run.

    The environment variable ``BP_TORCH_BACKEND`` sets the default. The setting is that of the thread or the task of
    asyncio; a new thread begins with the default. Backward runs by the setting of its forward.

    Raises:
        ValueError: another name.
    """
    return Setting("backend", backend=_checked(name, "backend()"))


def batch_invariant() -> Setting:
    """Inside a ``with`` block, or a decorated function: a row's result has the same bits whatever the batch around it.

    So that a sample's prediction does not depend on which others were sent along, nor a policy's log-probabilities on
    whether they were computed in training or while acting.

    Covered are the results of forward, in eager mode, of dense layers (Linear, Dense, MLP), activations, residual
    connections, softmax and log-softmax over other dimensions than the first, cross-entropy with ``reduction="none"``,
    and batch norm in evaluation mode. Matrix products then run in tiles of one size and one order of sums: in the
    Triton kernel where the kernels run, else in calls of a fixed number of rows, which takes longer than torch's
    product.

    Not covered, because a row's result is defined by the whole batch or by its place in it: batch norm in training,
    losses that are reduced, dropout's masks, and the gradients of parameters, which are sums over rows.

    The setting is that of the thread or the task, as :func:`backend`'s. Under torch.func transforms and torch.compile,
    these layers (cross-entropy excepted) raise a RuntimeError, because the order of sums is not this package's there.
    Compilers tell threads apart, and not the tasks of one thread: what one task has compiled while another was inside a
    block does not notice that it is called there.
    """
    return Setting("batch_invariant", batch_invariant=True)


def is_batch_invariant() -> bool:
    """Whether :func:`batch_invariant` is on."""
    if not settings.were_set:
        return False
    if torch.compiler.is_compiling():
        return settings.batch_invariant_while_compiling()
    return settings.current().batch_invariant


def kernels(first: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The package of kernels if it shall run for these tensors now, else None."""
    if torch.compiler.is_compiling():
        return None  # before the setting, which compilers cannot read
    name = settings.current().backend if settings.were_set else settings.default.backend
    if name == "torch":
        return None
    if name == "auto" and not first.is_cuda:
        return None
    return kernels_for(first, *others) if is_ordinary(first, *others) else None


def kernels_for(first: Tensor, *others: Tensor | None) -> ModuleType | None:
    """The package of kernels if it serves these tensors, where the backend is not ``"torch"`` and all are ordinary."""
    reason = _refusal(first, others)
    if reason is None:
        return _package
    if reason not in _warned and current_backend() == "triton":
        _warned.add(reason)
        warnings.warn(f"bp_torch: backend 'triton' was asked for, but {reason}: the torch formulas run", stacklevel=2)
    return None


def warmup(model: torch.nn.Module, *inputs: Any, **options: Any) -> None:
    """Compile what a model needs before training starts, by one forward and backward pass on sample inputs.

    Triton compiles a kernel at its first launch, for each dtype and for each of the properties that it specializes on:
    a size that is 1 or a multiple of 16, an activation, an option. So warm up with the shapes, the dtypes, the mode
    (``model.train()`` or ``model.eval()``) and the autocast setting that will be used::

        with torch.autocast("cuda", dtype=torch.bfloat16):
            bp_torch.warmup(model, torch.empty(256, 784, device="cuda"))

    The model runs on stand-ins for its parameters and buffers: no gradient, running statistic or random state changes.
    What else its forward does (counters, hooks, prints) happens once. Where ``BP_TORCH_AUTOTUNE=1``, the launch
    parameters are tuned as well. Where no kernels run, this is an ordinary pass.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"warmup: expected a torch.nn.Module, got {type(model).__name__}")
    state = {name: p.detach().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), (inputs, options)
    )
    tensors = [t for t in tree_leaves((args, kwargs, state)) if isinstance(t, Tensor)]
    devices = {t.device.index for t in tensors if t.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        results = tree_leaves(torch.func.functional_call(model, state, args, kwargs))
        ys = [y for y in results if isinstance(y, Tensor) and y.requires_grad]
        if ys:
            wanted = [t for t in tensors if t.requires_grad]
            torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys], allow_unused=True)


def mask_of(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The mask that the kernels draw from a seed, written out as a boolean tensor."""
    assert _package is not None, "a seed is drawn by the kernels"
    mask: Tensor = _package.dropout.mask(seed, tuple(shape), p)
    return mask


def _refusal(first: Tensor, others: tuple[Tensor | None, ...]) -> str | None:
    """Why the kernels cannot run, or None."""
    global _package, _unusable
    if _package is None and _unusable is None:
        try:
            _package = importlib.import_module("bp_torch.triton_kernels")
        except ImportError as error:
            _unusable = f"triton cannot be imported ({error})"
    if _package is None:
        return _unusable
    if not first.is_cuda and not (first.device.type == "cpu" and _package.INTERPRETED):
        return f"the tensors are on {first.device.type} (on the CPU, TRITON_INTERPRET=1 before the first use allows it)"
    for t in (first, *others):
        # What is computed on, and every other number; integers beside it are seeds and classes.
        number = t is first or (t is not None and (t.is_floating_point() or t.is_complex()))
        if t is not None and number and t.dtype not in DTYPES:
            return f"there are no {str(t.dtype).removeprefix('torch.')} kernels"
        if t is not None and t.device != first.device:
            return "the tensors are on different devices"
    return None
