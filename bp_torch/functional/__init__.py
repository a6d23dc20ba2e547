"""torch.nn.functional's names and signatures over this package's Functions; other names are torch's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as _torch

if TYPE_CHECKING:
    # To a type checker a name that has no Function here is torch's.
    from torch.nn.functional import *

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

if not TYPE_CHECKING:
    __all__ = [name for module in _MODULES for name in module.__all__]

    def __getattr__(name: str) -> Any:
        return getattr(_torch, name)
