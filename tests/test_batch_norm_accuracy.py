"""Batch normalization keeps its accuracy: large means, constant channels, 16-bit inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bp_torch.functions.batch_norm import BatchNormFunction
from bp_torch.functions.epilogue import Epilogue
from bp_torch.functions.function import call


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5, -1e5])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((4096, 8), None),
        ((65536, 2), None),
        ((8, 4, 32, 32), None),
        ((8, 4, 32, 32), torch.channels_last),
        ((64, 4, 33), None),
        ((4, 2, 8, 8, 8), torch.channels_last_3d),
    ],
    ids=str,
)
@pytest.mark.parametrize("formula", [False, True])
def test_large_mean_costs_no_accuracy(mean: float, shape: tuple[int, ...], memory_format: Any, formula: bool) -> None:
    """At a mean of 1e5 the mean of squares has no digit of a variance of 1."""
    x = mean + torch.randn(shape)
    x = x if memory_format is None else x.contiguous(memory_format=memory_format)
    dims = [d for d in range(x.dim()) if d != 1]
    exact = x.double()
    var, middle = torch.var_mean(exact, dims, correction=0)
    if formula:
        y, our_mean, our_var = BatchNormFunction.forward(x, None, None, None, None, 1e-5, Epilogue())
    else:
        y, our_mean, our_var = call(BatchNormFunction, x, None, None, None, None, 1e-5, Epilogue())
    unit = 2**-24 * max(abs(mean), 1)  # one rounding of the mean is the least error that float32 has
    assert ((our_mean - middle).abs() <= 2 * unit).all()
    torch.testing.assert_close(our_var.double(), var, rtol=4e-5, atol=0)
    expected = (exact - middle.view(-1, *[1] * len(shape[2:]))) / (var + 1e-5).sqrt().view(-1, *[1] * len(shape[2:]))
    assert ((y - expected).abs() <= 4 * unit + 4e-5 * expected.abs()).all()


def test_constant_channel_has_no_variance() -> None:
    x = torch.randn(50, 3)
    x[:, 1] = 0.1
    y, _, var = call(BatchNormFunction, x, None, None, None, None, 1e-5, Epilogue())
    assert 0 <= var[1] < 1e-15
    assert y[:, 1].abs().max() < 1e-4
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_inputs_are_float32(dtype: torch.dtype) -> None:
    """A sum of many numbers in half precision would have few digits."""
    x = (3 + torch.randn(64, 3)).to(dtype)
    for gamma in (None, torch.ones(3), torch.ones(3, dtype=dtype)):
        y, mean, var = call(BatchNormFunction, x, gamma, gamma, None, None, 1e-5, Epilogue("relu"))
        assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
        torch.testing.assert_close(mean, x.float().mean(0))
        torch.testing.assert_close(var, x.float().var(0, correction=0))
