"""The cases of softmax and of the losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from case_tools import Case, away_from, tensors
from torch import Tensor

import bp_torch.functional as bpF


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
