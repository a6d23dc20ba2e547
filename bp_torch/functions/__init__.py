"""The mathematics: one file per layer, each a ``torch.autograd.Function`` with an explicit backward.

Faster ways to the same stand beside the formulas: ``aten/``, ``gpu/`` and ``batch_invariant.py`` register them.
"""

from . import aten, batch_invariant, gpu

__all__ = ["aten", "batch_invariant", "gpu"]
