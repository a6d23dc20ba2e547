"""Triton's interpreter, made faster: a launch puts numpy behind triton.language once, not at each call of a function.

The interpreter of Triton 3.6 and 3.7 patches the language anew whenever a kernel calls another function, which takes a
millisecond and about half of a test's time, and takes such a patch back only at the end of the launch that made one.
Here each set of modules is patched once in a launch, and all is taken back at its end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

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
