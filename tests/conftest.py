"""What every test shares: the backend for this machine, one thread, a fixed seed, and the skip of GPU tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["contracts"]

HAS_CUDA = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it is set before any kernel is imported.
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# The workers of pytest-xdist already fill the cores.
torch.set_num_threads(1)

# A first call may compile or import for seconds, which says nothing about the example that was drawn.
settings.register_profile("bp_torch", deadline=None, print_blob=True)
settings.load_profile("bp_torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    """The same random numbers and no compiled code, whatever ran before: tests run in random order."""
    torch.manual_seed(0)
    if "compil" in request.node.name:
        torch._dynamo.reset()
