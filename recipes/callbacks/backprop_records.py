"""What `BackpropView` records of a step, and the rows that it shows: calls of modules, identities, layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Module = torch.nn.Module


@dataclass
class Call:
    """One call of one module, as hooks saw it. Tensors are detached copies."""

    name: str
    module: Module
    inputs: dict[str, Any]
    training: bool
    rng: Tensor
    """The state, before the call, of the generator that masks come from: that of the input's device."""
    rng_after: Tensor
    output: Tensor | None = None
    dy: Tensor | None = None
    dx: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """∂L/∂parameter through this call alone."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Before the call."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    children: list[Call] = field(default_factory=list)

    def child(self, module: Module) -> Call:
        return next(call for call in self.children if call.module is module)


@dataclass
class Identity:
    """A gradient (or an output) by formula, and the same as autograd had it."""

    name: str
    formula: Tensor
    recorded: Tensor
    scale: float
    """The largest term that the formula adds: rounding is relative to it."""

    @property
    def difference(self) -> float:
        """max |formula - recorded|; 0 for empty tensors, NaN where only one of them is."""
        if self.formula.shape != self.recorded.shape:
            return float("nan")
        return float((self.formula - self.recorded.double()).abs().max()) if self.formula.numel() else 0.0

    @property
    def relative(self) -> float:
        return self.difference / self.scale if self.scale else self.difference

    @property
    def holds(self) -> bool:
        """Within 1000 roundings of the recorded dtype (32 of a 16-bit one)."""
        dtype = self.recorded.dtype
        eps = torch.finfo(dtype).eps
        return self.relative <= (1000 if torch.finfo(dtype).bits > 16 else 32) * eps


@dataclass
class Layer:
    """A row of the view."""

    name: str
    kind: str
    forward: list[str]
    backward: list[str]
    z: Tensor | None = None
    a: Tensor | None = None
    delta: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """As autograd had them: dW, db, or a parameter's own name with a d before it."""
    identities: list[Identity] = field(default_factory=list)
    activations: set[tuple[str, tuple[float, ...]]] = field(default_factory=set)

    def check(self, name: str, formula: Tensor, recorded: Tensor | None, *terms: Tensor) -> None:
        """Hold a formula to what autograd had, if autograd needed it."""
        if recorded is not None:
            scale = max((float(t.detach().abs().max()) for t in (formula, *terms) if t.numel()), default=0.0)
            self.identities.append(Identity(name, formula.reshape(recorded.shape), recorded, scale))


def generator_state(like: Tensor) -> Tensor:
    """The state of the default generator of a tensor's device."""
    if like.device.type == "cpu":
        return torch.get_rng_state()
    return getattr(torch, like.device.type).get_rng_state(like.device)


def set_generator_state(like: Tensor, state: Tensor) -> None:
    if like.device.type == "cpu":
        torch.set_rng_state(state)
    else:
        getattr(torch, like.device.type).set_rng_state(state, like.device)
