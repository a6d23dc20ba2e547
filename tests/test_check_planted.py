"""bp_torch.check catches what is planted, check by check, and nothing in the corrected twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from defects import KeepsEachInput, Linear, Misspelled
from defects_in_data import TenthOff
from planted import PLANTED, Planted, t
from torch import Tensor

import bp_torch
from bp_torch.verification import CHECKS, Report

ONE_BACKEND = "the subjects are these tests' own, which know no backend"


def checked(subject: Any, planted: Planted, **options: Any) -> Report:
    """A machine that does much else must not decide a test."""
    reference = getattr(planted.reference, "apply", planted.reference)
    return bp_torch.check(subject, *planted.inputs, reference=reference, time_limit=250.0, **options)


def test_every_check_has_a_planted_defect() -> None:
    assert {planted.check for planted in PLANTED.values()} == set(CHECKS)


@pytest.mark.parametrize("planted", PLANTED.values(), ids=list(PLANTED))
def test_planted_defect_is_caught(planted: Planted) -> None:
    """By the check of the right name, which says what is wrong, what it means, and where; and by no unrelated one."""
    expected = {planted.check, *planted.also}
    # Half of the time is this check's; the twins below have it.
    report = checked(planted.wrong, planted, skip={"compiled-transforms"} - expected)
    assert not report
    assert planted.check in {r.name for r in report.failures} <= expected, report
    result = report[planted.check]
    assert planted.says in result.detail
    assert result.means
    assert "\n" not in result.detail + result.means
    if planted.shape is not None:
        assert next(iter(result.example.values())).startswith(f"shape {planted.shape}, strides")


TWINS = {id(planted.right): planted for planted in PLANTED.values()}


@pytest.mark.parametrize("planted", TWINS.values(), ids=lambda planted: planted.check)
def test_corrected_twin_passes(planted: Planted) -> None:
    report = checked(planted.right, planted)
    assert report, report
    for other in PLANTED.values():
        if other.right is planted.right:
            assert report[other.check].state == "passed", report


def test_kept_inputs_are_leaks() -> None:
    report = bp_torch.check(KeepsEachInput, t(4, 5), checks=["leaks"])
    assert report["leaks"].detail.startswith("each call leaves 80 bytes")


def test_no_backward_is_a_failure_and_no_refusal() -> None:
    report = bp_torch.check(Misspelled, t(4, 5), time_limit=250.0)
    assert {"gradcheck", "gradgradcheck", "frozen", "retain-graph", "compile"} <= {r.name for r in report.failures}
    assert report["gradcheck"].detail.startswith("raises NotImplementedError: You must implement either the backward")


def test_a_reference_judges_each_element() -> None:
    """Of 2000 numbers one is off by more than its rounding, which the root mean square of all hides."""

    def one_off(x: Tensor) -> Tensor:
        factor = torch.ones_like(x)
        factor[3, 7] += 1e-6 * (x.dtype == torch.float32)
        return factor * torch.tanh(x)

    report = bp_torch.check(one_off, t(40, 50), reference=torch.tanh, checks=["float32", "bfloat16"])
    assert [r.name for r in report.failures] == ["float32"]
    assert report["float32"].detail.startswith("float32: the output[3, 7] is off by")


def test_a_reference_judges_autocast() -> None:
    inputs = PLANTED["10 % off under autocast"].inputs
    assert bp_torch.check(Linear, *inputs, reference=Linear.apply, checks=["autocast"])
    report = bp_torch.check(TenthOff, *inputs, reference=Linear.apply, checks=["autocast"])
    assert report["autocast"].detail.startswith("under autocast: the output is off by")


def test_other_random_numbers_are_told_from_wrong_results() -> None:
    def other_numbers(x: Tensor) -> Tensor:
        return x * (2 + (torch.rand(x.shape, dtype=x.dtype) < 0.5))  # float64 takes more bits

    def tenth_off(x: Tensor) -> Tensor:
        factor = 1.1 if x.dtype == torch.float32 else 1.0
        return factor * x * (2 + (torch.rand(x.shape) < 0.5))

    report = bp_torch.check(other_numbers, t(8, 8), checks=["float32"])
    assert report["float32"].detail == "random numbers differ from dtype to dtype"
    assert bp_torch.check(tenth_off, t(8, 8), checks=["float32"])["float32"].state == "failed"
