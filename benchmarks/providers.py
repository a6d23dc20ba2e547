"""Who computes a layer, whether the result is right, and what it keeps in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import memory
from .layers import Inputs, Layer

NAMES = ("bp_torch", "torch", "compile", "max-autotune")
MODES = ("forward", "both", "step")
"""Forward; forward and backward; a step of training with zero_grad and the optimizer, which models alone have."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Candidate:
    """A provider's computation of a layer or model, ready to run."""

    runs: dict[str, Run]
    """By mode."""
    fault: Callable[[float], str]
    """What is wrong with its results, whose error may be so many times that of torch; or ""."""
    saved: Callable[[], int]
    """Bytes kept for backward."""
    facts: Callable[[], dict[str, Any]] = field(default=dict)
    """Further columns of its rows."""


def compiled(f: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """``f`` by torch.compile, as the provider ``name`` has it."""
    if name == "compile":
        return torch.compile(f, dynamic=False)
    fast = torch.compile(f, dynamic=False, mode="max-autotune")

    def step(*args: object) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last call's results may be overwritten
        result: Tensor = fast(*args)
        return result

    return step


def make(name: str, layer: Layer) -> Callable[..., Tensor]:
    """The function of a provider."""
    if name == "bp_torch":
        return layer.ours
    if name == "torch":
        return layer.theirs
    if name == "operator":
        assert layer.bare is not None
        return layer.bare
    return compiled(layer.theirs, name)


@dataclass
class Setup:
    """One layer's inputs and upstream gradient on the device."""

    layer: Layer
    inputs: Inputs
    dy: Tensor

    @staticmethod
    def of(layer: Layer, device: str, dtype: torch.dtype) -> Setup:
        torch.manual_seed(0)
        inputs = tuple(moved(t, device, dtype) for t in layer.inputs())
        with torch.no_grad():
            y = layer.theirs(*inputs, 0.0)
        return Setup(layer, inputs, torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y))

    @property
    def title(self) -> str:
        return self.layer.title

    @property
    def kind(self) -> str:
        return "overhead" if self.layer.bare else "layer"

    @property
    def precision(self) -> str:
        return str(self.inputs[0].dtype).removeprefix("torch.")

    def candidate(self, name: str) -> Candidate:
        f = make(name, self.layer)
        return Candidate(
            {"forward": self.forward(f), "both": self.both(f)}, partial(fault, self, f), lambda: saved_bytes(self, f)
        )

    def forward(self, f: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: f(*self.inputs, self.layer.p)

    def both(self, f: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        wanted = [t for t in self.inputs if t.requires_grad]
        return lambda: torch.autograd.grad(f(*self.inputs, self.layer.p), wanted, self.dy)

    def floors(self) -> dict[str, dict[str, int]]:
        """Bytes that must move and operations that must be done, by mode. Where there is no product, each element
        read or written counts as an operation."""
        x = self.inputs[0]
        if self.layer.gemm:
            W = self.inputs[1]
            touched = x.numel() + W.numel() + self.dy.numel()
            product = 2 * self.dy.numel() * W.shape[1]
            return {
                mode: {"floor_operations": times * product, "floor_bytes": times * touched * x.element_size()}
                for mode, times in (("forward", 1), ("both", 3))
            }
        counts = {"forward": self.layer.passes[0] * x.numel(), "both": sum(self.layer.passes) * x.numel()}
        return {mode: {"floor_operations": n, "floor_bytes": n * x.element_size()} for mode, n in counts.items()}

    def ceilings(self) -> dict[str, Run]:
        """What nothing can beat: the bare products, or a copy of as many bytes."""
        x = self.inputs[0]
        if self.layer.gemm:
            x, W = (t.detach() for t in self.inputs[:2])
            dy = self.dy
            return {"forward": lambda: x @ W.mT, "both": lambda: (x @ W.mT, dy @ W, dy.mT @ x)}
        found: dict[str, Run] = {}
        for mode, floor in self.floors().items():
            source = torch.zeros(floor["floor_bytes"] // x.element_size() // 2 or 1, dtype=x.dtype, device=x.device)
            found[mode] = partial(torch.zeros_like(source).copy_, source)
        return found


def moved(t: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """t on the device; in ``dtype`` if it is floating."""
    there = t.detach().to(device, dtype if t.is_floating_point() else t.dtype)
    return there.requires_grad_(t.requires_grad)


def fault(setup: Setup, f: Callable[..., Tensor], times: float = 2) -> str:
    """What is wrong with f's values or gradients, or "". Without dropout against float64, where the error may be
    ``times`` torch's own; with it, y and its square must have the means that torch's have.

    The error of a loss, one number, is a matter of luck, so torch's is taken as no smaller than in all of y and the
    gradients together, relatively.
    """
    layer, wanted = setup.layer, [i for i, t in enumerate(setup.inputs) if t.requires_grad]

    def results(g: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        inputs = [
            (t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach()).requires_grad_(t.requires_grad)
            for t in setup.inputs
        ]
        y = g(*inputs, 0.0)
        grads = torch.autograd.grad(y, [inputs[i] for i in wanted], setup.dy.to(y.dtype))
        return [y.detach().clone(), *(grad.clone() for grad in grads)]

    exact, torchs, ours = results(layer.theirs, torch.float64), results(layer.theirs, None), results(f, None)
    sizes = [right.norm().item() for right in exact]
    errors = [(theirs.double() - right).norm().item() for theirs, right in zip(torchs, exact, strict=True)]
    relative = (
        math.hypot(*(error / (size or 1.0) for error, size in zip(errors, sizes, strict=True))) / len(sizes) ** 0.5
    )
    for index, (right, theirs, found) in enumerate(zip(exact, torchs, ours, strict=True)):
        what = "y" if index == 0 else f"the gradient of input {wanted[index - 1]}"
        if problem := inexact(what, found, theirs, right, times, sizes[index], relative * sizes[index]):
            return problem
    if layer.p:
        with torch.no_grad():
            y, reference = (g(*setup.inputs, layer.p).double() for g in (f, layer.theirs))
        for moment in (1, 2):  # the masks differ; what they do on average must not
            difference = y**moment - reference**moment
            bias, spread = difference.mean().item(), difference.std().item() / difference.numel() ** 0.5
            if not abs(bias) <= 6 * spread or spread == 0:
                return f"y with dropout: moment {moment} is off by {bias:.3g}, allowed 6 x {spread:.3g}"
    return ""


def inexact(
    what: str, found: Tensor, theirs: Tensor, right: Tensor, times: float, size: float, least: float = 0.0
) -> str:
    """How ``found`` differs from ``right`` by more than so many times as much as torch's result does (taken as
    ``least`` at least), and a rounding of numbers of that size; or ""."""
    if found.shape != theirs.shape or found.dtype != theirs.dtype:
        return f"{what} is {found.dtype} {tuple(found.shape)}, torch's {theirs.dtype} {tuple(theirs.shape)}"
    error, allowed = ((t.double() - right).norm().item() for t in (found, theirs))
    allowed = max(allowed, least)
    rounding = torch.finfo(theirs.dtype).eps / 2 * size
    if error <= times * allowed + rounding:
        return ""
    return f"{what}: error {error:.3g}, torch's {allowed:.3g}, allowed {times:g} x that and a rounding {rounding:.3g}"


def saved_bytes(setup: Setup, f: Callable[..., Tensor]) -> int:
    """Bytes kept for backward beyond the inputs and the output, which the neighbours keep anyway."""
    return memory.saved_bytes(setup.forward(f), setup.inputs)
