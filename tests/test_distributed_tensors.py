"""DTensors: parameters and activations of which each process holds a part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sync_batch_norm import run_in_group
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch import nn

ONE_BACKEND = "a DTensor runs the formulas"


def mesh(world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


def whole(t: Any) -> Tensor:
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full.detach()


def tensor_parallel(rank: int, world: int, compiled: bool) -> None:
    """A Dense whose Function has one output, and one whose has z beside it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    x = torch.randn(8, 16)
    for activation in ("relu", "gelu"):
        alone = nn.Dense(16, 32, activation=activation)
        layer = nn.Dense(16, 32, activation=activation)
        layer.load_state_dict(alone.state_dict())
        parallelize_module(layer, mesh(world), ColwiseParallel())
        expected, step = alone(x), torch.compile(layer, backend="aot_eager") if compiled else layer
        y = step(x)
        torch.testing.assert_close(whole(y), expected.chunk(world, 1)[rank])
        y.square().sum().backward()
        expected.square().sum().backward()
        for a, e in zip(layer.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(a.grad), e.grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tensor_parallel_dense(compiled: bool, tmp_path: Path) -> None:
    run_in_group(tensor_parallel, 2, tmp_path, compiled)


def class_losses(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    torch.manual_seed(0)
    x, t, over = torch.randn(8, 6), torch.randint(6, (8,)), mesh(world)
    for name, parallel, placement, given in (
        ("cross_entropy", True, Shard(1), None),
        ("cross_entropy", True, Shard(1), Replicate()),
        ("cross_entropy", False, Shard(1), Replicate()),
        ("cross_entropy", False, Shard(0), Shard(0)),
        ("nll_loss", False, Shard(1), Replicate()),
        ("nll_loss", False, Shard(0), Shard(0)),
    ):
        alone = x.clone().requires_grad_()
        logits = distribute_tensor(x, over, [placement]).requires_grad_()
        target = t if given is None else distribute_tensor(t, over, [given])
        expected = getattr(F, name)(alone, t)
        expected.backward()
        if parallel:
            with loss_parallel():
                loss = getattr(bpF, name)(logits, target)
                loss.backward()
        else:
            loss = getattr(bpF, name)(logits, target)
            loss.backward()
        torch.testing.assert_close(whole(loss), expected.detach())
        torch.testing.assert_close(whole(logits.grad), alone.grad)
        assert not parallel or logits.grad.placements == (placement,)


def test_losses_of_scores_that_are_sharded(tmp_path: Path) -> None:
    run_in_group(class_losses, 2, tmp_path)


def penalties(rank: int, world: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    for rows in (4, 3, 1):  # even, uneven, and nothing at all on one rank
        w = torch.randn(rows, 5)
        for penalty in (nn.L1Penalty(0.5), nn.L2Penalty(0.5), nn.ElasticNetPenalty(0.5, 0.3)):
            alone = w.clone().requires_grad_()
            sharded = distribute_tensor(w, mesh(world), [Shard(0)]).requires_grad_()
            expected, R = penalty([alone]), penalty([sharded])
            torch.testing.assert_close(whole(R), expected.detach())
            R.backward()
            expected.backward()
            torch.testing.assert_close(whole(sharded.grad), alone.grad)


def test_penalties_of_parameters_that_are_sharded_unevenly(tmp_path: Path) -> None:
    run_in_group(penalties, 2, tmp_path)
