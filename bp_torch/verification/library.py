"""This package's own layers as subjects of check(): what ``bp-torch check`` runs.

``bp_torch.nn``'s names and the activation table give the rows, so that a new layer is not forgotten:
:func:`forgotten` names what has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional, nn
from ..functions.activation import ACTIVATIONS

__all__ = ["ON_KERNELS", "Case", "cases", "forgotten"]

ON_KERNELS = (
    "frozen", "empty-batch", "odd-sizes", "strided-inputs", "zero-stride-inputs", "strided-gradients",
    "zero-stride-gradients", "float32", "bfloat16", "float16", "tails", "large-mean", "nan", "retain-graph",
    "overwriting", "in-place", "determinism", "seed", "checkpoint", "autocast",
)  # fmt: skip
"""The checks that reach the Triton kernels: the others differentiate in float64 or under transforms, where the torch
formulas run whatever the backend."""


@dataclass(frozen=True)
class Case:
    name: str
    """Unique, such as ``nn.Linear`` or ``nn.Linear no bias``."""
    make: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    reference: Callable[[], Any] | None = None
    """torch.nn's own module, beside whose errors ours are put."""
    quick: bool = True
    """Whether ``--quick`` runs it."""


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _table() -> tuple[Any, ...]:
    return (_normal(4, 6),)


def _image() -> tuple[Any, ...]:
    return (_normal(2, 3, 4, 4),)


def _volume() -> tuple[Any, ...]:
    return (_normal(2, 3, 2, 3, 2),)


def _pair() -> tuple[Any, ...]:
    return (_normal(4, 6), _normal(4, 6, seed=1))


def _probabilities() -> tuple[Any, ...]:
    return (_normal(4, 6), _normal(4, 6, seed=1).sigmoid())


def _classes() -> tuple[Any, ...]:
    return (_normal(6, 5), torch.tensor([0, 3, 2, 4, 4, 1]))


def _log_probabilities() -> tuple[Any, ...]:
    x, t = _classes()
    return (x.log_softmax(1), t)


def _weights() -> tuple[Any, ...]:
    return ([_normal(4, 3), _normal(4, seed=1)],)


@dataclass(frozen=True)
class _Row:
    """How a class of bp_torch.nn is made: its arguments, once for each variant; with torch.nn's class beside it."""

    inputs: Callable[[], tuple[Any, ...]]
    arguments: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (("", (), {}),)
    reference: bool = True


def _once(*arguments: Any, **options: Any) -> tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...]:
    return (("", arguments, options),)


# Dropout draws other bits than torch's from one seed: no reference.
_ROWS: dict[str, _Row] = {
    "Linear": _Row(_table, (("", (6, 3), {}), ("no bias", (6, 3), {"bias": False}))),
    "Dense": _Row(_table, (("dropout", (6, 3), {"activation": "tanh", "dropout": 0.5}),), reference=False),
    "MLP": _Row(
        _table,
        (
            ("", (6, [5, 4], 3), {"activation": "gelu"}),
            ("norm, residual", (6, [5, 5], 3), {"activation": "silu", "norm": "batch", "residual": True}),
        ),
        reference=False,
    ),
    "BatchNorm1d": _Row(_table, (("", (6,), {}), ("cumulative", (6,), {"momentum": None}))),
    "BatchNorm2d": _Row(_image, _once(3)),
    "BatchNorm3d": _Row(_volume, _once(3)),
    "BatchNormAct1d": _Row(_pair, (("residual, relu", (6,), {"activation": "relu"}),), reference=False),
    "BatchNormAct2d": _Row(_image, (("gelu", (3,), {"activation": "gelu"}),), reference=False),
    "BatchNormAct3d": _Row(_volume, (("softplus", (3,), {"activation": "softplus"}),), reference=False),
    "SyncBatchNorm": _Row(_table, _once(6), reference=False),
    "DistributedBatchNorm": _Row(_table, _once(6), reference=False),
    "Dropout": _Row(lambda: (_normal(6, 8),), _once(0.4), reference=False),
    "Dropout1d": _Row(lambda: (_normal(2, 3, 4),), _once(0.4), reference=False),
    "Dropout2d": _Row(_image, _once(0.4), reference=False),
    "Dropout3d": _Row(_volume, _once(0.4), reference=False),
    "AlphaDropout": _Row(lambda: (_normal(6, 8),), _once(0.4), reference=False),
    "FeatureAlphaDropout": _Row(_image, _once(0.4), reference=False),
    "DropoutAdd": _Row(_pair, _once(0.4), reference=False),
    "Residual": _Row(_table, (("", (), {"activation": "relu"}),), reference=False),
    "Softmax": _Row(_table, (("", (-1,), {}), ("of columns", (0,), {}))),
    "LogSoftmax": _Row(_table, _once(-1)),
    "Softmin": _Row(_table, _once(-1)),
    "Softmax2d": _Row(_image),
    "CrossEntropyLoss": _Row(
        _classes, (("", (), {}), ("smoothing", (), {"label_smoothing": 0.2, "ignore_index": 2, "reduction": "sum"}))
    ),
    "NLLLoss": _Row(_log_probabilities),
    "MSELoss": _Row(_pair),
    "L1Loss": _Row(_pair, _once(reduction="sum")),
    "SmoothL1Loss": _Row(_pair, _once(beta=0.5)),
    "HuberLoss": _Row(_pair, _once(reduction="none", delta=0.7)),
    "BCEWithLogitsLoss": _Row(_probabilities),
    "L1Penalty": _Row(_weights, _once(0.3), reference=False),
    "L2Penalty": _Row(_weights, _once(0.3), reference=False),
    "ElasticNetPenalty": _Row(_weights, _once(0.3, 0.4), reference=False),
}
_ROWS |= {
    row.module: _Row(_table, reference=row.torch_module is not None)
    for row in ACTIVATIONS.values()
    if row.module is not None
}


def forgotten() -> list[str]:
    """The classes of bp_torch.nn that have no row."""
    return [name for name in nn._OURS if name not in _ROWS]


def cases() -> Iterator[Case]:
    """Every class of bp_torch.nn, every activation fused into a dense layer, and functions that no module calls."""
    for name in nn._OURS:
        if (row := _ROWS.get(name)) is None:
            continue
        for variant, arguments, options in row.arguments:
            yield Case(
                f"nn.{name} {variant}".rstrip(),
                lambda name=name, a=arguments, o=options: _module(getattr(nn, name), a, o),  # type: ignore[misc]
                row.inputs,
                (lambda name=name, a=arguments, o=options: getattr(torch.nn, name)(*a, **o))  # type: ignore[misc]
                if row.reference
                else None,
                quick=not variant or len(row.arguments) == 1,
            )
    for key in ACTIVATIONS:
        yield Case(
            f"nn.Dense {key}",
            lambda key=key: _module(nn.Dense, (6, 3), {"activation": key}),  # type: ignore[misc]
            _table,
            quick=key in ("relu", "gelu"),
        )
    yield Case("functional.mlp", lambda: _mlp, _mlp_inputs)
    yield Case(
        "functional.cross_entropy probabilities",
        lambda: functional.cross_entropy,
        lambda: (_normal(4, 6), _normal(4, 6, seed=1).softmax(1)),
        lambda: torch.nn.functional.cross_entropy,
    )


def _module(kind: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> torch.nn.Module:
    """A module with the same parameters each time; a residual block gets its branch here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind is nn.Residual:
            arguments = (nn.Linear(6, 6), *arguments)
        made: torch.nn.Module = kind(*arguments, **options)
    return made


def _mlp(x: Tensor, W1: Tensor, W2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return functional.mlp(x, [W1, W2], [b1, b2], activation="tanh")


def _mlp_inputs() -> tuple[Any, ...]:
    shapes = [(4, 6), (5, 6), (3, 5), (5,), (3,)]
    return tuple(_normal(*shape, seed=i) for i, shape in enumerate(shapes))
