"""The one table of cases: tests and benchmarks read it.

A case is one way to call a Function, beside the same computation by torch. Its inputs are float64, away from kinks, and
small enough for gradcheck. Random choices (a dropout mask, a target) are constants of the case, so that a case is a pure
function of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.dense import DenseFunction
from bp_torch.functions.function import call

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
    piecewise_linear: bool = False
    """Second derivatives are all zero."""

    def __str__(self) -> str:
        return self.name


def tensors(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Callable[[], tuple[Tensor, ...]]:
    """Makes float64 normal tensors of these shapes, the same at each call."""

    def make() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    return make


def fixed_mask(*shape: int, p: float = 0.5) -> Tensor:
    """A mask that is the same at each call and has both values."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) >= p
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


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


def activation_cases() -> Iterator[Case]:
    other_parameters = {
        "leaky_relu": [{"negative_slope": -0.3}],
        "elu": [{"alpha": 1.7}, {"alpha": -0.4}],
        "celu": [{"alpha": 0.6}],
        "softplus": [{"beta": 2.0, "threshold": 30.0}, {"beta": 1.5, "threshold": 1.0}],
        "hardtanh": [{"min_val": -0.7, "max_val": 2.0}],
        "hardshrink": [{"lambd": 0.9}, {"lambd": -0.2}],
        "softshrink": [{"lambd": 0.2}],
    }
    for key, row in ACTIVATIONS.items():
        for given in [{}, *other_parameters.get(key, [])]:
            parameters = {**row.parameters, **given}
            values = tuple(parameters.values())
            suffix = "".join(f"-{name}={value:g}" for name, value in given.items())
            torch_form = torch_activation(key)
            yield Case(
                name=f"activation-{key}{suffix}",
                function="ActivationFunction",
                ours=lambda x, key=key, given=given: bpF.activation(x, key, given),
                theirs=lambda x, f=torch_form, values=values: f(x, *values),
                inputs=away_from(row.kinks(*values), tensors((5, 3), scale=2.0)),
                piecewise_linear=not bool(row.ddf(torch.full((1,), 0.3), *values).any()) and bool(row.kinks(*values)),
            )


def torch_activation(key: str) -> Callable[..., Tensor]:
    """torch's operator for a key of the table, parameters positionally."""
    special: dict[str, Callable[..., Tensor]] = {
        "identity": lambda x: x.clone(),
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "sin": torch.sin,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return special.get(key) or getattr(F, key)


def dense_cases() -> Iterator[Case]:
    mask = fixed_mask(4, 3)
    for key in ("identity", "relu", "tanh", "gelu", "hardtanh"):
        for p in (0.0, 0.5):
            for residual in (False, True):
                suffix = ("-dropout" if p else "") + ("-residual" if residual else "")
                values = tuple(ACTIVATIONS[key].parameters.values())

                def ours(x, W, b, r=None, key=key, values=values, p=p):
                    return first(call(DenseFunction, x, W, b, r, mask if p else None, p, key, values))

                def theirs(x, W, b, r=None, key=key, values=values, p=p):
                    y = torch_activation(key)(F.linear(x, W, b), *values)
                    y = y * mask / (1 - p) if p else y
                    return y if r is None else y + r

                shapes = ((4, 5), (3, 5), (3,)) + (((4, 3),) if residual else ())
                yield Case(
                    name=f"dense-{key}{suffix}",
                    function="DenseFunction",
                    ours=ours,
                    theirs=theirs,
                    inputs=tensors(*shapes, seed=1),
                    # The mask and the residual belong to a whole batch here.
                    batch_dim=None if p or residual else 0,
                )
    yield Case(
        name="linear-no-bias-3d",
        function="DenseFunction",
        ours=lambda x, W: bpF.linear(x, W),
        theirs=lambda x, W: F.linear(x, W),
        inputs=tensors((2, 3, 5), (4, 5)),
    )


CASES: list[Case] = [*activation_cases(), *dense_cases()]
