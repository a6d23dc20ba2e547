"""What every test shares: the backends, the number of threads, a fixed seed, and the skip of GPU tests.

Each test runs twice, as ``test_x[torch]`` on the formulas and as ``test_x[triton]`` on the kernels, which take CPU
tensors in Triton's interpreter. A module that says ``ONE_BACKEND = "why"`` runs as it is, and so does a test, on the
backend that it names, with ``@pytest.mark.one_backend("torch", "why")``.

Where there is a GPU, ``test_x[triton]`` is skipped and the kernels run on the GPU: in tests marked ``gpu``, and in
modules that make their tensors on ``DEVICE``, which are marked so here. ``-m gpu`` selects both.
"""

from __future__ import annotations

import contextlib
import gc
import getpass
import os
import re
import sys
import tempfile
from collections.abc import Generator, Iterator
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
from device import DEVICE
from hypothesis import settings
from seeds import INPUTS_SEED

import bp_torch

pytest_plugins = ["contracts", "pytester"]

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # inductor's cache would give code for vectors that its compiler is then not told of.
    own = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))

# Triton reads this when a kernel is decorated, so it is set before any kernel is imported.
if DEVICE == "cpu":
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
            pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU here, not in the interpreter"),
        ],
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "one_backend(name, why): the test runs on this backend alone")
    config.addinivalue_line("markers", "to_the_last_digits: in the interpreter also with the arithmetic of a chip")


def pytest_report_header() -> str:
    """What a result may depend on beside the code."""
    kernels, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"inputs: seed {INPUTS_SEED}; torch's CPU kernels: {kernels}; threads: {threads}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if DEVICE == "cpu" and metafunc.definition.get_closest_marker("to_the_last_digits"):
        metafunc.parametrize("_arithmetic", ["exact", "chip"], indirect=True)
    if hasattr(metafunc.module, "ONE_BACKEND"):
        return
    mark = metafunc.definition.get_closest_marker("one_backend")
    names = BACKENDS if mark is None else mark.args[:1]
    metafunc.parametrize("on_backend", [BACKENDS[name] for name in names], indirect=True)


def _is_idle(item: pytest.Item) -> bool:
    """Whether it would look for a chip's last digits of float32 in 16 bits."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("_arithmetic") == "chip" and params.get("dtype", torch.float32) != torch.float32


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_idle(item)]
    if "recipes" not in config.option.markexpr:  # minutes each: only when asked for
        left_out += [item for item in items if item.get_closest_marker("recipes")]
    items[:] = [item for item in items if id(item) not in {id(one) for one in left_out}]
    config.hook.pytest_deselected(items=left_out)
    needs_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # item.keywords has the names of folders too
            if DEVICE == "cpu":
                item.add_marker(needs_gpu)
        elif isinstance(item, pytest.Function) and hasattr(item.module, "DEVICE"):
            item.add_marker("gpu")  # -m gpu: what the GPU shows that this machine has, if it has one


def pytest_collection_finish() -> None:
    """Python's collector need not look at twenty thousand tests each time that it runs."""
    gc.collect()
    gc.freeze()


EXTRAS = [line for line in requires("bp-torch") or () if re.search("extra == .(recipes|datasets)", line)]
OPTIONAL = {re.split(r"[^\w-]", line)[0] for line in EXTRAS} | {"sklearn", "yaml"}
"""Packages that the extras [recipes] and [datasets] alone install."""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Outside CI a file that lacks a package of an extra is left out, and the summary says so."""
    report = yield
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in OPTIONAL and "CI" not in os.environ:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"left out, because {missing[1]} is not installed: an extra has it")
    return report


@pytest.fixture(autouse=True)
def on_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """The backend that the test runs on; None where the test, or its module, chooses for itself."""
    name = getattr(request, "param", None)
    if name is None:
        yield None
        return
    monkeypatch.setenv("BP_TORCH_BACKEND", name)  # for the processes that a test starts
    # The interpreter computes with numpy, which warns of an infinity where a GPU does not.
    with bp_torch.backend(name), np.errstate(all="ignore"):
        yield name


@pytest.fixture(autouse=True)
def _arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter's own arithmetic, or that of a chip, whose exp and division are less exact."""
    with interpreter.as_a_chip() if getattr(request, "param", "") == "chip" else contextlib.nullcontext():
        yield


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
