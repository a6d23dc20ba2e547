"""The settings of :mod:`bp_torch.backends`, which belong to a context: a thread, or a task of asyncio.

A thread begins with the default; a task, and what ``asyncio.to_thread`` runs, with the setting where it was started.
Backward runs in whatever thread the autograd engine has: a Function runs it :func:`during` what its forward had.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch

from ._torch import autograd_context, constant_while_compiling, not_compiled

__all__ = ["Setting", "Settings", "batch_invariant_while_compiling", "current", "default", "during"]

F = TypeVar("F", bound=Callable[..., Any])


class Settings(NamedTuple):
    backend: str
    batch_invariant: bool
    before: Settings | None = None
    """What the end of the block goes back to."""


default = Settings("auto", False)
"""Where nothing is set; :mod:`bp_torch.backends` reads it from the environment."""
were_set = False
"""Whether a block was ever entered; until then nobody need look further."""
triton_was_asked_for = False
"""Whether the backend ``"triton"`` ever was: until then no kernel runs on the CPU."""
batch_invariant_is_open = False
"""Whether a block of ``batch_invariant()`` is open anywhere."""

_settings: ContextVar[Settings | None] = ContextVar("bp_torch", default=None)
_lock = threading.Lock()
_open_blocks = 0


class _Thread(threading.local):
    def __init__(self) -> None:  # the object's own, or compilers would not guard on them
        self.open_blocks = 0
        self.batch_invariant_is_open = False


_thread = _Thread()


def current() -> Settings:
    """This context's settings."""
    settings = _settings.get()
    if settings is None:
        context = autograd_context()
        settings = None if context is None else context.get(_settings)
    return default if settings is None else settings


def batch_invariant_while_compiling() -> bool:
    """Guards cannot see a context. They see whether a block is open somewhere, and whether in this thread."""
    return _batch_invariant_now(batch_invariant_is_open, _thread.batch_invariant_is_open)


@constant_while_compiling
def _batch_invariant_now(*_guarded: bool) -> bool:
    return current().batch_invariant


class Setting:
    """A ``with`` block, as often entered as one likes, in any thread or task; or a decorator of a function."""

    def __init__(self, name: str, **changes: Any) -> None:
        self.name, self.changes = name, changes

    def __enter__(self) -> None:
        global were_set, triton_was_asked_for
        if torch.compiler.is_compiling():  # whose graphs run the formulas, whatever the backend
            if self.changes.get("batch_invariant"):
                raise RuntimeError("batch_invariant(): expected eager mode, got a compiler, which orders sums itself")
            return
        were_set = True
        triton_was_asked_for = triton_was_asked_for or self.changes.get("backend") == "triton"
        self._count(1)
        before = current()
        _settings.set(before._replace(**self.changes, before=before))

    def __exit__(self, *exception: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._count(-1)
        settings = _settings.get()
        _settings.set(settings and settings.before)

    def _count(self, by: int) -> None:
        global _open_blocks, batch_invariant_is_open
        if self.changes.get("batch_invariant"):
            with _lock:
                _open_blocks += by
                batch_invariant_is_open = _open_blocks > 0
                _thread.open_blocks += by
                _thread.batch_invariant_is_open = _thread.open_blocks > 0

    def __call__(self, function: F) -> F:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{self.name}(): expected a function to decorate, got a generator, which runs in pieces: write 'with' "
                "into it"
            )

        name, changes = self.name, self.changes  # Dynamo enters a block that it saw begin

        @wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with Setting(name, **changes):
                return function(*args, **kwargs)

        @wraps(function)
        async def within_task(*args: Any, **kwargs: Any) -> Any:
            with Setting(name, **changes):
                return await function(*args, **kwargs)

        return cast(F, within_task if inspect.iscoroutinefunction(function) else within)


@contextmanager
def during(settings: Settings) -> Iterator[None]:
    """Inside the block these, whatever was set."""
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


for _function in (Setting.__enter__, Setting.__exit__, current):
    not_compiled(_function)
