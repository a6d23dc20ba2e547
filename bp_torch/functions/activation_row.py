"""What a row of the activation table says of an activation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Activation", "Requirement"]


class Requirement(NamedTuple):
    """What a parameter must be, where torch's operators refuse what is not so and the kernels would not look at it."""

    parameter: str
    expected: str
    """In words; other parameters stand in braces."""
    holds: Callable[..., bool]
    """Of all parameters."""
    error: type[Exception]
    """torch's."""


@dataclass(frozen=True)
class Activation:
    """One row: f, f′, f″ and all else that is particular to f. All functions take their parameters positionally.

    From the row follow the functional form, the module, its fusion, its conversion, its test cases and its checks.
    """

    f: Callable[..., Tensor]
    df: Callable[..., Tensor]
    ddf: Callable[..., Tensor]
    saves: str
    formula: str
    derivative: str
    source: str
    module: str | None = None
    """Its class in bp_torch.nn, a subclass of torch.nn's of that name where there is one. A row without a module has no
    functional form of its own either."""
    operator: Callable[..., Tensor] | None = None
    """torch's own, which torch.nn's module calls; None where torch has none, and f serves in its place."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Each with its default; two at most."""
    requires: tuple[Requirement, ...] = ()
    examples: tuple[tuple[float, ...], ...] = ()
    """Parameters that are tested beside the defaults: of each sign, on each side of ``unless``."""
    choice: tuple[str, Mapping[str, str]] | None = None
    """An argument of the functional form and the module that chooses among rows, and the row for each of its values."""
    kinks: Callable[..., tuple[float, ...]] = lambda *p: ()
    """Points x where f′ jumps; f′ there is the value that torch has."""
    selects: bool = False
    """Where f′ = 0, dx = 0 whatever dy is, Inf and NaN included: torch selects where others multiply."""
    float32: bool = False
    """On accelerators autocast computes it in float32. A layer that is fused with it would not."""
    native: Callable[..., Tensor] | None = None
    """ATen's kernel of the backward, (dy, s, *parameters) → dx: one pass where the formula takes several."""
    gate: bool = False
    """f′ depends on whether y is 0, and y = 0 means f′ = 0: after dropout y still tells f′, and the mask as well."""
    fused: Activation | None = None
    """The row that saves the output where this one saves the input, for fused layers."""
    unless: Callable[..., bool] = lambda *p: False
    """For which parameters the output does not determine f′, so that ``fused`` cannot serve."""

    @property
    def torch_module(self) -> type[torch.nn.Module] | None:
        """torch.nn's class."""
        return None if self.module is None or self.operator is None else getattr(torch.nn, self.module, None)

    @property
    def arguments(self) -> dict[str, float | str | bool]:
        """What the functional form takes beside the input, and the module for attributes, with defaults, as torch."""
        names: dict[str, float | str | bool] = {name: float(value) for name, value in self.parameters.items()}
        if self.choice is not None:
            names[self.choice[0]] = next(iter(self.choice[1]))
        if self.torch_module is not None and "inplace" in inspect.signature(self.torch_module).parameters:
            names["inplace"] = False
        return names

    @property
    def signature(self) -> str:
        """The arguments as they are written: ``, alpha: float = 1.0, inplace: bool = False``."""
        return "".join(f", {name}: {type(value).__name__} = {value!r}" for name, value in self.arguments.items())

    def pull(self, dy: Tensor, s: Tensor, *parameters: float) -> Tensor:
        """dy ⊙ f′, from the saved tensor s."""
        d = self.df(s, *parameters)
        return torch.where(d == 0, 0.0, dy * d) if self.selects else dy * d
