"""What all Functions share: how they are called, how they reach transforms, and the faster ways beside their formulas.

A Function of this package is a ``torch.autograd.Function`` with static ``forward``, ``setup_context`` and ``backward``.
Three rules make it differentiable any number of times, in either mode, and under every transform:

1. What ``backward`` needs beyond inputs is an *output*. A pre-activation, a mean or a log-sum-exp is returned by
   ``forward`` beside ``y`` and is differentiable like ``y``; ``backward`` receives its gradient and adds it where it
   belongs. A saved output is attached to the graph, so a backward under ``create_graph=True`` is right by construction:
   what is not saved is computed again from inputs, by differentiable operations, and nothing is a hidden constant.
2. ``backward`` and ``jvp_rule`` are made of differentiable operations.
3. Random numbers and integer tables (a dropout mask, a target) are inputs, drawn before the call.

These are the formula. Where no derivative of it is asked for, a :class:`Way` may give the same by fewer passes over
memory: see :meth:`Function.faster`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import settings
from .._torch import (
    are_transforms_active,
    constant_while_compiling,
    entry_point,
    forward_level,
    is_autocast_enabled,
    is_legacy_batchedtensor,
    is_tracing,
    not_compiled,
    transforms,
    unwrap_if_dead,
)
from ..mode import PLAIN, is_plain

__all__ = ["ATEN", "BATCH_INVARIANT", "TRITON", "Function", "Way", "call"]

TRITON, BATCH_INVARIANT, ATEN = KINDS = ("triton", "batch-invariant", "aten")
"""The kinds of faster ways, in the order in which they are asked."""
PLAINLY, BACKWARD_PLAINLY, BY_FORMULA, FORWARD_MODE = "plainly", "backward plainly", "by formula", "forward mode"
"""How a call runs: by faster ways; in backward alone, since tangents may be about; by the formula; with tangents."""
CONSTANTS: set[type] = {type(None), int, float, bool, str, torch.dtype}
"""Types of arguments that hold no tensor."""


@dataclass(frozen=True)
class Way:
    """Another way to what a Function's formula gives. Each part returns NotImplemented where it does not serve.

    It is asked where all tensors are ordinary ones and no transform, no compiler and no forward-mode derivative is at
    work; ``backward`` only where no graph is recorded of it. So it may use operators that have no derivative, and may
    write into tensors that it made.
    """

    kind: str
    forward: Callable[..., Any] | None = None
    """Arguments and results of the Function's ``forward``."""
    forward_and_save: Callable[..., Any] | None = None
    """``forward`` and ``setup_context`` in one: where microseconds count, or where what is kept is no output."""
    backward: Callable[..., Any] | None = None
    """Arguments and results of the Function's ``backward``, and the saved tensors after ctx: a checkpoint, which
    watches them, allows that they are unpacked once.
    """
    always: bool = False
    """forward_and_save never returns NotImplemented: it is called with nothing between."""

    def serves(self, cpu: bool, backend: str, batch_invariant: bool) -> bool:
        """Whether it is to be asked for tensors on the CPU, or on another device, under these settings."""
        if self.kind == TRITON:
            return backend == "triton" or (backend == "auto" and not cpu)
        return batch_invariant or self.kind == ATEN


class Function(torch.autograd.Function):
    """Base class of the package's Functions.

    A subclass defines ``forward``, ``setup_context`` and ``backward``, and its forward-mode rule as ``jvp_rule``, for
    which ``save_for_jvp`` saves, after ``setup_context``.

    Only a subclass made beside it, ``with_jvp``, has ``jvp_rule`` as ``jvp``, and saves for it: what is saved for
    forward mode outlives a call that an exception ends, such as the recomputation of a checkpoint.
    """

    generate_vmap_rule = True
    with_jvp: ClassVar[type[Function]]
    ways: ClassVar[list[Way]]
    promises_batch_invariance: ClassVar[bool] = False
    """Whether :func:`bp_torch.batch_invariant` covers it: one of its ways is of that kind."""
    classes: ClassVar[dict[Any, type[Function]]]
    """What :func:`_made` made of it."""
    entries: ClassVar[dict[Any, Callable[..., Any]]]
    """Their entry points."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "jvp_rule" in cls.__dict__:
            _FUNCTIONS.append(cls)
            cls.ways, cls.classes, cls.entries = [], {}, {}
            cls.with_jvp = _derived(
                cls,
                jvp=cls.__dict__["jvp_rule"].__func__,
                setup_context=cls._setup_context_and_jvp,
                apply=torch.autograd.Function.__dict__["apply"],
            )

    @classmethod
    def faster(cls, kind: str, *, always: bool = False, **parts: Callable[..., Any]) -> None:
        """Register a :class:`Way` to this Function, after those of its kind that it has."""
        cls.ways.append(Way(kind, **parts, always=always))
        cls.promises_batch_invariance |= kind == BATCH_INVARIANT
        cls.ways.sort(key=lambda way: KINDS.index(way.kind))
        cls.classes.clear()
        cls.entries.clear()

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """:func:`call`, without a look at what is compiling: what compilers put into their graphs as it is."""
        if is_tracing() or is_autocast_enabled() or are_transforms_active():
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


def call(function: type[Function], *args: Any) -> Any:
    """Call ``function`` on positional ``args``: as ``function.apply(*args)`` of torch, with forward mode, for
    compilers, by the first :class:`Way` that serves, and with less overhead.

    torch's ``apply`` binds the Python signature at each call, about 25 microseconds. That is only needed for defaults
    and keywords, which no call here has; so the C++ entry point is called instead, unless a transform is active.
    Autocast is off inside: the caller has cast what must be cast.
    """
    if is_compiling():
        # An exported graph holds operators, and no Function.
        return function.forward(*args) if torch.compiler.is_exporting() else _call_compiled(function, args)
    if is_tracing() or is_autocast_enabled() or are_transforms_active():
        return _call_specially(function, args)
    return _call_plainly(function, args)


def _call_plainly(function: type[Function], args: tuple[Any, ...]) -> Any:
    """The end of :func:`call`, where neither transform nor compiler is at work."""
    first, plain, dead = None, True, False
    for arg in args:
        kind = type(arg)
        if kind in PLAIN:
            first = arg if first is None else first
            plain = plain and not is_legacy_batchedtensor(arg)
            dead = dead or unwrap_if_dead(arg) is not arg
        elif kind not in CONSTANTS and isinstance(arg, Tensor):
            plain = False
    if dead:  # escaped from a transform that has ended: no gradient would flow through it
        args = tuple(unwrap_if_dead(arg) if type(arg) in PLAIN else arg for arg in args)
    key: Any = first is not None and first.is_cpu
    if not plain or settings.were_set or forward_level() >= 0:
        key = _mode_of(function, args, plain), key, settings.current()[:2]
    entry = function.entries.get(key)
    if entry is None:
        mode, cpu, values = (PLAINLY, key, settings.default[:2]) if isinstance(key, bool) else key
        entry = function.entries[key] = entry_point(_made(function, mode, cpu, values))
    return entry(*args)


def _mode_of(function: type[Function], args: tuple[Any, ...], plain: bool) -> str:
    if forward_level() >= 0 and any(_has_tangent(arg) for arg in args):
        return FORWARD_MODE
    if not plain:
        _refuse_batch_invariance(function)
        return BY_FORMULA
    return PLAINLY if forward_level() < 0 else BACKWARD_PLAINLY


def _has_tangent(arg: Any) -> bool:
    """Whether forward mode differentiates by it; in gradcheck's vmap no tangent is seen, and each may have one."""
    return isinstance(arg, Tensor) and (is_legacy_batchedtensor(arg) or forward_ad.unpack_dual(arg).tangent is not None)


def _call_compiled(function: type[Function], args: tuple[Any, ...]) -> Any:
    from ..backends import is_batch_invariant

    is_batch_invariant()  # where a compiler sees it, so that another setting is compiled anew; ``apply`` refuses it
    _keep_whole()
    return function.apply(*args)


@constant_while_compiling
def _keep_whole() -> None:
    """Have Dynamo put a Function into its graph as one call, in place of its own trace of forward and backward.

    Dynamo's trace takes ``needs_input_grad`` for False where a transform differentiates, and records no graph in
    backward, so that gradients are lost. Called whole, a Function is differentiated by autograd, under each transform
    and as often as asked for; AOTAutograd then sees through it to the operators.
    """
    for function in _FUNCTIONS:
        torch.compiler.allow_in_graph(function)


def _call_specially(function: type[Function], args: tuple[Any, ...]) -> Any:
    if is_tracing():
        return function.forward(*args)  # TorchScript can save operators, and no Function
    if is_autocast_enabled():
        with torch.autocast(_device_type(args), enabled=False):
            return _transform(function, args)
    return _transform(function, args)


def _transform(function: type[Function], args: tuple[Any, ...]) -> Any:
    if not are_transforms_active():
        return _call_plainly(function, args)
    _refuse_batch_invariance(function)
    # torch switches forward mode off inside a Function's jvp at all levels, so that jvp of jvp silently drops terms
    # for every custom Function, and functionalize takes none. The operators of ``forward`` have their own rules.
    pushed, functionalized = transforms()
    if pushed > 1 or functionalized:
        return function.forward(*args)
    made = _made(function, FORWARD_MODE, True, settings.current()[:2])
    return made.apply(*args)


def _device_type(args: tuple[Any, ...]) -> str:
    return next(arg.device.type for arg in args if isinstance(arg, Tensor))


def _refuse_batch_invariance(function: type[Function]) -> None:
    """RuntimeError if :func:`bp_torch.batch_invariant` is on and promises something of this Function."""
    if settings.were_set and settings.current().batch_invariant and function.promises_batch_invariance:
        raise RuntimeError(
            "batch_invariant(): expected ordinary tensors in eager mode, got a transform, a compiler or a tensor "
            "subclass, which choose the order of sums themselves"
        )


def _made(function: type[Function], mode: str, cpu: bool, values: tuple[str, bool]) -> type[Function]:
    """The class for calls in this mode, on the CPU or elsewhere, under these settings."""
    key = mode, cpu, values
    if key in function.classes:
        return function.classes[key]
    base = function.with_jvp if mode == FORWARD_MODE else function
    ways = [way for way in function.ways if way.serves(cpu, *values)]
    members: dict[str, Callable[..., Any]] = {}
    if mode == PLAINLY and any(way.forward or way.forward_and_save for way in ways):
        members["forward"] = _forward_by(ways, function)
        members["setup_context"] = torch.autograd.Function.setup_context  # as not overridden: forward does both
    elif mode in (BACKWARD_PLAINLY, FORWARD_MODE):  # where a promise is kept by other operators alone
        promised = [way.forward for way in ways if way.kind == BATCH_INVARIANT and way.forward is not None]
        members |= {"forward": promised[0]} if promised else {}
    backward = function.backward
    if mode in (PLAINLY, BACKWARD_PLAINLY) and any(way.backward for way in ways):
        members["backward"] = backward = _backward_by(ways, function)
    if values != settings.default[:2]:
        members["backward"] = _backward_under(settings.Settings(*values), backward)
    made = function.classes[key] = _derived(base, **members) if members else base
    return made


def _derived(base: type[Function], **members: Any) -> type[Function]:
    """A subclass of the same name, with other static methods."""
    static = {name: m if isinstance(m, classmethod) else staticmethod(m) for name, m in members.items()}
    metaclass: Any = type(base)
    made: type[Function] = metaclass(base.__name__, (base,), {**static, "__module__": base.__module__})
    return made


def _forward_by(ways: list[Way], function: type[Function]) -> Callable[..., Any]:
    """``forward`` and ``setup_context`` in one, by the first way that serves, else by the formula."""
    if ways[0].always and ways[0].forward_and_save is not None:
        return ways[0].forward_and_save
    parts = [
        (part, part is way.forward_and_save)
        for way in ways
        for part in (way.forward_and_save, way.forward)
        if part is not None
    ]

    def forward(ctx: Any, *args: Any) -> Any:
        for part, saves in parts:
            output = part(ctx, *args) if saves else part(*args)
            if output is not NotImplemented:
                break
        else:
            output, saves = function.forward(*args), False
        if not saves:
            function.setup_context(ctx, args, output)
        return output

    return forward


def _backward_by(ways: list[Way], function: type[Function]) -> Callable[..., Any]:
    """``backward`` by the first way that serves, else by the formula."""
    parts = [way.backward for way in ways if way.backward is not None]

    def backward(ctx: Any, *gradients: Any) -> Any:
        if not is_plain(*gradients):
            return function.backward(ctx, *gradients)
        saved = ctx.saved_tensors
        for part in parts:
            found = part(ctx, saved, *gradients)
            if found is not NotImplemented:
                return found
        return function.backward(_Unpacked(ctx, saved), *gradients)

    return backward


class _Unpacked:
    """ctx, whose tensors were unpacked."""

    def __init__(self, ctx: Any, saved: tuple[Any, ...]) -> None:
        self.ctx, self.saved_tensors = ctx, saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def _backward_under(values: settings.Settings, backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` by the settings that its forward had."""

    def under(ctx: Any, *gradients: Any) -> Any:
        with settings.during(values):
            return backward(ctx, *gradients)

    return under


for _function in (Function.__init_subclass__, _made, _derived, _forward_by, _backward_by, _backward_under):
    not_compiled(_function)
