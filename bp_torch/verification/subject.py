"""What is checked: a function of float tensors, whatever the user gave."""

from __future__ import annotations

import copy
import inspect
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_flatten, tree_leaves, tree_unflatten
from ..functions.function import Function, call

__all__ = ["Clock", "OutOfTime", "Point", "Subject", "as_precise", "as_real", "is_float", "same_random_state"]


class OutOfTime(BaseException):
    """A check's time is over. Raised at the next evaluation of the subject, so that no thread is needed.

    No error of the subject's, so that a check that looks for those does not take it for one.
    """


class Clock:
    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.start()

    def start(self) -> None:
        self.began = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def tick(self) -> None:
        if self.spent > self.limit:
            raise OutOfTime


def is_float(value: Any) -> bool:
    """Whether it is a tensor that can be differentiated by: floating-point, or complex."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def as_real(t: Tensor) -> Tensor:
    """A complex tensor as a view of pairs; another as it is."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def like(t: Tensor, real: Tensor) -> Tensor:
    """The pairs of :func:`as_real` as a complex tensor, if ``t`` is one."""
    if not t.is_complex():
        return real
    return torch.view_as_complex(real if real.stride(-1) == 1 else real.contiguous())


def as_precise(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a floating-point or complex tensor with the precision of ``dtype``."""
    return like(t, as_real(t.detach()).to(dtype, copy=True))


@dataclass(frozen=True)
class Point:
    """Where a subject is evaluated: its inputs, flattened, and its parameters.

    ``floats``: the float tensors of both. A complex tensor is there as pairs of real numbers, so that each check looks
    at its real and imaginary parts alike, and the gradient by a pair is what torch calls the complex gradient.
    """

    inputs: tuple[Any, ...]
    parameters: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """Of inputs and parameters, as they are."""
        return [*filter(is_float, self.inputs), *self.parameters]

    @property
    def floats(self) -> list[Tensor]:
        return [as_real(t) for t in self.tensors]

    def put(self, floats: Sequence[Tensor]) -> Point:
        """The same with other float tensors."""
        left = iter(floats)
        inputs = tuple(like(t, next(left)) if is_float(t) else t for t in self.inputs)
        return Point(inputs, tuple(like(t, next(left)) for t in self.parameters))

    def map(self, f: Callable[[Tensor], Tensor]) -> Point:
        return self.put([f(t) for t in self.floats])

    def to(self, dtype: torch.dtype) -> Point:
        return self.map(lambda t: t.detach().to(dtype, copy=True))

    def rows(self, batched: Sequence[int], index: Tensor) -> Point:
        """The rows ``index`` of the inputs ``batched``."""
        inputs = list(self.inputs)
        for i in batched:
            inputs[i] = inputs[i].detach().index_select(0, index.to(inputs[i].device))
        return replace(self, inputs=tuple(inputs))


class Subject:
    """A function of float tensors: an autograd Function, a callable or a module, with the random state fixed.

    Attributes:
        point: the given values, detached copies.
        names: of ``point.floats``.
        wanted: the positions in ``point.floats`` that are differentiated: the inputs that require a gradient, or all
            where none does, and the parameters that require one.
        module: a copy of the module, or None.
    """

    def __init__(self, target: Any, inputs: tuple[Any, ...], *, seed: int = 0, clock: Clock | None = None) -> None:
        self.target, self.seed, self.clock = target, seed, clock or Clock(float("inf"))
        self.module: torch.nn.Module | None = None
        self.function: Callable[..., Any]
        self.in_place = False
        self.buffers: dict[str, Tensor] = {}
        if isinstance(target, torch.nn.Module):
            self.module = copy.deepcopy(target)
            self.function, signature_of = self.module, self.module.forward
            self.buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        elif isinstance(target, type) and issubclass(target, torch.autograd.Function):
            self.function = (lambda *a: call(target, *a)) if issubclass(target, Function) else target.apply
            signature_of = target.forward
        elif callable(target):
            self.function = signature_of = target
        else:
            raise TypeError(
                f"check: expected an autograd Function, a callable or a module, got {type(target).__name__}"
            )
        flat, self.spec = tree_flatten(inputs)
        if not any(isinstance(t, Tensor) for t in flat):
            raise TypeError("check: expected at least one tensor among the inputs")
        parameters = dict(self.module.named_parameters()) if self.module is not None else {}
        if any(torch.nn.parameter.is_lazy(p) for p in parameters.values()):
            raise ValueError("check: the module has lazy parameters: call it once before")
        self.parameter_names = list(parameters)
        detached = tuple(_copied(t) if isinstance(t, Tensor) else t for t in flat)
        self.point = Point(detached, tuple(p.detach().clone() for p in parameters.values()))
        names = zip([*_names(signature_of, inputs), *parameters], self.point.tensors, strict=True)
        self.names = [f"view_as_real({name})" if t.is_complex() else name for name, t in names]
        given = [t.requires_grad for t in flat if is_float(t)]
        need = (given if any(given) else [True] * len(given)) + [p.requires_grad for p in parameters.values()]
        self.wanted = [i for i, needed in enumerate(need) if needed]
        if not self.names:
            raise TypeError("check: expected at least one floating-point tensor among inputs and parameters")

    @property
    def name(self) -> str:
        if self.module is not None:
            return type(self.module).__name__
        return getattr(self.target, "__qualname__", None) or type(self.target).__name__

    def at(self, point: Point) -> Subject:
        """The same subject with other given values."""
        other = copy.copy(self)
        other.point = point
        return other

    def like(self, target: Any) -> Subject:
        """Another subject (a reference, a copy) with this one's inputs; a module gets this one's parameters by name."""
        inputs = tree_unflatten(list(self.point.inputs), self.spec)
        other = Subject(target, inputs, seed=self.seed, clock=self.clock)
        if sorted(other.parameter_names) != sorted(self.parameter_names):
            raise ValueError(
                f"check: the reference has the parameters {other.parameter_names}, not {self.parameter_names}"
            )
        other.parameter_names, other.names = self.parameter_names, self.names
        other.point, other.wanted = self.point, self.wanted
        if other.module is not None and self.module is not None:
            other.module.train(self.module.training)
            other.buffers = self.buffers
        return other

    def call(self, point: Point) -> tuple[Tensor, ...]:
        """The tensors that come out, complex ones as pairs, with the random state as it is."""
        self.clock.tick()
        return self.outputs(point)

    def outputs(self, point: Point) -> tuple[Tensor, ...]:
        """The same without a look at the clock, which a compiler cannot trace."""
        flat = [t.clone() if self.in_place and is_float(t) else t for t in point.inputs]
        inputs = tree_unflatten(flat, self.spec)
        if self.module is None:
            result = self.function(*inputs)
        else:
            # Buffers follow the dtype, and are copies: running statistics move in training.
            dtypes = {t.dtype for t in point.floats}
            state: dict[str, Tensor] = dict(zip(self.parameter_names, point.parameters, strict=True))
            for name, buffer in self.buffers.items():
                cast = is_float(buffer) and len(dtypes) == 1
                state[name] = as_precise(buffer, point.floats[0].dtype) if cast else buffer.clone()
            result = torch.func.functional_call(self.module, state, inputs)
        return tuple(as_real(t) for t in tree_leaves(result) if isinstance(t, Tensor))

    def sow(self) -> None:
        """The same random numbers from here, from torch, Python and numpy."""
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self.seed % 2**32)

    def __call__(self, point: Point) -> tuple[Tensor, ...]:
        self.sow()
        return self.call(point)

    def leaves(self, point: Point, wanted: Sequence[int] | None = None) -> tuple[Point, list[Tensor]]:
        """The point with its wanted tensors as leaves that require a gradient; strides stay as they are."""
        chosen = self.wanted if wanted is None else wanted
        floats = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(point.floats)]
        return point.put(floats), [floats[i] for i in chosen]

    def run(
        self,
        point: Point,
        dys: Sequence[Tensor] | None = None,
        wanted: Sequence[int] | None = None,
        f: Callable[[Point], tuple[Tensor, ...]] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the gradients of the wanted tensors; one that is not used has zeros."""
        at, leaves = self.leaves(point, wanted)
        ys = (f or self)(at)
        return [y.detach() for y in ys], self.pull(ys, leaves, dys)

    def pull(
        self, ys: Sequence[Tensor], leaves: Sequence[Tensor], dys: Sequence[Tensor] | None = None, **options: Any
    ) -> list[Tensor]:
        """The gradients of ``leaves``; ``dys`` belong to the outputs that depend on them."""
        roots = differentiable(ys)
        if not roots or not leaves:
            return [torch.zeros_like(t) for t in leaves]
        dys = upstream(roots) if dys is None else dys
        gs = torch.autograd.grad(roots, leaves, list(dys), allow_unused=True, **options)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gs, strict=True)]


def differentiable(ys: Sequence[Tensor]) -> list[Tensor]:
    return [y for y in ys if y.requires_grad]


def upstream(ys: Sequence[Tensor], seed: int = 11) -> list[Tensor]:
    """Fixed normal numbers in the shapes of ``ys``, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in ys]


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone()


def _names(signature_of: Any, inputs: tuple[Any, ...]) -> list[str]:
    """Names of the float tensors among the inputs, from the signature where it has them."""
    try:
        named = [p for p in inspect.signature(signature_of).parameters.values() if p.kind != p.VAR_KEYWORD]
        names = [p.name for p in named if p.name not in ("ctx", "self") and p.kind != p.VAR_POSITIONAL]
    except (TypeError, ValueError):
        names = []
    found = []
    for i, value in enumerate(inputs):
        name = names[i] if i < len(names) else f"input {i}"
        leaves = tree_leaves(value)
        for j, leaf in enumerate(leaves):
            if is_float(leaf):
                found.append(name if len(leaves) == 1 and leaf is value else f"{name}[{j}]")
    return found


@contextmanager
def same_random_state(devices: Sequence[int]) -> Iterator[None]:
    """Leaves the random state of torch, Python and numpy as it was found."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None and state is not None:
                numpy.random.set_state(state)
