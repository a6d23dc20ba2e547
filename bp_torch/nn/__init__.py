"""torch.nn's names over this package's Functions; a name that has no Function here is torch's own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch.nn as _torch

if TYPE_CHECKING:
    # To a type checker a class of ours is its parent of the same name, whose interface it has.
    from torch.nn import *

from .. import functional as functional  # type: ignore[no-redef]  # torch.nn's star brings its own
from . import _submodules
from . import activation as _activation
from . import batch_norm as _batch_norm
from . import dense as _dense
from . import dropout as _dropout
from . import loss as _loss
from . import mlp as _mlp
from . import penalty as _penalty
from . import residual as _residual
from . import softmax as _softmax
from .activation import *
from .batch_norm import *
from .dense import *
from .dropout import *
from .loss import *
from .mlp import *
from .penalty import *
from .residual import *
from .softmax import *

_MODULES = (_activation, _batch_norm, _dense, _dropout, _loss, _mlp, _penalty, _residual, _softmax)
_OURS = [name for module in _MODULES for name in module.__all__]

__all__ = sorted({*_OURS, "functional", *(name for name in dir(_torch) if name[0].isupper())})

sys.modules[f"{__name__}.functional"] = functional
_submodules.serve()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return getattr(_torch, name)
