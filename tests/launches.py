"""Specializes and compiles every launch of the layers in one dtype, without a GPU, and writes what failed as JSON.

Run by test_launches.py, as a process of its own. The launches are those of every case of the table; then those of each
option of each layer, in odd sizes and in a size of 1. ``stage`` is where a compilation ends: errors in a launch's
arguments show at "ttir", the first one; "cubin" is all of it, and compiles every block that autotuning may try too::

    python tests/launches.py float32 ttir
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product

import stub_driver
import torch
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF

Call = Callable[[], object]
SHAPES = ((1, 1), (1, 9), (9, 1), (3, 16), (131, 1031), (2, 20_000))
"""Rows and columns: of 1, less than a block, several blocks, a row too long to keep; multiples of 16 or not."""
REDUCTIONS = ("none", "sum", "mean")


def leaf(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def both(y: Tensor, *inputs: Tensor) -> None:
    """The backward pass."""
    torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)


def twice(y: Tensor, *inputs: Tensor) -> None:
    """The backward pass, and that of its result."""
    first = torch.autograd.grad(y, inputs, torch.ones_like(y), create_graph=True)
    torch.autograd.grad(first, inputs, [torch.ones_like(g) for g in first], allow_unused=True)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    from cases import CASES

    for case in CASES:

        def run(case=case) -> None:
            inputs = tuple(t.to(dtype).requires_grad_() for t in case.inputs())
            ys = case.ours(*inputs)
            ys = ys if isinstance(ys, tuple) else (ys,)
            torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys], allow_unused=True)

        yield case.name, run


def sizes(rows: int, columns: int) -> Iterator[tuple[str, Call]]:
    """Each layer, with all that it can do at once, in one size."""
    x, r, b = leaf(rows, columns), leaf(rows, columns), leaf(columns)
    t, q, w = torch.zeros(rows, dtype=torch.long), leaf(rows, columns), torch.ones(columns)
    yield "gelu", lambda: twice(bpF.gelu(x), x)
    yield "unaligned relu", lambda: both(bpF.relu(x.reshape(-1)[1:]), x)
    yield "dropout", lambda: both(bpF.dropout(x, 0.3), x)
    yield "residual", lambda: twice(bpF.residual(x, r, activation="tanh", p=0.5), x, r)
    yield "softmax", lambda: both(bpF.softmax(x, 1), x)
    yield "log-softmax", lambda: both(bpF.log_softmax(x, 0), x)
    yield "cross-entropy", lambda: both(bpF.cross_entropy(x, t, w, label_smoothing=0.1), x)
    yield "probabilities", lambda: both(bpF.cross_entropy(x, q, w, label_smoothing=0.1), x, q)
    yield "nll", lambda: both(bpF.nll_loss(x, t, w), x)
    yield "mse", lambda: both(bpF.mse_loss(x, q, weight=r), x, q, r)
    yield "bce", lambda: both(bpF.binary_cross_entropy_with_logits(x, q, w, pos_weight=w), x, q)
    yield "elastic net", lambda: both(bpF.elastic_net_penalty([x, b], 0.1), x, b)
    for y in (x, leaf(rows, 1, columns)):  # rows, and planes
        channels = y.shape[1]
        training = y.numel() > channels  # which one value cannot be trained on
        c, mean, var = leaf(channels), torch.zeros(channels), torch.ones(channels)
        yield (
            f"batch norm {y.shape}",
            lambda y=y, c=c, mean=mean, var=var, training=training: both(
                bpF.batch_norm_act(y, mean, var, c, c, y, training, activation="silu"), y, c
            ),
        )
    if columns < 2000:
        for K, N in ((columns, 5), (5, columns)):
            z, W = leaf(rows, K), leaf(N, K)
            c, s = leaf(N), leaf(rows, N)

            def dense(z=z, W=W, c=c, s=s) -> None:
                both(bpF.dense(z, W, c, s, activation="gelu", p=0.1), z, W, c, s)

            yield f"dense {K}", dense
            yield f"dense by Triton {K}", lambda dense=dense: by_triton(dense)
    if columns <= 16:
        for layers in (1, 2):
            Ws = [leaf(n, m) for m, n in ((columns, 16), (16, 16), (16, columns))[:: 3 - layers]]
            yield f"mlp {layers}", lambda Ws=Ws: both(bpF.mlp(x, Ws, [leaf(len(W)) for W in Ws]), x, *Ws)


def options() -> Iterator[tuple[str, Call]]:
    """Each layer with each of its options, in one size."""
    x, r, b, q = leaf(20, 48), leaf(20, 48), leaf(48), leaf(20, 48)
    t, w, W = torch.zeros(20, dtype=torch.long), torch.ones(48), leaf(48, 48)
    yield "partial sums", lambda: stub_driver.kernels().loss.finish(torch.zeros(2, 9000).double(), x.dtype, None, True)
    for p in (0.5, 1e-5, 1.0):  # bits: 16, 32, none
        for y in (leaf(4, 16, 3, 5), leaf(4, 16, 3, 5).to(memory_format=torch.channels_last)):
            yield f"dropout {p} {y.stride()}", lambda p=p, y=y: both(bpF.dropout(y, p), y)
    for key, p, bias, residual in product(("identity", "leaky_relu", "silu"), (0.0, 0.5), (False, True), (False, True)):

        def dense(key=key, p=p, bias=bias, residual=residual) -> None:
            both(bpF.dense(x, W, b if bias else None, r if residual else None, activation=key, p=p), x, W, b, r)

        yield f"dense {key} {p} {bias} {residual}", dense
        yield f"dense by Triton {key} {p} {bias} {residual}", lambda dense=dense: by_triton(dense)
    yield "dense in TF32", lambda: by_triton(lambda: both(bpF.linear(x, W, b), x, W, b), "tf32")
    for shape, residual, training, key in product(
        ((20, 48), (4, 16, 3, 5), (4, 16, 300)), (False, True), (False, True), ("identity", "relu", "gelu")
    ):
        y, s = leaf(*shape), leaf(*shape) if residual else None
        g, mean, var = leaf(shape[1]), torch.zeros(shape[1]), torch.ones(shape[1])

        def batch_norm(y=y, s=s, g=g, mean=mean, var=var, training=training, key=key) -> None:
            z = bpF.batch_norm_act(y, mean, var, g, g, s, training, activation=key)
            both(z, y, g, *([] if s is None else [s]))

        yield f"batch norm {shape} {residual} {training} {key}", batch_norm
    split = leaf(5000, 48)
    yield "batch norm in splits", lambda: both(bpF.batch_norm(split, None, None, b, b, True), split, b)
    for reduction in REDUCTIONS:
        for weight, smoothing in product((None, w), (0.0, 0.1)):

            def entropies(reduction=reduction, weight=weight, smoothing=smoothing) -> None:
                both(bpF.cross_entropy(x, t, weight, reduction=reduction, label_smoothing=smoothing), x)
                for wanted in ((x,), (q,), (x, q)):  # the others are frozen
                    given = [z if any(z is one for one in wanted) else z.detach() for z in (x, q)]
                    both(bpF.cross_entropy(*given, weight, reduction=reduction, label_smoothing=smoothing), *wanted)

            yield f"cross-entropy {reduction} {weight is not None} {smoothing}", entropies
            yield (
                f"nll {reduction} {weight is not None}",
                lambda reduction=reduction, weight=weight: both(bpF.nll_loss(x, t, weight, reduction=reduction), x),
            )
        yield (
            f"smooth_l1_loss {reduction}",
            lambda reduction=reduction: both(bpF.smooth_l1_loss(x, q, reduction=reduction), x, q),
        )
        for name, weight in product(("mse_loss", "l1_loss", "huber_loss"), (None, r)):
            yield (
                f"{name} {reduction} {weight is not None}",
                lambda name=name, reduction=reduction, weight=weight: both(
                    getattr(bpF, name)(x, q, reduction=reduction, weight=weight), x, q, *([] if weight is None else [r])
                ),
            )
        for weight, positive in product((None, w), (None, w)):
            yield (
                f"bce {reduction} {weight is not None} {positive is not None}",
                lambda reduction=reduction, weight=weight, positive=positive: both(
                    bpF.binary_cross_entropy_with_logits(x, q, weight, reduction=reduction, pos_weight=positive), x, q
                ),
            )
    for name in ("l1_penalty", "l2_penalty", "elastic_net_penalty"):
        yield name, lambda name=name: both(getattr(bpF, name)([x, b, x[1:, 1:]], 0.1), x, b)
    for key, recompute in product(("relu", "gelu"), (False, True)):
        yield (
            f"mlp {key} {recompute}",
            lambda key=key, recompute=recompute: both(
                bpF.mlp(x, [W, W, W], [b, b, b], activation=key, recompute=recompute), x, W, b
            ),
        )


def by_triton(run: Call, precision: str = "ieee") -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        with stub_driver.kernels().dense.using("triton"):
            run()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    yield from cases(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for shape in SHAPES:
            yield from ((f"{name} {shape}", call) for name, call in sizes(*shape))
        yield from options()
        with stub_driver.wide():  # as for tensors of more than 2³¹ elements
            yield from ((f"{name} wide", call) for name, call in sizes(20, 48))
    finally:
        torch.set_default_dtype(before)


def main(dtype: str, stage: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # compiled once in a run, and anew in the next
        stub_driver.install(stage, folder)
        torch.set_num_threads(1)
        failed = []
        with bp_torch.backend("triton"):
            for name, call in calls(getattr(torch, dtype)):
                try:
                    call()
                except Exception as error:
                    failed.append(f"{name}: {type(error).__name__}: {str(error)[-500:]}")
    json.dump({"launched": stub_driver.LAUNCHED, "compiled": stub_driver.COMPILED, "failed": failed}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
