"""What users run on their own functions and modules: :func:`check` and :func:`assert_correct`.

``registry.py`` is the table of checks; ``gradients.py``, ``precision.py``, ``rounding.py``, ``layouts.py``,
``batches.py``, ``safety.py`` and ``tools.py`` fill it. ``subject.py`` makes a function of tensors of whatever was
given, ``numeric.py`` differentiates numerically, ``library.py`` lists this package's own layers, which
``bp-torch check`` runs.
"""

from .registry import CHECKS
from .report import Report, Result
from .run import assert_correct, check

__all__ = ["CHECKS", "Report", "Result", "assert_correct", "check"]
