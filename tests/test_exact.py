"""The bound that the tests of precision share: what it lets through, and what it does not."""

from __future__ import annotations

import pytest
import torch
from exact import DRAWS, Result, assert_as_good_as_torch, distance, wide
from torch import Tensor

ONE_BACKEND = "about the tests themselves"

UNIT = torch.finfo(torch.float32).eps / 2


def off(exact: Tensor, units: float) -> Tensor:
    """Float32 that is off from ``exact`` by about so many roundings, at random."""
    return (exact * (1 + units * UNIT * torch.randn_like(exact))).float()


@pytest.mark.parametrize("numbers", [1, 9, 1000])
def test_twice_torchs_error_passes_and_more_does_not(numbers: int) -> None:
    def draw(ours: float) -> list[Result]:
        exact = 1 + torch.rand(numbers, dtype=torch.float64)  # of one size, lest the largest decides alone
        return [Result(off(exact, ours), off(exact, 8.0), exact)]

    for ours in (0.0, 8.0, 10.0):
        assert assert_as_good_as_torch(lambda ours=ours: draw(ours)) in DRAWS
    with pytest.raises(pytest.fail.Exception, match="in 64 draws result 0: the"):
        assert_as_good_as_torch(lambda: draw(80.0))


def test_two_units_are_too_many_where_torch_rounds_correctly() -> None:
    exact = 1.9 * torch.rand(100).double()
    nearest = exact.float()
    assert_as_good_as_torch(lambda: [Result(nearest, nearest, exact)])
    with pytest.raises(pytest.fail.Exception):
        assert_as_good_as_torch(lambda: [Result(nearest * (1 + 4 * UNIT), nearest, exact)])


@pytest.mark.parametrize("wrong", [1e-5, float("nan"), float("inf")])
def test_one_wrong_number_among_many_is_seen(wrong: float) -> None:
    def draw() -> list[Result]:
        exact = torch.randn(5_000, dtype=torch.float64)
        ours = off(exact, 1.0)
        ours[7] += wrong
        return [Result(off(exact, 1.0), off(exact, 1.0), exact), Result(ours, off(exact, 1.0), exact)]

    with pytest.raises(pytest.fail.Exception, match="in 64 draws result 1: "):
        assert_as_good_as_torch(draw)


def test_dtypes_and_shapes_are_torchs() -> None:
    x = torch.ones(3)
    for other in (x.double(), x[:2]):
        with pytest.raises(AssertionError):
            assert_as_good_as_torch(lambda other=other: [Result(other, x, x.double())])


def test_float64_is_judged_by_more_digits() -> None:
    """Sums of float64 are not their own exact answer."""
    x, W = (torch.randn(40, 99, dtype=torch.float64) for _ in range(2))
    exact = wide(x) @ wide(W).T
    found, error = x @ W.T, distance(x @ W.T, exact)
    assert 0 < error.max() < 1e-12
    # The exact sum may lie in the middle between two neighbours.
    assert distance(torch.nextafter(found, found + 1), exact).ne(error).double().mean() > 0.99
