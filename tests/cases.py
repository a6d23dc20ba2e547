"""The one table of cases: tests and benchmarks read it.

A case is one way to call a Function, beside the same computation by torch. Its inputs are float64, away from kinks,
and small enough for gradcheck. Random choices (a dropout mask, a target) are constants of the case, so that a case is
a pure function of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch.backends import current_backend, mask_of
from bp_torch.functions.activation import ACTIVATIONS, activation_backward
from bp_torch.functions.batch_norm import BatchNormFunction, NormalizeFunction
from bp_torch.functions.dense import DenseFunction
from bp_torch.functions.dropout import AlphaDropoutFunction, DropoutFunction, is_seed
from bp_torch.functions.function import call
from bp_torch.functions.penalty import PenaltyFunction
from bp_torch.functions.residual import ResidualFunction
from bp_torch.triton_kernels import random

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
        generator = torch.Generator("cpu").manual_seed(seed)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
        return tuple((scale * t).to(device) for t in made)

    return make


SEED = 20250
"""Its masks have both values in every shape used here."""


def fixed_mask(*shape: int, p: float = 0.5) -> Tensor:
    """A mask that is the same at each call and has both values: the one that the kernels draw from SEED."""
    where_kernels_run = "cuda" if torch.cuda.is_available() else "cpu"
    mask = random.mask(torch.tensor([SEED], device=where_kernels_run), shape, p).to(torch.get_default_device())
    assert 0 < mask.sum() < mask.numel(), "choose another SEED"
    return mask


def written_out(mask: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The boolean mask, from what ``draw_mask`` gave: the mask itself, or the seed that the kernels draw it from."""
    return mask_of(mask, shape, p) if is_seed(mask) else mask


def drawn(mask: Tensor) -> Tensor:
    """What a Function is given for this mask: the mask, or the seed of it where the kernels run."""
    return torch.tensor([SEED], device=mask.device) if current_backend() == "triton" else mask


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
        # torch's own operator has no second derivative.
        "hardsigmoid": lambda x: F.relu6(x + 3) / 6,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return special.get(key) or getattr(F, key)


def activation_backward_cases() -> Iterator[Case]:
    """The pullback as a function of dy and of what was saved: what create_graph differentiates."""
    mask = fixed_mask(4, 3)
    for key in ("sigmoid", "tanh", "softplus", "gelu", "silu", "mish"):
        row = ACTIVATIONS[key]
        values = tuple(row.parameters.values())
        made = tensors((4, 3), (4, 3), seed=9)
        for p in (0.0, 0.5):

            def ours(dy, s, key=key, values=values, p=p):
                return activation_backward(dy, s, key, values, drawn(mask) if p else None, p)

            def theirs(dy, s, row=row, values=values, p=p):
                return (dy * mask / (1 - p) if p else dy) * row.df(s.float() if s.dtype.itemsize < 4 else s, *values)

            yield Case(
                name=f"activation-backward-{key}" + ("-dropout" if p else ""),
                function="ActivationBackwardFunction",
                ours=ours,
                theirs=lambda dy, s, theirs=theirs: theirs(dy, s).to(dy.dtype),
                # An output of softplus is positive.
                inputs=lambda made=made: (made()[0], made()[1].abs() + 0.1),
                batch_dim=None,  # s and the mask belong to a whole batch
            )


def dense_cases() -> Iterator[Case]:
    mask = fixed_mask(4, 3)
    for key in ("identity", "relu", "tanh", "gelu", "hardtanh"):
        for p in (0.0, 0.5):
            for residual in (False, True):
                suffix = ("-dropout" if p else "") + ("-residual" if residual else "")
                values = tuple(ACTIVATIONS[key].parameters.values())

                def ours(x, W, b, r=None, key=key, values=values, p=p):
                    return first(call(DenseFunction, x, W, b, r, drawn(mask) if p else None, p, key, values))

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
        name="linear",
        function="LinearFunction",
        ours=lambda x, W, b: bpF.linear(x, W, b),
        theirs=lambda x, W, b: F.linear(x, W, b),
        inputs=tensors((4, 5), (3, 5), (3,), seed=1),
        batch_dim=0,
    )
    yield Case(
        name="linear-no-bias-3d",
        function="LinearFunction",
        ours=lambda x, W: bpF.linear(x, W),
        theirs=lambda x, W: F.linear(x, W),
        inputs=tensors((2, 3, 5), (4, 5)),
    )


def mlp_cases() -> Iterator[Case]:
    for key, bias, recompute, hidden in (
        ("tanh", True, False, 2),
        ("gelu", True, False, 2),
        ("relu", False, False, 1),
        ("identity", True, False, 1),
        ("silu", True, True, 2),
        ("tanh", False, True, 1),
        ("gelu", True, False, 0),
    ):
        widths = (3, *(2,) * hidden, 2)
        shapes = [(b, a) for a, b in pairwise(widths)]

        def split(layers, bias=bias):
            return (layers[::2], layers[1::2]) if bias else (layers, None)

        def ours(x, *layers, key=key, recompute=recompute, split=split):
            return bpF.mlp(x, *split(layers), activation=key, recompute=recompute)

        def theirs(x, *layers, key=key, split=split):
            Ws, bs = split(layers)
            for index, W in enumerate(Ws):
                x = F.linear(x, W, None if bs is None else bs[index])
                x = torch_activation(key)(x) if index < len(Ws) - 1 else x
            return x

        layers = [size for W in shapes for size in ((W, W[:1]) if bias else (W,))]
        yield Case(
            name=f"mlp-{hidden}-{key}{'' if bias else '-no-bias'}{'-recompute' if recompute else ''}",
            function="MLPFunction",
            ours=ours,
            theirs=theirs,
            inputs=tensors((3, 3), *layers, seed=3),
        )


def dropout_cases() -> Iterator[Case]:
    for form, function in (("dropout", DropoutFunction), ("alpha-dropout", AlphaDropoutFunction)):
        for channels in (False, True):
            for p in (0.3, 1.0):
                shape = (2, 3, 2)
                mask = fixed_mask(2, 3, 1) if channels else fixed_mask(*shape, p=min(p, 0.5))
                mask = mask & (p < 1)
                plain = function is DropoutFunction and not channels and p < 1

                def theirs(x, form=form, mask=mask, p=p):
                    if p == 1:
                        return x * torch.zeros_like(x)
                    if form == "dropout":
                        return x * (mask.to(x.dtype) / (1 - p))
                    # As ATen's _dropout_impl does it.
                    alpha = 1.7580993408473766
                    a = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
                    noise = mask.to(x.dtype)
                    return x * (noise * a) + ((noise - 1) * (alpha * a) + alpha * a * p)

                yield Case(
                    name=("feature-" if channels else "") + form + ("-all" if p == 1 else ""),
                    function=function.__name__,
                    ours=lambda x, function=function, mask=mask, p=p, plain=plain: call(
                        function, x, drawn(mask) if plain else mask, p
                    ),
                    theirs=theirs,
                    inputs=tensors(shape, seed=2),
                    batch_dim=None,  # the mask belongs to a whole batch
                    piecewise_linear=True,
                )


def residual_cases() -> Iterator[Case]:
    mask = fixed_mask(4, 3)
    for key in ("identity", "relu", "tanh", "gelu", "leaky_relu"):
        for p in (0.0, 0.5):
            values = tuple(ACTIVATIONS[key].parameters.values())

            def theirs(branch, residual, key=key, values=values, p=p):
                z = residual + (branch * (mask.to(branch.dtype) / (1 - p)) if p else branch)
                return torch_activation(key)(z, *values)

            yield Case(
                name=f"residual-{key}" + ("-dropout" if p else ""),
                function="ResidualFunction",
                ours=lambda branch, residual, key=key, values=values, p=p: first(
                    call(ResidualFunction, branch, residual, drawn(mask) if p else None, p, key, values)
                ),
                theirs=theirs,
                inputs=tensors((4, 3), (4, 3), seed=4),
                batch_dim=None,  # the residual and the mask belong to a whole batch
                piecewise_linear=key in ("identity", "relu", "leaky_relu"),
            )


def penalty_cases() -> Iterator[Case]:
    for name, l1, l2 in (("l1", 0.3, 0.0), ("l2", 0.0, 0.7), ("elastic-net", 0.3, 0.7)):
        yield Case(
            name=f"penalty-{name}",
            function="PenaltyFunction",
            ours=lambda *ws, l1=l1, l2=l2: call(PenaltyFunction, l1, l2, *ws),
            theirs=lambda *ws, l1=l1, l2=l2: sum(
                (l1 * w.abs().sum() if l1 else 0) + (l2 * (w * w).sum() if l2 else 0) for w in ws
            ),
            inputs=away_from((0.0,), tensors((3, 2), (4,), (), seed=5)),
            batch_dim=None,
            piecewise_linear=l2 == 0,
        )


def batch_norm_cases() -> Iterator[Case]:
    eps = 1e-3
    shapes = {"2d": (4, 3), "nchw": (2, 3, 2, 2)}

    def torch_form(x, weight, bias, residual, key, mean=None, var=None):
        z = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, eps)
        return torch_activation(key)(z if residual is None else z + residual, *ACTIVATIONS[key].parameters.values())

    for key in ("identity", "relu", "tanh", "gelu"):
        for residual in (False, True):
            shape = shapes["nchw" if key == "gelu" else "2d"]
            yield Case(
                name=f"batch-norm-{key}" + ("-residual" if residual else ""),
                function="BatchNormFunction",
                ours=lambda x, w, b, r=None, key=key: bpF.batch_norm_act(
                    x, None, None, w, b, r, True, eps=eps, activation=key
                ),
                theirs=lambda x, w, b, r=None, key=key: torch_form(x, w, b, r, key),
                # A seed with which each channel has values on both sides of relu's kink.
                inputs=tensors(shape, (3,), (3,), *([shape] if residual else []), seed=8),
                batch_dim=None,
            )
    yield Case(
        name="batch-norm-no-affine",
        function="BatchNormFunction",
        ours=lambda x: bpF.batch_norm(x, None, None, training=True, eps=eps),
        theirs=lambda x: torch_form(x, None, None, None, "identity"),
        inputs=tensors(shapes["2d"], seed=5),
        batch_dim=None,
    )

    def with_statistics(x, w, b, key):
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch_form(x, w, b, None, key), wide.mean(dims), wide.var(dims, correction=0)

    for key in ("identity", "silu", "softplus"):
        yield Case(
            name=f"batch-norm-{key}-statistics",
            function="BatchNormFunction",
            ours=lambda x, w, b, key=key: call(
                BatchNormFunction, x, w, b, None, None, 0.0, eps, key, tuple(ACTIVATIONS[key].parameters.values())
            ),
            theirs=lambda x, w, b, key=key: with_statistics(x, w, b, key),
            inputs=tensors((4, 2), (2,), (2,), seed=6),
            batch_dim=None,
        )

    def statistics(x):
        return x.new_tensor([0.25, -1.0, 0.125]), x.new_tensor([0.5, 2.0, 1.25])

    for key in ("identity", "relu", "gelu"):
        yield Case(
            name=f"batch-norm-{key}-evaluation",
            function="NormalizeFunction",
            ours=lambda x, w, b, key=key: bpF.batch_norm_act(x, *statistics(x), w, b, eps=eps, activation=key),
            theirs=lambda x, w, b, key=key: torch_form(x, w, b, None, key, *statistics(x)),
            inputs=tensors(shapes["nchw"], (3,), (3,), seed=7),
        )

    def normalized(x, w, b, r, m, v):
        return F.silu((x - m) / (v + eps).sqrt() * w + b + r)

    yield Case(
        name="batch-norm-silu-residual-evaluation-statistics",
        function="NormalizeFunction",
        # exp: a variance is positive
        ours=lambda x, w, b, r, m, v: bpF.batch_norm_act(x, m, v.exp(), w, b, r, eps=eps, activation="silu"),
        theirs=lambda x, w, b, r, m, v: normalized(x, w, b, r, m, v.exp()),
        inputs=tensors(shapes["2d"], (3,), (3,), shapes["2d"], (3,), (3,), seed=10),
        batch_dim=None,
    )
    yield from batch_norm_dropout_cases(eps, torch_form)


def batch_norm_dropout_cases(eps: float, torch_form: Callable[..., Tensor]) -> Iterator[Case]:
    """Training, and evaluation with a dropout that acts all the same (a frozen batch norm)."""
    p = 0.5
    for key, shape, residual in (
        ("identity", (4, 3), False),
        ("relu", (4, 3), False),
        ("relu", (4, 3), True),
        ("tanh", (4, 3), False),
        ("leaky_relu", (4, 3), True),
        ("gelu", (2, 3, 2, 2), False),
        ("gelu", (4, 3), True),
    ):
        values = tuple(ACTIVATIONS[key].parameters.values())
        mask = fixed_mask(*shape, p=p)
        made = tensors(shape, (3,), (3,), *([shape] if residual else []), seed=8)
        suffix = "dropout" + ("-residual" if residual else "")

        def training(x, w, b, r=None, key=key, values=values, mask=mask):
            return first(call(BatchNormFunction, x, w, b, r, drawn(mask), p, eps, key, values))

        yield Case(
            name=f"batch-norm-{key}-{suffix}",
            function="BatchNormFunction",
            ours=training,
            theirs=lambda x, w, b, r=None, key=key, mask=mask: torch_form(x, w, b, r, key) * mask / (1 - p),
            inputs=made,
            batch_dim=None,
        )

        def frozen(x, w, b, m, v, r=None, key=key, values=values, mask=mask):
            return call(NormalizeFunction, x, w, b, r, m, v.exp(), drawn(mask), p, eps, key, values)

        def frozen_theirs(x, w, b, m, v, r=None, key=key, mask=mask):
            of_channel = [t.reshape(1, 3, *[1] * (x.dim() - 2)) for t in (w, b, m, v)]
            w, b, m, v = of_channel
            z = (x - m) / (v.exp() + eps).sqrt() * w + b
            z = z if r is None else z + r
            return torch_activation(key)(z, *ACTIVATIONS[key].parameters.values()) * mask / (1 - p)

        if key != "leaky_relu":
            yield Case(
                name=f"batch-norm-{key}-{suffix}-evaluation",
                function="NormalizeFunction",
                ours=frozen,
                theirs=frozen_theirs,
                inputs=tensors(shape, (3,), (3,), (3,), (3,), *([shape] if residual else []), seed=12),
                batch_dim=None,
            )


def softmax_cases() -> Iterator[Case]:
    for name, dim in (("softmax", 1), ("softmax", 0), ("log_softmax", 1), ("log_softmax", 0), ("softmin", -1)):
        yield Case(
            name=f"{name}-dim={dim}",
            function="LogSoftmaxFunction" if name == "log_softmax" else "SoftmaxFunction",
            ours=lambda x, name=name, dim=dim: getattr(bpF, name)(x, dim),
            theirs=lambda x, name=name, dim=dim: getattr(F, name)(x, dim),
            inputs=tensors((4, 3), scale=2.0),
            batch_dim=0 if dim else 1,
        )
    yield Case(
        name="softmax-4d",
        function="SoftmaxFunction",
        ours=lambda x: bpF.softmax(x, -3),
        theirs=lambda x: F.softmax(x, -3),
        inputs=tensors((2, 3, 2, 2)),
    )


def cross_entropy_cases() -> Iterator[Case]:
    classes = torch.tensor([2, 0, 3, 2, 1])
    spatial = torch.tensor([[[1, 0], [2, 1]], [[0, 2], [2, 0]]])
    weight = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
    for options in (
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"weight": weight},
        {"ignore_index": 2},
        {"label_smoothing": 0.2},
        {"weight": weight, "ignore_index": 2, "label_smoothing": 0.2},
        {"weight": weight, "ignore_index": 2, "label_smoothing": 0.2, "reduction": "none"},
    ):
        yield _class_case("cross_entropy", "CrossEntropyFunction", (5, 4), classes, options)
        if "label_smoothing" not in options:
            yield _class_case("nll_loss", "NLLLossFunction", (5, 4), classes, options)
    yield _class_case("cross_entropy", "CrossEntropyFunction", (2, 3, 2, 2), spatial, {"label_smoothing": 0.1}, "-4d")
    yield _class_case(
        "cross_entropy", "CrossEntropyFunction", (2, 3, 2), spatial[:, 0].contiguous(), {"ignore_index": 1}, "-3d"
    )
    yield _class_case("cross_entropy", "CrossEntropyFunction", (4,), classes[0], {}, "-unbatched")
    yield _class_case("nll_loss", "NLLLossFunction", (2, 3, 2, 2), spatial, {"ignore_index": 1}, "-4d")

    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.2}):
        for shape, weighted in (((5, 4), False), ((3, 4, 2), True)):
            suffix = "".join(f"-{key}={value}" for key, value in options.items()) + "-weight" * weighted

            def ours(x, q, w=None, options=options):
                return bpF.cross_entropy(x, q, w, **options)

            def theirs(x, q, w=None, options=options):
                return F.cross_entropy(x, q, w, **options)

            yield Case(
                name=f"cross_entropy-probabilities{suffix}",
                function="CrossEntropyProbabilitiesFunction",
                ours=ours,
                theirs=theirs,
                inputs=lambda shape=shape, weighted=weighted: _probability_inputs(shape, weighted),
                batch_dim=None,
            )


def _probability_inputs(shape: tuple[int, ...], weighted: bool) -> tuple[Tensor, ...]:
    x, q, w = tensors(shape, shape, (shape[1],), seed=2)()
    return (x, q.softmax(1), w.exp()) if weighted else (x, q.softmax(1))


def _class_case(
    name: str, function: str, shape: tuple[int, ...], target: Tensor, options: dict[str, Any], suffix: str = ""
) -> Case:
    """The target belongs to a whole batch, so that the batch cannot be taken apart or be empty."""
    named = "".join(f"-{key}" if isinstance(value, Tensor) else f"-{key}={value}" for key, value in options.items())

    def given(x: Tensor) -> dict[str, Any]:
        return {key: value.to(x) if isinstance(value, Tensor) else value for key, value in options.items()}

    return Case(
        name=f"{name}{suffix}{named}",
        function=function,
        ours=lambda x: getattr(bpF, name)(x, target, **given(x)),
        theirs=lambda x: getattr(F, name)(x, target, **given(x)),
        inputs=tensors(shape, seed=2),
        batch_dim=None,
        piecewise_linear=name == "nll_loss",
    )


def error_loss_cases() -> Iterator[Case]:
    rows: list[tuple[str, dict[str, float], tuple[float, ...]]] = [
        ("mse_loss", {}, ()),
        ("l1_loss", {}, (0.0,)),
        ("smooth_l1_loss", {"beta": 0.5}, (-0.5, 0.5)),
        ("smooth_l1_loss", {"beta": 0.0}, (0.0,)),
        ("huber_loss", {"delta": 0.7}, (-0.7, 0.7)),
    ]
    for name, parameters, kinks in rows:
        for reduction in ("none", "mean", "sum"):
            for weighted in (False, True):
                if weighted and name == "smooth_l1_loss":
                    continue
                options = {**parameters, "reduction": reduction}

                def ours(x, t, w=None, name=name, options=options):
                    f = getattr(bpF, name)
                    return f(x, t, **options) if w is None else f(x, t, weight=w, **options)

                def theirs(x, t, w=None, name=name, options=options):
                    f = getattr(F, name)
                    return f(x, t, **options) if w is None else f(x, t, weight=w, **options)

                yield Case(
                    name=f"{name}{''.join(f'-{key}={value}' for key, value in options.items())}{'-weight' * weighted}",
                    function="ErrorLossFunction",
                    ours=ours,
                    theirs=theirs,
                    inputs=lambda kinks=kinks, weighted=weighted: _error_inputs(kinks, weighted),
                    batch_dim=None,
                    # With a weight, its product with x - t bends; Σw in the mean does too.
                    piecewise_linear=kinks == (0.0,) and not weighted,
                )


def _error_inputs(kinks: tuple[float, ...], weighted: bool) -> tuple[Tensor, ...]:
    """x and t whose difference lies away from the kinks."""
    x, t, w = tensors((4, 3), (4, 3), (4, 3), seed=4)()
    (error,) = away_from(kinks, lambda: (x - t,))()
    return (t + error, t, w.exp()) if weighted else (t + error, t)


def bce_cases() -> Iterator[Case]:
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for options in (
        {},
        {"reduction": "none"},
        {"reduction": "sum", "weight": weight},
        {"pos_weight": weight},
        {"weight": weight.flip(0), "pos_weight": weight, "reduction": "none"},
    ):

        def given(x, options=options):
            return {key: value.to(x) if isinstance(value, Tensor) else value for key, value in options.items()}

        logits, target = tensors((4, 3), seed=5), tensors((4, 3), seed=6)
        yield Case(
            name="bce_with_logits" + "".join(f"-{k}={v}" if k == "reduction" else f"-{k}" for k, v in options.items()),
            function="BCEWithLogitsFunction",
            ours=lambda x, t, given=given: bpF.binary_cross_entropy_with_logits(x, t, **given(x)),
            theirs=lambda x, t, given=given: F.binary_cross_entropy_with_logits(x, t, **given(x)),
            inputs=lambda logits=logits, target=target: (*logits(), torch.sigmoid(*target())),
            batch_dim=None,
        )


def all_cases() -> list[Case]:
    """The table, on the current default device."""
    return [
        *activation_cases(),
        *activation_backward_cases(),
        *dense_cases(),
        *mlp_cases(),
        *batch_norm_cases(),
        *dropout_cases(),
        *residual_cases(),
        *penalty_cases(),
        *softmax_cases(),
        *cross_entropy_cases(),
        *error_loss_cases(),
        *bce_cases(),
    ]


CASES = all_cases()


@cache
def on_device(device: str) -> dict[str, Case]:
    """The table by name, with its inputs, masks and targets on another device."""
    with torch.device(device):
        cases = all_cases()

    def moved(case: Case) -> Case:  # some cases make their inputs at the call, on the default device of that time
        return replace(case, inputs=lambda: tuple(t.to(device) for t in case.inputs()))

    return {case.name: moved(case) for case in cases}
