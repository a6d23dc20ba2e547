"""The private names of torch that this package uses: the only file that imports any.

Each stands for a question that torch has no public answer to. ``tests/test_torch_names.py`` says of each what would
replace it, and holds it to what is said here, so that a torch that renames or changes one fails there first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _is_any_autocast_enabled as is_autocast_enabled
from torch._C import _is_tracing as is_tracing
from torch._C._dynamo import eval_frame
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor, unwrap_if_dead
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "BatchNormBase",
    "DispatchMode",
    "are_transforms_active",
    "assert_later",
    "autograd_context",
    "collectives",
    "compiler_error",
    "constant_while_compiling",
    "entry_point",
    "forward_level",
    "has_any_global_hook",
    "is_autocast_enabled",
    "is_legacy_batchedtensor",
    "is_tracing",
    "log_softmax_backward",
    "losses",
    "not_compiled",
    "softmax_backward",
    "transforms",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "undefined_gradient",
    "unsafe_view",
    "unwrap_if_dead",
]

assert_later = torch._assert_async
"""A check of a tensor's value that a graph can hold and a GPU need not wait for."""
losses: Any = torch._C._nn
"""Losses, which take a number for the reduction."""
log_softmax_backward = torch._log_softmax_backward_data
softmax_backward = torch._softmax_backward_data
unsafe_view = torch.ops.aten._unsafe_view.default
"""A reshaped tensor that autograd does not take for a view, where nothing else holds the memory."""
forward_level: Callable[[], int] = partial(attrgetter("_current_level"), forward_ad)
"""How deep forward-mode differentiation is nested, from 0; below 0 no tensor has a tangent."""


def transforms() -> tuple[int, bool]:
    """Of the torch.func transforms at work: how many are forward-mode derivatives, and whether one is functionalize."""
    levels = [level.key() for level in get_interpreter_stack() or ()]
    return levels.count(TransformType.Jvp), TransformType.Functionalize in levels


def entry_point(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ function that ``function.apply`` calls last, which binds no signature."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # torch's stub of the base lacks it


def constant_while_compiling(function: Any) -> Any:
    """As ``torch.compiler.assume_constant_result``, which imports Dynamo, and with it as much as torch itself."""
    function._dynamo_marked_constant = True
    return function


def not_compiled(function: Any) -> None:
    """Dynamo does not compile a call of ``function`` from a frame that it has left, where it would take itself to be
    compiling; what it traces from its own frames stays as it is. ``torch.compiler.disable`` would import Dynamo.
    """
    skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, default))


def autograd_context() -> Context | None:
    """In a thread of the autograd engine: the context of whoever asked for the gradients."""
    context = torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None
    return context if isinstance(context, Context) else None


def undefined_gradient() -> Any:
    """A function that gives its argument's gradient as undefined."""
    return torch._C._functions.UndefinedGrad()


def collectives() -> Any:
    """The collectives that compilers can trace."""
    from torch.distributed import _functional_collectives

    return _functional_collectives


def compiler_error() -> type[Exception]:
    """The base of the errors that Dynamo raises."""
    error: type[Exception] = torch._dynamo.exc.TorchDynamoException
    return error
