"""The bound that the tests of precision share: what it lets through, and what it does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from exact import DRAWS, assert_as_good_as_torch, carried, distance, wide
from torch import Tensor

ONE_BACKEND = "about the tests themselves"

UNIT = torch.finfo(torch.float32).eps / 2


def off(units: float) -> Callable[[Tensor], Tensor]:
    """The identity in float32, off at random by so many roundings in the root mean square, bounded as roundings are;
    in float64 it is exact.
    """

    def identity(x: Tensor) -> Tensor:
        noise = 3**0.5 * (2 * torch.rand(x.shape).double() - 1)
        return x if x.dtype == torch.float64 else (x * (1 + units * UNIT * noise)).float()

    return identity


@pytest.mark.parametrize("numbers", [1, 9, 1000])
def test_twice_torchs_error_passes_and_more_does_not(numbers: int) -> None:
    for ours in (0.0, 8.0, 10.0):
        assert assert_as_good_as_torch(off(ours), off(8.0), lambda: [torch.randn(numbers)]) in DRAWS
    with pytest.raises(pytest.fail.Exception, match=r"in 64 draws result 0: the|elements are too far off, of result 0"):
        assert_as_good_as_torch(off(80.0), off(8.0), lambda: [torch.randn(numbers)])


def test_two_units_are_too_many_where_torch_rounds_correctly() -> None:
    def ours(x: Tensor) -> Tensor:
        return (x * (1 + 4 * UNIT)).float()

    def theirs(x: Tensor) -> Tensor:
        return x.to(torch.get_default_dtype())

    def exact(x: Tensor) -> Tensor:
        return x

    def draw() -> list[Tensor]:
        return [1.9 * torch.rand(100, dtype=torch.float64)]

    assert_as_good_as_torch(theirs, theirs, draw, exact)
    with pytest.raises(pytest.fail.Exception):
        assert_as_good_as_torch(ours, theirs, draw, exact)


@pytest.mark.parametrize("wrong", [1e-5, float("nan"), float("inf")])
def test_one_wrong_number_among_many_is_seen(wrong: float) -> None:
    def ours(x: Tensor) -> list[Tensor]:
        y = off(1.0)(x)
        y[7] += wrong
        return [off(1.0)(x), y]

    with pytest.raises(pytest.fail.Exception, match="result 1: 1 of 5000"):
        assert_as_good_as_torch(ours, lambda x: [off(1.0)(x)] * 2, lambda: [torch.randn(5_000)])


@pytest.mark.parametrize("share", [0.1, 1e-4])
def test_what_is_wrong_with_small_numbers_is_seen_beside_large_ones(share: float) -> None:
    """Though it is less than torch's error at those."""

    def small(x: Tensor) -> Tensor:
        return x.abs() < 1e-5

    def draw() -> list[Tensor]:
        return [torch.randn(1000) * torch.logspace(-12, 6, 1000)]

    def ours(x: Tensor) -> Tensor:
        return torch.where(small(x), x * (1 + share), off(8.0)(x))

    (x,) = draw()
    assert share * x[small(x)].abs().max() < distance(off(8.0)(x), x.double()).max()
    assert_as_good_as_torch(off(8.0), off(8.0), draw)
    with pytest.raises(pytest.fail.Exception, match="elements are too far off"):
        assert_as_good_as_torch(ours, off(8.0), draw)


def test_one_draw_of_large_numbers_outweighs_no_others() -> None:
    """Too much in 63 draws is seen beside one in which torch's error is as large; and one draw alone is luck."""

    def ours(small: float, large: float) -> Callable[[Tensor], Tensor]:
        def identity(x: Tensor) -> Tensor:
            units = large if x.abs().max() > 1e3 else small
            return (x * (1 + units * UNIT * (2 * torch.randint(2, x.shape) - 1).double())).float()

        return identity

    def draws(at: int) -> Callable[[], list[Tensor]]:
        count = itertools.count()
        return lambda: [(1e6 if next(count) == at else 1.0) * (1 + torch.rand(9))]

    with pytest.raises(pytest.fail.Exception, match="in 64 draws result 0: of all errors"):
        assert_as_good_as_torch(ours(20.0, 8.0), off(8.0), draws(at=10))
    assert_as_good_as_torch(ours(8.0, 20.0), off(8.0), draws(at=0))


def test_where_torch_overflows_ours_may_be_anything_and_not_the_other_way_round() -> None:
    def right(x: Tensor) -> Tensor:
        return x

    def overflows(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x * 1e38 / 1e38

    def draw() -> list[Tensor]:
        return [20 * torch.rand(9)]

    assert_as_good_as_torch(right, overflows, draw, exact=Tensor.double)
    with pytest.raises(pytest.fail.Exception):
        assert_as_good_as_torch(overflows, right, draw, exact=Tensor.double)


def test_where_torch_cancels_as_much_is_allowed_and_nowhere_else() -> None:
    def lost(x: Tensor) -> Tensor:
        return (1 + x) - 1

    def lost_left(x: Tensor) -> Tensor:
        return torch.where(x < 0, lost(x), x)

    def exact(x: Tensor) -> Tensor:
        return x.double()

    def draw() -> list[Tensor]:
        return [1e-3 * torch.randn(1000)]

    assert_as_good_as_torch(lost, lost, draw, exact)
    assert_as_good_as_torch(lost_left, lost, draw, exact)
    with pytest.raises(pytest.fail.Exception, match="elements are too far off"):
        assert_as_good_as_torch(lost, lost_left, draw, exact)


def test_slack_is_allowed_element_by_element() -> None:
    def ours(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x + torch.tensor([0.0, 1e-3])

    def exact(x: Tensor) -> Tensor:
        return x

    for slack, passes in (([0.0, 1e-3], True), ([1e-3, 0.0], False)):

        def check(slack: list[float] = slack) -> int:
            return assert_as_good_as_torch(
                ours, exact, lambda: [torch.randn(2)], slack=lambda x: [torch.tensor(slack, dtype=torch.float64)]
            )

        if passes:
            check()
        else:
            with pytest.raises(pytest.fail.Exception, match="1 of 2"):
                check()


def test_what_a_sum_carries_is_the_size_of_its_terms() -> None:
    x = torch.randn(40, 500)
    (found,) = carried(lambda x: (x - x.flip(1)).sum(1) + x.sum(1), [x], probes=64)
    torch.testing.assert_close(found, x.double().square().sum(1).sqrt(), rtol=0.5, atol=0)


def test_dtypes_and_shapes_are_torchs() -> None:
    for other in (Tensor.double, lambda x: x[:2]):
        with pytest.raises(AssertionError):
            assert_as_good_as_torch(other, lambda x: x, lambda: [torch.ones(3)])


def test_float64_is_judged_by_more_digits() -> None:
    """Sums of float64 are not their own exact answer."""
    x, W = (torch.randn(40, 99, dtype=torch.float64) for _ in range(2))
    exact = wide(x) @ wide(W).T
    found, error = x @ W.T, distance(x @ W.T, exact)
    assert 0 < error.max() < 1e-12
    # The exact sum may lie in the middle between two neighbours.
    assert distance(torch.nextafter(found, found + 1), exact).ne(error).double().mean() > 0.99
