"""The table of checks. Each file beside this one adds rows by the decorator :func:`check`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHECKS", "Check", "Failed", "NotApplicable", "check", "describe", "line", "refusal"]


class Failed(Exception):
    """What is wrong, in one line, and the tensors that show it by name."""

    def __init__(self, what: str, example: dict[str, Any] | None = None) -> None:
        super().__init__(what)
        self.what, self.example = what, example or {}


class NotApplicable(Exception):
    """The reason, in one line."""


@dataclass(frozen=True)
class Check:
    name: str
    what: str
    """What is checked, in one line."""
    means: str
    """What a failure means for training, in one line."""
    run: Callable[..., str | None]
    """Takes a context; returns a note or None; raises Failed or NotApplicable."""
    gradients: bool = False
    """It differentiates, so that it needs an output that depends on an input."""
    repeats: bool = True
    """It compares two calls, so that these must agree when the seed is the same."""
    shrinks: bool = True
    """A failure is looked for again on fewer rows."""
    tags: frozenset[str] = field(default_factory=frozenset)


CHECKS: dict[str, Check] = {}


def check(name: str, what: str, means: str, **options: Any) -> Callable[[Callable[..., str | None]], Any]:
    def add(run: Callable[..., str | None]) -> Callable[..., str | None]:
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, what, means, run, **options)
        return run

    return add


# How torch, and code that follows it, says that something is not offered. That is a limit, stated aloud; a wrong number
# is a defect.
_REFUSALS = re.compile(
    "does not support|not supported|unsupported|not implemented|not currently implemented|once_differentiable"
    "|not differentiable twice|batching rule|vmap|functorch|setup_context|batched tensor|does not have a derivative"
    "|not yet implemented",
    re.IGNORECASE,
)


def refusal(error: Exception) -> str | None:
    """The message, if the error says that something is not offered; else None."""
    told = isinstance(error, NotImplementedError) or (
        isinstance(error, (RuntimeError, TypeError, ValueError)) and _REFUSALS.search(str(error))
    )
    return f"refused: {line(error)}" if told else None


def line(error: BaseException, width: int = 160) -> str:
    """An error as one line: its type, and the first sentence or line of its message."""
    text = next((row.strip() for row in str(error).splitlines() if row.strip()), "")
    text = text if len(text) <= width else text[: width - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def describe(value: Any) -> str:
    """A tensor by shape, strides, dtype and values, of which at most twelve are written."""
    if not isinstance(value, Tensor):
        return repr(value)
    t = value.detach()
    parts = [f"shape {tuple(t.shape)}", f"strides {t.stride()}", str(t.dtype).removeprefix("torch.")]
    if t.device.type != "cpu":
        parts.append(str(t.device))
    # Rows first, so that a view over a large storage is not copied whole.
    flat = t.reshape(-1)[:12].cpu() if t.numel() <= 12 else torch.stack([t[_at(t, i)] for i in range(12)]).cpu()
    shown = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in flat.tolist()]
    values = ", ".join(shown) + (", …" if t.numel() > 12 else "")
    return f"{', '.join(parts)}, values {values if shown else 'none'}"


def _at(t: Tensor, i: int) -> tuple[int, ...]:
    return tuple(int(k) for k in torch.unravel_index(torch.tensor(i), t.shape))
