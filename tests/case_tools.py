"""What a case of the table is, and what cases and tests are made of: dtypes, inputs, masks, torch's own activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from device import DEVICE
from seeds import seeded
from torch import Tensor

from bp_torch.backends import current_backend
from bp_torch.functions.activation_table import ACTIVATIONS
from bp_torch.functions.dropout import mask_from
from bp_torch.triton_kernels import dropout

Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    name: str
    """Unique, such as ``dense-relu-dropout``."""
    function: str
    """The Function it exercises: a row of docs/contracts.md."""
    ours: Callable[..., Output]
    """The computation by bp_torch, of the inputs alone."""
    theirs: Callable[..., Output]
    """The same by torch operators, with the same masks and targets."""
    inputs: Callable[[], tuple[Tensor, ...]]
    """Makes the float64 inputs, all of them differentiable; the first one is the layer's input."""
    batch_dim: int | None = 0
    """The dimension of the first input along which the computation is independent (per-sample transforms), or None."""
    empty: bool = True
    """Whether torch accepts a batch of zero along ``batch_dim``."""

    def __str__(self) -> str:
        return self.name


def widest() -> torch.dtype:
    """The widest dtype that the backend computes in: float64 by the formulas, float32 in the kernels."""
    return torch.float32 if current_backend() == "triton" else torch.float64


def within(rtol: float, atol: float) -> dict[str, float]:
    """The tolerances of a comparison in :func:`widest`: these in float64, and in float32 torch.testing's own."""
    return {"rtol": rtol, "atol": atol} if widest() == torch.float64 else {}


def tensors(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Callable[[], tuple[Tensor, ...]]:
    """Makes float64 normal tensors of these shapes, the same at each call, on the device of the table."""
    device = torch.get_default_device()

    def make() -> tuple[Tensor, ...]:
        generator = seeded(seed)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
        return tuple((scale * t).to(device) for t in made)

    return make


SEED = 20250
"""Its masks have both values in every shape used here."""


def fixed_mask(*shape: int, p: float = 0.5) -> Tensor:
    """A mask that is the same at each call and has both values: the one that the kernels draw from SEED."""
    mask = dropout.mask(torch.tensor([SEED], device=DEVICE), shape, p).to(torch.get_default_device())
    assert 0 < mask.sum() < mask.numel(), "choose another SEED"
    return mask


def written_out(mask: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The boolean mask, from what ``draw_mask`` gave: the mask itself, or the seed that the kernels draw it from."""
    return mask_from(mask).over(shape, p)


def drawn(mask: Tensor) -> Tensor:
    """What a Function is given for this mask: the mask, or the seed of it where the kernels run."""
    if torch.compiler.is_compiling() or current_backend() != "triton":  # compilers run the formulas
        return mask
    return torch.tensor([SEED], device=mask.device)


def first(output: Any) -> Tensor:
    """The result proper, of a Function that also returns what its backward needs."""
    return output[0] if isinstance(output, tuple) else output


def away_from(points: tuple[float, ...], make: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Moves the elements of ``make()`` that lie within 0.02 of one of ``points``."""

    def moved() -> tuple[Tensor, ...]:
        made = make()
        for point in points:
            made = tuple(torch.where((t - point).abs() < 0.02, t + 0.05, t) for t in made)
        return made

    return moved


def torch_activation(key: str) -> Callable[..., Tensor]:
    """torch's operator for a key of the table, parameters positionally; f by torch's autograd where torch has none."""
    if key == "hardsigmoid":
        return lambda x: F.relu6(x + 3) / 6  # torch's own operator has no second derivative
    row = ACTIVATIONS[key]
    return row.operator or row.f
