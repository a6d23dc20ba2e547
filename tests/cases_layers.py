"""The cases of activations, dense layers, MLPs, dropout, residual sums and penalties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from case_tools import Case, away_from, drawn, first, fixed_mask, tensors, torch_activation

import bp_torch.functional as bpF
from bp_torch.functions.activation import ACTIVATIONS, lookup
from bp_torch.functions.dense import DenseFunction
from bp_torch.functions.dropout import AlphaDropoutFunction, DropoutFunction
from bp_torch.functions.epilogue import Epilogue
from bp_torch.functions.function import call
from bp_torch.functions.penalty import PenaltyFunction
from bp_torch.functions.residual import ResidualFunction


def activation_cases() -> Iterator[Case]:
    for key, row in ACTIVATIONS.items():
        for values in [tuple(row.parameters.values()), *row.examples]:
            parameters = zip(row.parameters.items(), values, strict=True)
            given = {name: value for (name, default), value in parameters if value != default}
            suffix = "".join(f"-{name}={value:g}" for name, value in given.items())
            torch_form = torch_activation(key)
            yield Case(
                name=f"activation-{key}{suffix}",
                function="ActivationFunction",
                ours=lambda x, key=key, given=given: bpF.activation(x, key, given),
                theirs=lambda x, f=torch_form, values=values: f(x, *values),
                inputs=away_from(row.kinks(*values), tensors((5, 3), scale=2.0)),
            )


def activation_backward_cases() -> Iterator[Case]:
    """The pullback as a function of dy and of what was saved: what create_graph differentiates."""
    mask = fixed_mask(4, 3)
    for key in ("sigmoid", "tanh", "softplus", "gelu", "silu", "mish"):
        values = tuple(ACTIVATIONS[key].parameters.values())
        row = lookup(key, values, fused=True)
        made = tensors((4, 3), (4, 3), seed=9)
        for p in (0.0, 0.5):

            def ours(dy, s, key=key, values=values, p=p):
                return Epilogue(key, values, p).backward(dy, s, drawn(mask) if p else None)

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
                    return first(call(DenseFunction, x, W, b, r, drawn(mask) if p else None, Epilogue(key, values, p)))

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
                    call(ResidualFunction, branch, residual, drawn(mask) if p else None, Epilogue(key, values, p))
                ),
                theirs=theirs,
                inputs=tensors((4, 3), (4, 3), seed=4),
                batch_dim=None,  # the residual and the mask belong to a whole batch
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
        )
