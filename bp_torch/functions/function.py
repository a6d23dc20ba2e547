"""What all Functions share: how they are called, and how they reach transforms.

A Function of this package is a ``torch.autograd.Function`` with static ``forward``, ``setup_context`` and ``backward``.
Three rules make it differentiable any number of times, in either mode, and under every transform:

1. What ``backward`` needs beyond inputs is an *output*. A pre-activation, a mean or a log-sum-exp is returned by
   ``forward`` beside ``y`` and is differentiable like ``y``; ``backward`` receives its gradient and adds it where it
   belongs. A saved output is attached to the graph, so a backward under ``create_graph=True`` is right by construction:
   nothing is recomputed and nothing is a hidden constant.
2. ``backward`` and ``jvp_rule`` are made of differentiable operations. Where one ATen kernel does the work of several
   passes it may serve instead, but only while no graph is recorded (``not torch.is_grad_enabled()``).
3. Random numbers and integer tables (a dropout mask, a target) are inputs, drawn before the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor, unwrap_if_dead
from torch.autograd import forward_ad

from . import settings

__all__ = ["NARROW", "PLAIN", "Function", "call", "is_ordinary", "is_plain", "wide"]

PLAIN = frozenset((Tensor, torch.nn.Parameter))
NARROW = (torch.bfloat16, torch.float16)


class Function(torch.autograd.Function):
    """Base class of the package's Functions.

    A subclass defines ``forward``, ``setup_context`` and ``backward``, and its forward-mode rule as ``jvp_rule``.

    Dynamo refuses a Function that has a ``jvp``, and everything else wants one. So the class itself has none; a
    subclass made beside it, ``with_jvp``, carries ``jvp_rule`` under that name, and :func:`call` picks between the two.

    Where microseconds count, a subclass may define ``forward_and_save(ctx, *args)`` as well: ``forward`` and
    ``setup_context`` in one, for reverse mode alone. It returns what ``forward`` does, or the first of several outputs
    alone, and may keep what is no output, for a backward that is not itself recorded.
    """

    generate_vmap_rule = True
    with_jvp: ClassVar[type[torch.autograd.Function]]
    kept: ClassVar[type[Function] | None] = None
    """What :func:`settings.keeping` made of it."""
    apply_plainly: ClassVar[Callable[..., Any]]
    """The C++ entry point that ``apply`` calls last."""
    apply_in_reverse: ClassVar[Callable[..., Any]]
    """The same where there is no forward mode: ``forward_and_save``'s, if there is one."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "jvp_rule" in cls.__dict__:
            members = {"jvp": staticmethod(cls.__dict__["jvp_rule"].__func__), "__module__": cls.__module__}
            cls.with_jvp = type(cls.__name__, (cls,), members)
            cls.apply_plainly = _entry_point(cls.with_jvp)
            cls.apply_in_reverse = cls.apply_plainly
        if "forward_and_save" in cls.__dict__:
            members = {"forward": cls.__dict__["forward_and_save"], "__module__": cls.__module__}
            members["setup_context"] = staticmethod(torch.autograd.Function.setup_context)  # as not overridden
            in_reverse = type(cls.__name__, (cls,), members)
            cls.apply_in_reverse = _entry_point(in_reverse)


settings.run_as_it_is(Function.__init_subclass__)


def _entry_point(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The C++ function that ``function.apply`` calls last."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # torch's stub of the base lacks it


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether no transform or compiler is at work, and all are ordinary tensors."""
    if torch.compiler.is_compiling() or _is_tracing() or _are_functorch_transforms_active():
        return False
    for t in tensors:  # noqa: SIM110 - this runs at every call, and all(...) takes twice as long
        if t is not None and (type(t) not in PLAIN or is_legacy_batchedtensor(t)):
            return False
    return True


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether besides no derivative is being taken: no graph is recorded, and no tangents may be there.

    Only then may a fast path write in place into a tensor that it made itself, or call a kernel that has no derivative.
    """
    # Forward over reverse: tangents reach a backward that records no graph.
    return not torch.is_grad_enabled() and is_ordinary(*tensors) and forward_ad._current_level < 0


def call(function: type[Function], *args: Any) -> Any:
    """Call ``function`` on positional ``args``: as ``function.apply(*args)``, with forward mode and less overhead.

    ``Function.apply`` binds the Python signature at each call, about 25 microseconds. That is only needed for defaults
    and keywords, which no call here has; so the C++ entry point is called instead, unless a transform is active.
    Autocast is off inside: the caller has cast what must be cast.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if settings.were_set:
        function = settings.keeping(function)
    if _is_tracing() or _is_any_autocast_enabled() or _are_functorch_transforms_active():
        return _call_specially(function, args)
    # What escaped from a transform that has ended is a wrapper, through which no gradient would flow.
    given = [unwrap_if_dead(arg) if type(arg) in PLAIN else arg for arg in args]
    return (function.apply_in_reverse if forward_ad._current_level < 0 else function.apply_plainly)(*given)


def wide(t: Tensor) -> Tensor:
    """16-bit tensors in float32, in which the formulas are evaluated."""
    return t.float() if t.dtype in NARROW else t


class _Leaf(tuple):
    """A tuple that pytrees take for one value: vmap's generated rule compares the structure of the arguments with that
    of their tangents, and a tuple of numbers has the tangent None.
    """


def _call_specially(function: type[Function], args: tuple[Any, ...]) -> Any:
    if _is_tracing():
        return function.forward(*args)  # TorchScript can save operators, and no Python function
    if _is_any_autocast_enabled():
        with torch.autocast(_device_type(args), enabled=False):
            return _apply(function, args)
    return _apply(function, args)


def _apply(function: type[Function], args: tuple[Any, ...]) -> Any:
    if not _are_functorch_transforms_active():
        return function.apply_plainly(*[unwrap_if_dead(arg) if type(arg) in PLAIN else arg for arg in args])
    # torch switches forward mode off inside a Function's jvp at all levels, so that jvp of jvp silently drops terms
    # for every custom Function, and functionalize takes none. The operators of ``forward`` have their own rules.
    levels = [level.key() for level in get_interpreter_stack() or ()]
    if levels.count(TransformType.Jvp) > 1 or TransformType.Functionalize in levels:
        return function.forward(*args)
    return function.with_jvp.apply(*(_Leaf(arg) if type(arg) is tuple else arg for arg in args))


def _device_type(args: tuple[Any, ...]) -> str:
    return next(arg.device.type for arg in args if isinstance(arg, Tensor))
