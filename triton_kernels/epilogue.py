"""What follows a layer, as hosts take it: any value with these attributes, of which a kernel gets the numbers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import random

__all__ = ["Epilogue", "dropout_of", "pair_of"]


class Epilogue(Protocol):
    """y = m ⊙ f(z) / (1 - p) + r, with a = f(z)."""

    @property
    def name(self) -> str:
        """f's key."""

    @property
    def parameters(self) -> tuple[float, ...]: ...

    @property
    def p(self) -> float: ...

    @property
    def told_by(self) -> str:
        """Which of ``z`` and ``a`` f′ is computed from; "" where f′ = 1."""

    def keeps(self, mask: Any = None, residual: Any = None) -> str:
        """Which of ``z``, ``a``, ``y`` to keep for f′, or ""."""


def dropout_of(e: Epilogue, seed: Tensor | None) -> tuple[float, int, int]:
    """scale, THRESHOLD, BITS. p without a seed is a scale alone."""
    scale = 1 / (1 - e.p) if e.p < 1 else 0.0
    return (scale, 0, 0) if seed is None else (scale, random.threshold(e.p), random.bits_for(e.p))


def pair_of(e: Epilogue) -> tuple[float, float]:
    """f's parameters a and b."""
    a, b = (*e.parameters, 0.0, 0.0)[:2]
    return float(a), float(b)
