"""bp_torch: the layers of backpropagation networks as autograd Functions with explicit backward.

``bp_torch.nn`` and ``bp_torch.functional`` have the names and signatures of ``torch.nn`` and ``torch.nn.functional``.
"""

from typing import TYPE_CHECKING, Any

from . import functional, nn
from ._conversion_report import ConversionReport, conversion_report
from .backends import backend, batch_invariant, warmup
from .conversion import convert, revert, reverted

if TYPE_CHECKING:
    from .verification import assert_correct, check

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "__version__",
    "assert_correct",
    "backend",
    "batch_invariant",
    "check",
    "conversion_report",
    "convert",
    "functional",
    "nn",
    "revert",
    "reverted",
    "warmup",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Verification is imported at its first use."""
        if name in ("assert_correct", "check"):
            from . import verification

            return getattr(verification, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
