"""Who computes a layer, whether the result is right, and what it keeps in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .layers import Inputs, Layer

NAMES = ("bp_torch", "torch", "compile", "max-autotune")


@dataclass
class Setup:
    """One layer's inputs and upstream gradient on the device."""

    layer: Layer
    inputs: Inputs
    dy: Tensor

    @staticmethod
    def of(layer: Layer, device: str, dtype: torch.dtype) -> Setup:
        torch.manual_seed(0)
        inputs = tuple(_moved(t, device, dtype) for t in layer.inputs())
        with torch.no_grad():
            y = layer.theirs(*inputs, 0.0)
        return Setup(layer, inputs, torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y))

    def forward(self, f: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: f(*self.inputs, self.layer.p)

    def both(self, f: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        wanted = [t for t in self.inputs if t.requires_grad]
        return lambda: torch.autograd.grad(f(*self.inputs, self.layer.p), wanted, self.dy)


def _moved(t: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    moved = t.detach().to(device, dtype if t.is_floating_point() else t.dtype)
    return moved.requires_grad_(t.requires_grad)


def make(name: str, layer: Layer) -> Callable[..., Tensor]:
    """The function of a provider."""
    if name == "bp_torch":
        return layer.ours
    if name == "torch":
        return layer.theirs
    if name == "compile":
        return torch.compile(layer.theirs, dynamic=False)
    compiled = torch.compile(layer.theirs, dynamic=False, mode="max-autotune")

    def step(*args: object) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last call's results may be overwritten
        result: Tensor = compiled(*args)
        return result

    return step


def first_call(setup: Setup, f: Callable[..., Tensor]) -> float:
    """Seconds of the first forward and backward, which compile."""
    start = time.perf_counter()
    setup.both(f)()
    if setup.dy.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ceilings(setup: Setup) -> dict[str, Callable[[], object]]:
    """What nothing can beat: the bare products, or a copy of as many bytes."""
    if setup.layer.gemm:
        x, W = (t.detach() for t in setup.inputs[:2])
        dy = setup.dy
        return {"forward": lambda: x @ W.mT, "both": lambda: (x @ W.mT, dy @ W, dy.mT @ x)}
    x = setup.inputs[0]
    found: dict[str, Callable[[], object]] = {}
    for mode, passes in (("forward", setup.layer.passes[0]), ("both", sum(setup.layer.passes))):
        source = torch.zeros(passes * x.numel() // 2 or 1, dtype=x.dtype, device=x.device)
        found[mode] = partial(torch.zeros_like(source).copy_, source)
    return found


def fault(setup: Setup, f: Callable[..., Tensor]) -> str:
    """What is wrong with f's values or gradients, or "". Without dropout against float64, where the error may be twice
    torch's own; with it, y and its square must have the means that torch's have.
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
    for index, (right, theirs, found) in enumerate(zip(exact, torchs, ours, strict=True)):
        what = "y" if index == 0 else f"the gradient of input {wanted[index - 1]}"
        if found.shape != theirs.shape or found.dtype != theirs.dtype:
            return f"{what} is {found.dtype} {tuple(found.shape)}, torch's {theirs.dtype} {tuple(theirs.shape)}"
        error, allowed = ((t.double() - right).norm().item() for t in (found, theirs))
        rounding = torch.finfo(theirs.dtype).eps / 2 * right.norm().item()
        if not error <= 2 * allowed + rounding:
            return f"{what}: error {error:.3g}, torch's {allowed:.3g}, allowed twice that and a rounding {rounding:.3g}"
    if layer.p:
        with torch.no_grad():
            y, reference = (g(*setup.inputs, layer.p).double() for g in (f, layer.theirs))
        for moment in (1, 2):  # the masks differ; what they do on average must not
            difference = y**moment - reference**moment
            bias, spread = difference.mean().item(), difference.std().item() / difference.numel() ** 0.5
            if not abs(bias) <= 6 * spread or spread == 0:
                return f"y with dropout: moment {moment} is off by {bias:.3g}, allowed 6 x {spread:.3g}"
    return ""


def saved_bytes(setup: Setup, f: Callable[..., Tensor]) -> int:
    """Bytes kept for backward beyond the inputs and the output, which the neighbours keep anyway."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used again

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = setup.forward(f)()
    for t in (*setup.inputs, y):
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(setup: Setup, f: Callable[..., Tensor]) -> int | None:
    """What forward and backward allocate at once beyond what was there, on CUDA."""
    if not setup.dy.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    setup.both(f)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
