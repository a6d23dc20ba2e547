"""``import bp_torch.nn.utils.rnn``: the submodules of torch.nn under this package's name, the same module objects.

Type checkers read the ``.pyi`` files beside this one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

import torch.nn

__all__ = ["serve"]

OURS, THEIRS = f"{__package__}.", "torch.nn."


class _Submodules(MetaPathFinder, Loader):
    """Finds ``bp_torch.nn.<name>`` as ``torch.nn.<name>``, at any depth.

    It is asked before the finder of files, which would make a second module, with classes of its own, of a file in the
    folder of ``torch.nn.utils``.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        first = fullname.removeprefix(OURS).partition(".")[0]
        if not fullname.startswith(OURS) or not isinstance(getattr(torch.nn, first, None), ModuleType):
            return None
        return spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(THEIRS + module.__name__.removeprefix(OURS))


def serve() -> None:
    """Answer imports from now on."""
    if not any(isinstance(finder, _Submodules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Submodules())
