"""What every test shares: the backends, the number of threads, a fixed seed, and the skip of GPU tests.

Each test runs twice, as ``test_x[torch]`` on the formulas and as ``test_x[triton]`` on the kernels, which take CPU
tensors in Triton's interpreter. A module that says ``ONE_BACKEND = "why"`` runs as it is, and so does a test, on the
backend that it names, with ``@pytest.mark.one_backend("torch", "why")``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from seeds import INPUTS_SEED

import bp_torch

pytest_plugins = ["contracts"]

HAS_CUDA = torch.cuda.is_available()

# Triton reads this when a kernel is decorated, so it is set before any kernel is imported.
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.make_faster()

# One, because the workers of pytest-xdist already fill the cores.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A first call may compile or import for seconds, which says nothing about the example that was drawn.
settings.register_profile("bp_torch", deadline=None, print_blob=True)
settings.load_profile("bp_torch")

BACKENDS = {
    "torch": pytest.param("torch", id="torch"),
    "triton": pytest.param(
        "triton",
        id="triton",
        marks=[
            # Said once in a process, for dtypes that no kernel takes: test_triton.py tests it.
            pytest.mark.filterwarnings(
                r"ignore:bp_torch. backend 'triton' was asked for, but there are no \w+ kernels. the torch formulas run"
            ),
            pytest.mark.skipif(HAS_CUDA, reason="the kernels run on the GPU here, not in the interpreter"),
        ],
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_backend(name, why): the test runs on this backend alone")


def pytest_report_header() -> str:
    """What a result may depend on beside the code."""
    kernels, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"inputs: seed {INPUTS_SEED}; torch's CPU kernels: {kernels}; threads: {threads}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.module, "ONE_BACKEND"):
        return
    mark = metafunc.definition.get_closest_marker("one_backend")
    names = BACKENDS if mark is None else mark.args[:1]
    metafunc.parametrize("on_backend", [BACKENDS[name] for name in names], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "recipes" not in config.option.markexpr:  # minutes each: only when asked for
        left_out = [item for item in items if item.get_closest_marker("recipes")]
        items[:] = [item for item in items if not item.get_closest_marker("recipes")]
        config.hook.pytest_deselected(items=left_out)
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def on_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """The backend that the test runs on; None where the test, or its module, chooses for itself."""
    name = getattr(request, "param", None)
    if name is None:
        yield None
        return
    from contracts import LAUNCHED

    if name == "triton":
        from triton.runtime.interpreter import GridExecutor

        def launch(self: GridExecutor, *args: object, original=GridExecutor.__call__, **options: object) -> None:
            request.node.stash[LAUNCHED] = request.node.stash.get(LAUNCHED, 0) + 1
            original(self, *args, **options)

        monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setenv("BP_TORCH_BACKEND", name)  # for the processes that a test starts
    # The interpreter computes with numpy, which warns of an infinity where a GPU does not.
    with bp_torch.backend(name), np.errstate(all="ignore"):
        yield name


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that run commands: a folder of their own, and a run's number of threads ends with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bp-torch"])  # what pytest was called with is not the command's
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> None:
    """The same random numbers and no compiled code, whatever ran before: tests run in random order."""
    torch.manual_seed(INPUTS_SEED)
    if "compil" in request.node.name:
        torch._dynamo.reset()
