"""What all Functions share: how they are called, and how they reach transforms.

A Function of this package is a ``torch.autograd.Function`` with static ``forward``, ``setup_context`` and ``backward``.
Three rules make it differentiable any number of times, in either mode, and under every transform:

1. What ``backward`` needs beyond inputs is an *output*. A pre-activation, a mean or a log-sum-exp is returned by
   ``forward`` beside ``y`` and is differentiable like ``y``; ``backward`` receives its gradient and adds it where it
   belongs. A saved output is attached to the graph, so a backward under ``create_graph=True`` is right by construction:
   what is not saved is computed again from inputs, by differentiable operations, and nothing is a hidden constant.
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

__all__ = ["NARROW", "PLAIN", "Function", "call", "is_exported", "is_ordinary", "is_plain", "no_view", "wide"]

PLAIN = frozenset((Tensor, torch.nn.Parameter))
NARROW = (torch.bfloat16, torch.float16)


class Function(torch.autograd.Function):
    """Base class of the package's Functions.

    A subclass defines ``forward``, ``setup_context`` and ``backward``, and its forward-mode rule as ``jvp_rule``, for
    which ``save_for_jvp`` saves, after ``setup_context``.

    Only a subclass made beside it, ``with_jvp``, has ``jvp_rule`` as ``jvp``, and saves for it: what is saved for
    forward mode outlives a call that an exception ends, such as the recomputation of a checkpoint.

    Where microseconds count, a subclass may define ``forward_and_save(ctx, *args)`` as well: ``forward`` and
    ``setup_context`` in one, for reverse mode alone. It returns what ``forward`` does, or the first of several outputs
    alone, and may keep what is no output, for a backward that is not itself recorded.
    """

    generate_vmap_rule = True
    with_jvp: ClassVar[type[Function]]
    kept: ClassVar[type[Function] | None] = None
    """What :func:`settings.keeping` made of it."""
    apply_in_forward: ClassVar[Callable[..., Any]]
    """The C++ entry point that ``with_jvp.apply`` calls last, for both modes."""
    apply_in_reverse: ClassVar[Callable[..., Any]]
    """The same where there is no forward mode: ``forward_and_save``'s, if there is one."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "jvp_rule" in cls.__dict__:
            _FUNCTIONS.append(cls)
            members = {
                "jvp": staticmethod(cls.__dict__["jvp_rule"].__func__),
                "setup_context": staticmethod(cls._setup_context_and_jvp),
                "apply": torch.autograd.Function.__dict__["apply"],
                "__module__": cls.__module__,
            }
            cls.with_jvp = type(cls.__name__, (cls,), members)
            cls.apply_in_forward = _entry_point(cls.with_jvp)
            cls.apply_in_reverse = _entry_point(cls)
        if "forward_and_save" in cls.__dict__:
            members = {"forward": cls.__dict__["forward_and_save"], "__module__": cls.__module__}
            members["setup_context"] = staticmethod(torch.autograd.Function.setup_context)  # as not overridden
            in_reverse = type(cls.__name__, (cls,), members)
            cls.apply_in_reverse = _entry_point(in_reverse)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """:func:`call`, without a look at what is compiling: what compilers put into their graphs as it is."""
        if _is_tracing() or _is_any_autocast_enabled() or _are_functorch_transforms_active():
            return _call_specially(cls, args)
        return _call_plainly(cls, args)

    @staticmethod
    def save_for_jvp(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save what ``jvp_rule`` reads."""

    @classmethod
    def _setup_context_and_jvp(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        cls.setup_context(ctx, inputs, output)
        cls.save_for_jvp(ctx, inputs, output)


_FUNCTIONS: list[type[Function]] = []


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


def is_exported() -> bool:
    """Whether a graph of operators is recorded for others to read, by torch.export or torch.jit.trace."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else _is_tracing()


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether besides no derivative is being taken: no graph is recorded, and no tangents may be there.

    Only then may a fast path write in place into a tensor that it made itself, or call a kernel that has no derivative.
    """
    # Forward over reverse: tangents reach a backward that records no graph.
    return not torch.is_grad_enabled() and is_ordinary(*tensors) and forward_ad._current_level < 0


def call(function: type[Function], *args: Any) -> Any:
    """Call ``function`` on positional ``args``: as ``function.apply(*args)`` of torch, with forward mode, for
    compilers, and with less overhead.

    torch's ``apply`` binds the Python signature at each call, about 25 microseconds. That is only needed for defaults
    and keywords, which no call here has; so the C++ entry point is called instead, unless a transform is active.
    Autocast is off inside: the caller has cast what must be cast.
    """
    if torch.compiler.is_compiling():
        # An exported graph holds operators, and no Function.
        return function.forward(*args) if torch.compiler.is_exporting() else _call_compiled(function, args)
    if settings.were_set:
        function = settings.keeping(function)
    if _is_tracing() or _is_any_autocast_enabled() or _are_functorch_transforms_active():
        return _call_specially(function, args)
    # What escaped from a transform that has ended is a wrapper, through which no gradient would flow.
    given = [unwrap_if_dead(arg) if type(arg) in PLAIN else arg for arg in args]
    return (function.apply_in_reverse if forward_ad._current_level < 0 else _entry(function, given))(*given)


def _entry(function: type[Function], args: list[Any]) -> Callable[..., Any]:
    """Forward mode's where there is a tangent, or gradcheck's vmap, through which none is seen."""
    for arg in args:
        if isinstance(arg, Tensor) and (
            is_legacy_batchedtensor(arg) or forward_ad.unpack_dual(arg).tangent is not None
        ):
            return function.apply_in_forward
    return function.apply_in_reverse


def _call_compiled(function: type[Function], args: tuple[Any, ...]) -> Any:
    from ..backends import is_batch_invariant

    if is_batch_invariant():  # asked where a compiler sees it, so that another setting is compiled anew
        return function.forward(*args)  # refuses, or is not covered
    _keep_whole()
    return function.apply(*args)


def _keep_whole() -> None:
    """Have Dynamo put a Function into its graph as one call, in place of its own trace of forward and backward.

    Dynamo's trace takes ``needs_input_grad`` for False where a transform differentiates, and records no graph in
    backward, so that gradients are lost. Called whole, a Function is differentiated by autograd, under each transform
    and as often as asked for; AOTAutograd then sees through it to the operators.
    """
    for function in _FUNCTIONS:
        torch.compiler.allow_in_graph(function)


# What torch.compiler.assume_constant_result sets: Dynamo calls it while it traces. Said here, because to import Dynamo
# takes as long as to import torch.
_keep_whole._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wide(t: Tensor) -> Tensor:
    """16-bit tensors in float32, in which the formulas are evaluated."""
    return t.float() if t.dtype in NARROW else t


def no_view(t: Tensor) -> Tensor:
    """t, as the only tensor of what it is a view of: autograd refuses to change a view that a Function returned."""
    return torch.ops.aten._unsafe_view.default(t, t.shape)


class _Leaf(tuple):
    """A tuple that pytrees take for one value: vmap's generated rule compares the structure of the arguments with that
    of their tangents, and a tuple of numbers has the tangent None.
    """


def _call_plainly(function: type[Function], args: tuple[Any, ...]) -> Any:
    """The end of :func:`call`, which has no time to call it."""
    given = [unwrap_if_dead(arg) if type(arg) in PLAIN else arg for arg in args]
    return (function.apply_in_reverse if forward_ad._current_level < 0 else _entry(function, given))(*given)


def _call_specially(function: type[Function], args: tuple[Any, ...]) -> Any:
    if _is_tracing():
        return function.forward(*args)  # TorchScript can save operators, and no Python function
    if _is_any_autocast_enabled():
        with torch.autocast(_device_type(args), enabled=False):
            return _transform(function, args)
    return _transform(function, args)


def _transform(function: type[Function], args: tuple[Any, ...]) -> Any:
    if not _are_functorch_transforms_active():
        return _call_plainly(function, args)
    # torch switches forward mode off inside a Function's jvp at all levels, so that jvp of jvp silently drops terms
    # for every custom Function, and functionalize takes none. The operators of ``forward`` have their own rules.
    levels = [level.key() for level in get_interpreter_stack() or ()]
    if levels.count(TransformType.Jvp) > 1 or TransformType.Functionalize in levels:
        return function.forward(*args)
    return function.with_jvp.apply(*(_Leaf(arg) if type(arg) is tuple else arg for arg in args))


def _device_type(args: tuple[Any, ...]) -> str:
    return next(arg.device.type for arg in args if isinstance(arg, Tensor))
