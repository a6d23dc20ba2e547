"""Synchronized batch norm: processes that each hold some rows compute what one process computes with all of them."""

from __future__ import annotations

import datetime
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from seeds import seeded
from torch import Tensor
from torch.autograd import gradcheck

import bp_torch
import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.function import call
from bp_torch.functions.sync_batch_norm import SyncStatisticsFunction

EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROWS = {"two": (3, 5), "three": (2, 1, 4), "one-is-empty": (4, 0, 3), "one-row-each": (1, 1)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "relu"},
    {"activation": "gelu", "residual": True},
    {"affine": False},
    {"momentum": None},
    {"track_running_stats": False},
]


def run_in_group(worker: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """``worker(rank, world, *args)`` in each of ``world`` processes that form a gloo group."""
    # The server imports torch once, and has no threads that a fork could lose.
    multiprocessing.set_forkserver_preload(["bp_torch", "torch.distributed", "torch.multiprocessing"])
    given = (worker, world, str(folder / "store"), bp_torch.backends.current_backend(), args)
    mp.start_processes(_member, given, nprocs=world, start_method="forkserver")


def _member(
    rank: int, worker: Callable[..., None], world: int, store: str, backend: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # conftest.py's warning of float64 and numpy's of infinities, in this process too.
    warnings.filterwarnings("ignore", r"bp_torch: backend 'triton' .* there are no \w+ kernels: the torch formulas run")
    np.seterr(all="ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    try:
        with bp_torch.backend(backend):
            worker(rank, world, *args)
    finally:
        dist.destroy_process_group()


def data(rows: tuple[int, ...], seed: int) -> list[list[Tensor]]:
    """x, r and dy, each in one part a rank; the ranks' means differ, so that merging them matters."""
    generator = seeded(seed)

    def parts() -> list[Tensor]:
        return [10 * i + torch.randn(n, 3, 2, generator=generator).double() for i, n in enumerate(rows)]

    return [parts(), parts(), parts()]


def gathered(t: Tensor, rows: tuple[int, ...]) -> Tensor:
    """All ranks' rows, in order."""
    parts: list[Any] = [None] * len(rows)
    dist.all_gather_object(parts, t.detach())
    return torch.cat(parts)


def summed(t: Tensor) -> Tensor:
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


def equals_one_process(rank: int, world: int, rows: tuple[int, ...]) -> None:
    for options in OPTIONS:
        given = dict(options)
        activation, with_residual = given.pop("activation", None), given.pop("residual", False)
        sync = nn.SyncBatchNorm(3, dtype=torch.float64, activation=activation, **given)
        whole = torch.nn.BatchNorm1d(3, dtype=torch.float64, **given)
        for i, parameter in enumerate(whole.parameters()):
            torch.nn.init.uniform_(parameter, 0.5, 1.0 + i, generator=torch.Generator().manual_seed(i))
        sync.load_state_dict(whole.state_dict())
        for seed in range(2):
            xs, rs, dys = data(rows, seed)
            x, r = xs[rank].clone().requires_grad_(), rs[rank].clone().requires_grad_()
            all_x, all_r = torch.cat(xs).requires_grad_(), torch.cat(rs).requires_grad_()
            y = sync(x, r) if with_residual else sync(x)
            z = whole(all_x) + all_r if with_residual else whole(all_x)
            expected = bpF.activation(z, activation or "identity")
            torch.testing.assert_close(gathered(y, rows), expected, **EXACT)
            parameters = list(sync.parameters())
            inputs, all_inputs = [x, *parameters], [all_x, *whole.parameters()]
            if with_residual:
                inputs, all_inputs = [*inputs, r], [*all_inputs, all_r]
            grads = torch.autograd.grad(y, inputs, dys[rank], create_graph=True)
            exact = torch.autograd.grad(expected, all_inputs, torch.cat(dys), create_graph=True)
            # A gradient penalty, whose own gradient passes through the statistics twice.
            again = torch.autograd.grad(grads[0].sin().sum(), inputs, allow_unused=True, materialize_grads=True)
            exact_again = torch.autograd.grad(
                exact[0].sin().sum(), all_inputs, allow_unused=True, materialize_grads=True
            )
            for ours, theirs in ((grads, exact), (again, exact_again)):
                for g, e in zip(ours, theirs, strict=True):
                    total = summed(g) if g.dim() == 1 else gathered(g, rows)
                    torch.testing.assert_close(total, e, **EXACT)
            torch.testing.assert_close(dict(sync.named_buffers()), dict(whole.named_buffers()), **EXACT)
        if sync.track_running_stats:
            torch.testing.assert_close(sync.eval()(x, r), bpF.activation(whole.eval()(x) + r, activation or "identity"))


SYNCHRONIZED = ["SyncStatisticsFunction", "AllReduceFunction"]


@pytest.mark.contract("backward", function=SYNCHRONIZED)
@pytest.mark.contract("double backward", function=SYNCHRONIZED)
@pytest.mark.contract("edges", function=SYNCHRONIZED)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_equals_one_process_with_all_rows(rows: tuple[int, ...], tmp_path: Path) -> None:
    """On the CPU, where torch's own SyncBatchNorm raises."""
    run_in_group(equals_one_process, len(rows), tmp_path, rows)


def other_uses(rank: int, world: int) -> None:
    # One value a channel over all ranks is refused on every rank, and nobody waits for ever.
    x = torch.randn(1 if rank == 0 else 0, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel over all ranks"):
        nn.SyncBatchNorm(3)(x)
    # A group of one is an ordinary batch norm.
    groups = [dist.new_group([i]) for i in range(world)]
    x = torch.randn(4, 3)
    alone = nn.SyncBatchNorm(3, process_group=groups[rank])
    torch.testing.assert_close(alone(x), torch.nn.BatchNorm1d(3)(x))
    # 16-bit rows, float32 statistics; a mean of 1e5 costs nothing.
    generator = torch.Generator().manual_seed(0)
    rows = 1e5 + torch.randn(world, 50, 3, generator=generator)
    sync = nn.SyncBatchNorm(3, momentum=1.0)
    assert sync(rows[rank].bfloat16()).dtype == torch.bfloat16
    sync(rows[rank])
    torch.testing.assert_close(sync.running_var.double(), rows.double().view(-1, 3).var(0), rtol=1e-5, atol=0)
    # Forward mode.
    exact = nn.SyncBatchNorm(3, dtype=torch.float64)
    x, t = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(rank)).double()
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda x: bpF.sync_batch_norm(x, None, None, exact.weight), (x,), (t,))
    xs, ts = gathered(x, (4,) * world), gathered(t, (4,) * world)
    expected = torch.func.jvp(lambda x: torch.nn.functional.batch_norm(x, None, None, training=True), (xs,), (ts,))
    torch.testing.assert_close(gathered(tangent, (4,) * world), expected[1], **EXACT)


@pytest.mark.contract("forward mode", function=SYNCHRONIZED)
@pytest.mark.contract("dtypes", function=SYNCHRONIZED)
def test_refusals_groups_dtypes_and_forward_mode(tmp_path: Path) -> None:
    run_in_group(other_uses, 2, tmp_path)


def data_parallel(rank: int, world: int) -> None:
    """DistributedDataParallel with converted layers follows one process over the whole batch."""
    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
    part = nn.DistributedBatchNorm.convert_sync_batchnorm(
        torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
    )
    part.load_state_dict(whole.state_dict())
    ddp = torch.nn.parallel.DistributedDataParallel(part)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (whole, ddp)]
    for _ in range(3):
        x = torch.randn(8, 4).double()
        for module, batch, optimizer in zip((whole, ddp), (x, x.chunk(world)[rank]), optimizers, strict=True):
            optimizer.zero_grad()
            module(batch).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(part.state_dict(), whole.state_dict(), **EXACT)


def test_data_parallel_follows_one_process(tmp_path: Path) -> None:
    run_in_group(data_parallel, 2, tmp_path)


def test_without_a_group_it_is_an_ordinary_batch_norm() -> None:
    x = torch.randn(4, 3, 2)
    for training in (True, False):
        ours, plain = nn.SyncBatchNorm(3).train(training), torch.nn.BatchNorm1d(3).train(training)
        torch.testing.assert_close(ours(x), plain(x))
        torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(nn.SyncBatchNorm(3, track_running_stats=False).double(), (x,))


def test_is_torchs_class_with_its_errors() -> None:
    ours, theirs = nn.SyncBatchNorm(3, 1e-3, None, True, True, None), torch.nn.SyncBatchNorm(3, 1e-3, None)
    assert isinstance(ours, torch.nn.SyncBatchNorm)
    assert repr(ours) == repr(theirs)
    for shape, message in (((3,), "expected at least 2D input"), ((2, 0), "should be non-zero")):
        for bn in (ours, theirs):
            with pytest.raises(ValueError, match=message):
                bn(torch.zeros(shape))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"bias": False}], ids=str)
def test_convert_keeps_parameters_buffers_and_activation(options: dict[str, Any]) -> None:
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3, 1e-3, None, **options),
        torch.nn.Sequential(nn.BatchNormAct2d(3, activation="elu", activation_parameters={"alpha": 0.5}, **options)),
        torch.nn.ReLU(),
    ).eval()
    state, parameters = dict(model.state_dict(keep_vars=True)), list(model.parameters())
    x = torch.randn(4, 3, 2, 2)
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert [type(m) for m in (model[0], model[1][0])] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert (model[0].eps, model[0].momentum, model[0].training) == (1e-3, None, False)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(model.state_dict(keep_vars=True)[name] is value for name, value in state.items())
    assert (model[1][0].activation, model[1][0].activation_parameters) == ("elu", {"alpha": 0.5})
    torch.testing.assert_close(model(x), expected)


def compiled_whole(rank: int, world: int) -> None:
    """One graph gives what eager mode gives, its running statistics too."""
    torch.manual_seed(0)
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((3, 5), {}),
        ((0, 4), {"momentum": None, "activation": "relu"}),
    ]
    for rows, options in cases:
        eager, compiled = (nn.DistributedBatchNorm(3, **options) for _ in range(2))
        step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            x, _, dy = (parts[rank].float() for parts in data(rows, seed))
            results = []
            for module in (eager, step):
                given = x.clone().requires_grad_()
                y = module(given)
                y.backward(dy)
                results.append([y.detach(), given.grad])
            torch.testing.assert_close(results[1], results[0])
        for a, e in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, e.grad)
        torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
    step = torch.compile(nn.DistributedBatchNorm(3), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="more than 1 value per channel over all ranks"):
        step(torch.randn(1 if rank == 0 else 0, 3))


@pytest.mark.one_backend("torch", "compilers run the formulas")
@pytest.mark.filterwarnings("ignore")
def test_compiled_with_full_graph(tmp_path: Path) -> None:
    run_in_group(compiled_whole, 2, tmp_path)


def compiled_derivatives(rank: int, world: int) -> None:
    x = data((2, 3), seed=3)[0][rank]

    def f(x: Tensor) -> Tensor:
        mean, var, _ = call(SyncStatisticsFunction, x, None)
        return (mean * var).sin().sum()

    def derivatives(x: Tensor) -> tuple[Any, ...]:
        return torch.func.grad(f)(x), torch.func.jvp(f, (x,), (torch.cos(x),))

    expected = derivatives(x)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(derivatives, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.one_backend("torch", "while compiling, the torch formulas run whatever the backend")
def test_compiled_derivatives_of_the_statistics(tmp_path: Path) -> None:
    run_in_group(compiled_derivatives, 2, tmp_path)
