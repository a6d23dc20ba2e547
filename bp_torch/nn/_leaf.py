"""What makes a module of this package a leaf of a graph that torch.fx traces, as torch.nn's own modules are."""

from typing import Any

import torch

__all__ = ["Leaf"]


class Leaf(torch.nn.Module):
    """Base of the modules that are one ``call_module`` node each; it stands behind torch's class.

    torch.fx's tracers, and those that others derive from them, tell torch's own modules by ``module.__module__``. So an
    object of a class defined here answers "torch.nn"; the class itself, by which it is pickled, keeps its own name. It
    costs nothing when the module is called. As in torch, a class that a user derives is traced through.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # torch's signature, of a class that has no other
        super().__init__(*args, **kwargs)
        if type(self).__module__.startswith(f"{__package__}."):
            self.__module__ = "torch.nn"
