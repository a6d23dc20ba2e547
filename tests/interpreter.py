"""Triton's interpreter, made faster: a launch puts numpy behind triton.language once, not at each call of a function.

The interpreter of Triton 3.6 and 3.7 patches the language anew whenever a kernel calls another function, which takes a
millisecond and about half of a test's time, and takes such a patch back only at the end of the launch that made one.
Here each set of modules is patched once in a launch, and all is taken back at its end.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

_original: Callable[[Any], Any] = interpreter._patch_lang


class _Launch:
    """What one launch has patched."""

    def __init__(self) -> None:
        self.scopes: dict[frozenset[int], Any] = {}

    def patch(self, fn: Callable[..., Any]) -> None:
        modules = _modules(fn)
        if modules not in self.scopes:
            self.scopes[modules] = _original(fn)

    def restore(self) -> None:
        global _current
        for scope in reversed(self.scopes.values()):
            scope.restore()
        _current = None


_current: _Launch | None = None


@cache
def _modules(fn: Callable[..., Any]) -> frozenset[int]:
    """The modules of the language that a function sees, which are what is patched for it."""
    return frozenset(id(v) for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core))


def _patch_lang(fn: Callable[..., Any]) -> _Launch:
    """A launch patches first, and restores what it got; what it calls patches within it."""
    global _current
    if _current is None:
        _current = _Launch()
    _current.patch(fn)
    return _current


def make_faster() -> None:
    interpreter._patch_lang = _patch_lang


# A chip's own arithmetic in float32, of which Triton's compiler makes functions of the language (read in its PTX).

LOG2_E = np.float32(math.log2(math.e))


def _inexact(exact: np.ndarray, ulps: float) -> np.ndarray:
    """float64 to float32, off by up to so many units in the last place, by the same each time; what is exact stays.

    So does what is less than a normal number, which has no last place: a chip flushes it to 0.
    """
    rounded = exact.astype(np.float32)
    noise = (rounded.view(np.uint32) * np.uint32(2654435761) >> np.uint32(8)) / 2.0**23 - 1  # from -1 to 1
    off = (exact + noise * ulps * np.spacing(np.abs(rounded)).astype(np.float64)).astype(np.float32)
    normal = np.isfinite(rounded) & (np.abs(rounded) >= np.finfo(np.float32).tiny)
    return np.where(normal & (exact != rounded), off, rounded)


def _exp2(x: np.ndarray) -> np.ndarray:
    """ex2.approx, of which CUDA's expf is made, whose documented error is one unit."""
    return _inexact(np.exp2(x.astype(np.float64)), 1)


def _exp(x: np.ndarray) -> np.ndarray:
    return _exp2(x * LOG2_E)


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """div.full; tl.div_rn is exact."""
    return _inexact(x.astype(np.float64) / y, 2)


def _rsqrt(x: np.ndarray) -> np.ndarray:
    """rsqrt.approx."""
    return _inexact(1 / np.sqrt(x.astype(np.float64)), 2)


@contextlib.contextmanager
def as_a_chip() -> Iterator[None]:
    """exp, exp2, division and rsqrt of float32 are as inexact as on a GPU, instead of as exact as numpy's."""
    builder = interpreter.InterpreterBuilder

    def inexact(name: str, f: Callable[..., np.ndarray]) -> Callable[..., Any]:
        exact = getattr(builder, name)

        def operation(self: Any, *arguments: Any) -> Any:
            first = arguments[0]
            if first.data.dtype != np.float32:
                return exact(self, *arguments)
            with np.errstate(all="ignore"):
                return interpreter.TensorHandle(f(*(t.data for t in arguments)), first.dtype.scalar)

        return operation

    changed = {"create_exp": _exp, "create_exp2": _exp2, "create_fdiv": _divide, "create_rsqrt": _rsqrt}
    with pytest.MonkeyPatch.context() as patch:
        for name, f in changed.items():
            patch.setattr(builder, name, inexact(name, f))
        yield
