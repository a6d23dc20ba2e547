"""Batch normalization with a dropout inside: values, gradients, the mask, what is kept of it."""

from __future__ import annotations

import pytest
import torch
from cases import widest, within
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch import nn
from bp_torch.functions.aten import batch_norm

EXACT = {"rtol": 1e-10, "atol": 1e-10}
ONES, X = torch.ones(3), torch.ones(4, 3)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "gelu"])
def test_dropout_equals_the_steps_apart(activation: str, training: bool, order: torch.memory_format) -> None:
    inputs = [torch.randn(4, 3, 2, 2).to(widest()).contiguous(memory_format=order) for _ in range(2)]
    x, r = (t.requires_grad_() for t in inputs)
    gamma, beta = (torch.rand(3).to(widest()).requires_grad_() for _ in range(2))
    statistics = [torch.rand(3).to(widest()) + 0.2 for _ in range(2)]

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    for residual in (None, r):
        leaves = [t for t in (x, gamma, beta, residual) if t is not None]
        y = bpF.batch_norm_act(
            x, *statistics, gamma, beta, residual, training, 0.0, activation=activation, p=0.4,
            generator=generator(), dropout_training=True,
        )  # fmt: skip
        z = bpF.batch_norm(x, *statistics, gamma, beta, training, 0.0)
        a = bpF.activation(z if residual is None else z + residual, activation)
        expected = bpF.dropout(a, 0.4, generator=generator())
        assert 0 < (y == 0).sum() < y.numel()
        torch.testing.assert_close(y, expected, **within(**EXACT))
        dy = torch.randn_like(y)
        theirs = torch.autograd.grad(expected, leaves, dy)
        for create_graph in (False, True):
            ours = torch.autograd.grad(y, leaves, dy, create_graph=create_graph, retain_graph=True)
            torch.testing.assert_close(ours, theirs, **within(**EXACT))


def test_fused_backward_with_dropout_equals_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large tensor dx is written into dz, which must not be the caller's gradient."""
    monkeypatch.setattr(batch_norm, "FRESH", 0)
    x = torch.randn(batch_norm.CHUNK // 32 + 3, 32, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.rand(32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for activation in ("identity", "relu"):
        y = bpF.batch_norm_act(x, None, None, gamma, beta, training=True, activation=activation, p=0.5)
        dy = torch.randn_like(y)
        given = dy.clone()
        fused = torch.autograd.grad(y, (x, gamma, beta), dy, retain_graph=True)
        assert torch.equal(dy, given)
        formulas = torch.autograd.grad(y, (x, gamma, beta), dy, create_graph=True)
        torch.testing.assert_close(fused, formulas, **EXACT)


def test_dropout_acts_in_training_alone() -> None:
    x = torch.randn(500, 3)
    for options in ({}, {"track_running_stats": False}):
        bn = nn.BatchNormAct1d(3, activation="sigmoid", dropout=0.3, **options)
        assert abs((bn(x) == 0).double().mean().item() - 0.3) < 0.05
        torch.manual_seed(0)
        first = bn(x)
        torch.manual_seed(0)
        assert torch.equal(bn(x), first)
        assert not (bn.eval()(x) == 0).any()
    assert not (bpF.batch_norm_act(x, ONES, ONES, p=0.5) == 0).any()
    assert (bpF.batch_norm_act(x, ONES, ONES, p=0.5, dropout_training=True) == 0).any()
    assert not (bpF.batch_norm_act(x, ONES, ONES, None, None, None, True, p=0.5, dropout_training=False) == 0).any()


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_dropout_of_everything_gives_zeros(activation: str | None) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = bpF.batch_norm_act(x, None, None, training=True, activation=activation, p=1.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert not dx.any()


def test_dropout_is_shown_and_checked() -> None:
    bn = nn.BatchNormAct1d(3, activation="relu", dropout=0.5)
    assert repr(bn).endswith("track_running_stats=True, activation='relu', dropout=0.5)")
    assert "dropout" not in repr(nn.BatchNormAct1d(3, activation="relu"))
    assert list(bn.state_dict()) == list(torch.nn.BatchNorm1d(3).state_dict())
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(bn)
    assert (twin.activation, twin.dropout) == ("relu", 0.5)
    with pytest.raises(ValueError, match=r"'dropout': expected a probability between 0 and 1, got 1\.5"):
        nn.BatchNormAct1d(3, dropout=1.5)
    for function in (bpF.batch_norm_act, bpF.sync_batch_norm):
        with pytest.raises(ValueError, match=r"'p': expected a probability between 0 and 1, got -0\.1"):
            function(X, None, None, p=-0.1)


def test_relu_with_dropout_keeps_no_mask() -> None:
    """x and y tell everything after relu; other activations keep the mask, or its seed."""
    for activation, mask in (("relu", 0), ("tanh", 1), (None, 1)):
        x = torch.randn(64, 32, requires_grad=True)
        kept: dict[int, tuple[torch.dtype, int]] = {}

        def pack(t: Tensor, kept: dict[int, tuple[torch.dtype, int]] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = (t.dtype, t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = bpF.batch_norm_act(x, None, None, training=True, activation=activation, p=0.5)
        large = [storage for storage, (dtype, n) in kept.items() if dtype == torch.float32 and n == 64 * 32]
        own = {x.untyped_storage().data_ptr(), *([] if mask else [y.untyped_storage().data_ptr()])}
        assert set(large) == own
        assert sum(not dtype.is_floating_point for dtype, _ in kept.values()) == mask
