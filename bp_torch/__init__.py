"""bp_torch: the layers of backpropagation networks as autograd Functions with explicit backward.

``bp_torch.nn`` and ``bp_torch.functional`` have the names and signatures of ``torch.nn`` and ``torch.nn.functional``.
"""

from . import functional, nn
from ._conversion_report import conversion_report
from .backends import backend, batch_invariant, warmup
from .conversion import convert, revert

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "backend",
    "batch_invariant",
    "conversion_report",
    "convert",
    "functional",
    "nn",
    "revert",
    "warmup",
]
