"""What is at work around a call: transforms, compilers, derivatives; and dtypes that are computed in a wider one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._torch import are_transforms_active, forward_level, is_legacy_batchedtensor, is_tracing

__all__ = ["NARROW", "PLAIN", "is_exported", "is_ordinary", "is_plain", "wide"]

PLAIN = frozenset((Tensor, torch.nn.Parameter))
NARROW = (torch.bfloat16, torch.float16)


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether no transform or compiler is at work, and all are ordinary tensors."""
    if is_compiling() or is_tracing() or are_transforms_active():
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
    return not torch.is_grad_enabled() and forward_level() < 0 and is_ordinary(*tensors)


def is_exported() -> bool:
    """Whether a graph of operators is recorded for others to read, by torch.export or torch.jit.trace."""
    return torch.compiler.is_exporting() if is_compiling() else is_tracing()


def wide(t: Tensor) -> Tensor:
    """16-bit tensors in float32, in which the formulas are evaluated."""
    return t.float() if t.dtype in NARROW else t
