"""bp_torch.check catches what is planted, check by check, and nothing in the corrected twins."""

from __future__ import annotations

from typing import Any

import pytest
from defects import KeepsEachInput, Misspelled
from planted import PLANTED, Planted, t

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
