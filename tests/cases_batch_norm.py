"""The cases of batch norm, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from case_tools import Case, drawn, first, fixed_mask, tensors, torch_activation
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.batch_norm import BatchNormFunction, NormalizeFunction
from bp_torch.functions.epilogue import Epilogue
from bp_torch.functions.function import call


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
                BatchNormFunction, x, w, b, None, None, eps, Epilogue(key, tuple(ACTIVATIONS[key].parameters.values()))
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

    def frozen_form(x, w, b, m, v):
        """torch's layer, whose value is its own, with gradients of the statistics, which it has not."""
        m, v, *of_channel = (t.reshape(1, 3, *[1] * (x.dim() - 2)) for t in (m, v, w, b))
        written = (x - m) / (v + eps).sqrt() * of_channel[0] + of_channel[1]
        value = F.batch_norm(x, m.detach().view(-1), v.detach().view(-1), w, b, False, 0.0, eps)
        return written + (value - written).detach().nan_to_num(0.0)  # the difference of two infinities is NaN

    yield Case(
        name="batch-norm-silu-residual-evaluation-statistics",
        function="NormalizeFunction",
        # exp: a variance is positive
        ours=lambda x, w, b, r, m, v: bpF.batch_norm_act(x, m, v.exp(), w, b, r, eps=eps, activation="silu"),
        theirs=lambda x, w, b, r, m, v: F.silu(frozen_form(x, w, b, m, v.exp()) + r),
        inputs=tensors(shapes["2d"], (3,), (3,), shapes["2d"], (3,), (3,), seed=10),
        batch_dim=None,
    )
    yield from batch_norm_dropout_cases(eps, torch_form, frozen_form)


def batch_norm_dropout_cases(
    eps: float, torch_form: Callable[..., Tensor], frozen_form: Callable[..., Tensor]
) -> Iterator[Case]:
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
            return first(call(BatchNormFunction, x, w, b, r, drawn(mask), eps, Epilogue(key, values, p)))

        yield Case(
            name=f"batch-norm-{key}-{suffix}",
            function="BatchNormFunction",
            ours=training,
            theirs=lambda x, w, b, r=None, key=key, mask=mask: torch_form(x, w, b, r, key) * mask / (1 - p),
            inputs=made,
            batch_dim=None,
        )

        def frozen(x, w, b, m, v, r=None, key=key, values=values, mask=mask):
            return call(NormalizeFunction, x, w, b, r, m, v.exp(), drawn(mask), eps, Epilogue(key, values, p))

        def frozen_theirs(x, w, b, m, v, r=None, key=key, mask=mask):
            z = frozen_form(x, w, b, m, v.exp())
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
