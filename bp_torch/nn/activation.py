"""Activations: torch.nn's classes, with their arguments and repr, one for each row of the activation table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch  # noqa: F401  # the classes that are written out name it, and what follows
from torch import Tensor  # noqa: F401

from .. import functional  # noqa: F401
from ..functional._common import check_parameters, write_out  # noqa: F401
from ..functions.activation import ACTIVATIONS, Activation
from ._leaf import Leaf

if TYPE_CHECKING:  # the others are torch's own to a type checker: see __init__.py
    __all__ = ["Sin"]

    class Sin(Leaf): ...

else:
    __all__ = [row.module for row in ACTIVATIONS.values() if row.module is not None]

_CLASS = '''
class {name}({parents}):
    """{doc}"""

    def forward(self, input: Tensor) -> Tensor:
        return functional.{key}(input{attributes})
'''
_PARAMETERS = """
    def __init__(self{signature}) -> None:
        super().__init__()
        check_parameters("{name}", ACTIVATIONS["{key}"], ({names},))
        {own} = {names}

    def extra_repr(self) -> str:
        return f"{shown}"
"""
"""What a class has of its parent in torch.nn, or of itself where there is none."""


def _define(key: str, row: Activation) -> None:
    """Write out a row's class, as dataclasses do. What follows the input in the functional form is an attribute."""
    parent = row.torch_module
    source = _CLASS if parent is not None or not row.parameters else _CLASS + _PARAMETERS
    text = source.format(
        name=row.module,
        parents="Leaf" if parent is None else f"torch.nn.{row.module}, Leaf",
        doc=f"y = {row.formula}.",
        key=key,
        attributes="".join(f", self.{name}" for name in row.arguments),
        signature=row.signature,
        names=", ".join(row.parameters),
        own=", ".join(f"self.{name}" for name in row.parameters),
        shown=", ".join(f"{name}={{self.{name}}}" for name in row.parameters),
    )
    write_out(text, globals())


for _key, _row in ACTIVATIONS.items():
    if _row.module is not None:
        _define(_key, _row)
