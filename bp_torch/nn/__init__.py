"""torch.nn's names over this package's Functions; a name that has no Function here is torch's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn as _torch

from .. import functional
from . import activation as _activation
from . import dense as _dense
from .activation import *  # noqa: F403
from .dense import *  # noqa: F403

_MODULES = (_activation, _dense)
_OURS = [name for module in _MODULES for name in module.__all__]

__all__ = sorted({*_OURS, "functional", *(name for name in dir(_torch) if name[0].isupper())})

if TYPE_CHECKING:
    from torch.nn import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        return getattr(_torch, name)
