"""What makes a module of this package a leaf of a graph that torch.fx traces, as torch.nn's own modules are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["as_leaf"]


def as_leaf(module: torch.nn.Module, *inputs: Tensor | None) -> Any:
    """A node of the graph that calls ``module``, where an input is traced; else None.

    What ``module`` does by its mode or its buffers is then done when the graph runs, not fixed when it is traced. None
    too for the traced module itself, which is no part of its own graph.
    """
    for input in inputs:
        if isinstance(input, torch.fx.Proxy):
            path = input.tracer.path_of_module(module)
            given = inputs if inputs[-1] is not None else inputs[:-1]
            return input.tracer.create_proxy("call_module", path, given, {}) if path else None
    return None
