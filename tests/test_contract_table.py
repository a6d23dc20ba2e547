"""What docs/contracts.md credits the kernels with: tests that launched one."""

from __future__ import annotations

import pytest
import torch
from contracts import counted_launches
from device import DEVICE

import bp_torch
from bp_torch import functional as bpF

ONE_BACKEND = "about the tests themselves"

TESTS = """
import bp_torch, pytest, torch
from bp_torch import functional as bpF

contract = pytest.mark.contract
on_each = pytest.mark.parametrize("on_backend", ["torch", "triton"])

@contract("backward", function="Ran")
@on_each
@pytest.mark.parametrize("kernels", [True, True, False])
def test_some_launch(on_backend, kernels):
    with bp_torch.backend(on_backend):
        (bpF if kernels else torch.nn.functional).relu(torch.ones(3, device="DEVICE"))

@contract("edges", function=["Ran", "Idle"])
@on_each
def test_none_launches(on_backend):
    pass

@contract("safety", function="Idle")
@on_each
def test_fails(on_backend):
    assert on_backend == "torch"

@contract("safety", function="Ran")
@on_each
def test_is_skipped(on_backend):
    pytest.skip()
"""


def test_the_kernels_are_credited_with_what_launched_them(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS.replace("DEVICE", DEVICE))
    pytester.runpytest_inprocess("-p", "contracts", "-p", "no:randomly", "--contracts=table.md")
    written = (pytester.path / "table.md").read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert rows == [
        "| Function | backward | edges | safety |",
        "| Idle |  | pass (1) | pass (1) |",
        "| Ran | pass (3) | pass (1) |  |",
        "| Function | backward | edges | safety |",
        "| Idle |  | no launch (1) | **fail** |",
        "| Ran | pass (2) | no launch (1) |  |",
    ]
    assert "**no launch** says" in written


def test_launches_are_counted() -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    with counted_launches() as launches, bp_torch.backend("triton"):
        y = bpF.relu(x)
        assert len(launches) == 1
        y.sum().backward()
        assert len(launches) == 2
        torch.relu(x)
        with bp_torch.backend("torch"):
            bpF.relu(x)
    with bp_torch.backend("triton"):
        bpF.relu(x)
    assert len(launches) == 2
