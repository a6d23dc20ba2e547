"""Collects which contract held for which Function, and writes docs/contracts.md from it.

A test that shows a contract carries ``@pytest.mark.contract("double backward")``; the Function is the ``function`` of
its ``case`` parameter, or is named in the marker. ``pytest --contracts docs/contracts.md`` writes the table of a
whole run. A test on the kernels' backend counts for the kernels if it launched one.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from triton.runtime.interpreter import GridExecutor

# In the order of the table: (name, what was checked).
CONTRACTS = {
    "backward": "values and gradients equal torch's; `gradcheck` in float64, undefined gradients included",
    "double backward": "`gradgradcheck` in float64; second derivatives equal torch's",
    "forward mode": "`gradcheck` of forward-mode and batched gradients; all tangents at once; forward over reverse",
    "torch.func": "`hessian`, `jacrev`, `jacfwd` nested; per-sample gradients by `vmap(grad)`; each input alone",
    "compile": "`torch.compile(fullgraph=True)`, forward and backward, on aot_eager and inductor",
    "export, fx": "`torch.export`, `torch.fx.symbolic_trace`",
    "checkpoint": "`torch.utils.checkpoint` gives the same gradients",
    "dtypes": "float32, bfloat16, float16: error against float64 at most twice torch's; autocast gives torch's dtypes",
    "layouts": "transposed, sliced and zero-stride inputs and gradients; memory format as torch's",
    "edges": "empty batches; NaN and Inf where torch has them",
    "safety": "changing a saved tensor is refused; nothing passed in is overwritten; a second backward agrees",
    "frozen": "each choice of inputs that need gradients; nothing else is computed or saved",
    "randomness": "torch's generator decides; masks agree under checkpointing",
    "determinism": "the same bits, run after run",
    "memory": "saves no more than torch's operators do, and what the formulas need",
    "modules": "torch.nn's constructor, state_dict, repr and errors; deepcopy, pickle",
}

BACKENDS = {
    "torch": "The torch formulas, on the CPU in float64",
    "triton": "The Triton kernels, in the interpreter on the CPU, in float32",
    "gpu": "The Triton kernels, on a GPU, in float32",
}


class Outcome(NamedTuple):
    passed: bool
    launches: int
    """How many kernels the test launched."""


Outcomes = dict[tuple[str, str, str], list[Outcome]]  # (backend, function, contract) → of each test


class Collector:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: Outcomes = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        launches = sum(value for key, value in report.user_properties if key == "launches")
        for key, value in report.user_properties:
            if key == "contract" and not report.skipped:
                self.outcomes[tuple(value)].append(Outcome(report.passed, launches))

    def pytest_sessionfinish(self) -> None:
        if self.outcomes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(table(self.outcomes), encoding="utf-8")


def cell(backend: str, outcomes: list[Outcome]) -> str:
    """A test that launched no kernel shows nothing about the kernels, so theirs are counted without it."""
    if not all(outcome.passed for outcome in outcomes):
        return "**fail**"
    shown = len([outcome for outcome in outcomes if outcome.launches or backend == "torch"])
    return f"pass ({shown})" if shown else f"no launch ({len(outcomes)})" if outcomes else ""


def table(outcomes: Outcomes) -> str:
    lines = [
        "# Contracts",
        "",
        "Written by the test-suite (`make test`), not by hand. A cell counts the tests that showed the contract for",
        "that Function; one failure makes it **fail**; an empty cell means that the contract says nothing there.",
        "For the kernels it counts the tests that launched one. **no launch** says that so many passed, all of them by",
        "the torch formulas: that shows nothing about a kernel.",
    ]
    for backend, title in BACKENDS.items():
        functions = sorted({function for name, function, _ in outcomes if name == backend})
        if not functions:
            continue
        contracts = [c for c in CONTRACTS if any((backend, function, c) in outcomes for function in functions)]
        lines += ["", f"## {title}", "", f"| Function | {' | '.join(contracts)} |", "|---" * (len(contracts) + 1) + "|"]
        for function in functions:
            cells = [cell(backend, outcomes.get((backend, function, contract), [])) for contract in contracts]
            lines.append(f"| {function} | {' | '.join(cells)} |")
    lines += ["", "## What each contract means here", ""]
    lines += [f"- **{name}**: {meaning}." for name, meaning in CONTRACTS.items()]
    return "\n".join(lines) + "\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contracts", metavar="FILE", help="write the table Function x contract of this run to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract(name, function): the test shows this contract for a Function")
    path = config.getoption("--contracts")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(Path(path)), "contract table")


def pytest_itemcollected(item: pytest.Item) -> None:
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params if callspec else {}
    for marker in item.iter_markers("contract"):
        (contract,) = marker.args
        if contract not in CONTRACTS:
            raise pytest.UsageError(f"{item.nodeid}: unknown contract {contract!r}")
        functions = marker.kwargs.get("function") or parameters["case"].function
        backend = parameters.get("backend", parameters.get("on_backend", "torch"))
        for function in [functions] if isinstance(functions, str) else functions:
            item.user_properties.append(("contract", (backend, function, contract)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Counts what a test of a contract launches."""
    if not any(key == "contract" for key, _ in item.user_properties):
        return (yield)
    with counted_launches() as launches:
        try:
            return (yield)
        finally:
            item.user_properties.append(("launches", len(launches)))


@contextlib.contextmanager
def counted_launches() -> Iterator[list[object]]:
    """Inside, each launch of a Triton kernel adds to the list, in the interpreter as on a GPU."""
    launches: list[object] = []
    run = GridExecutor.__call__

    def launch(self: GridExecutor, *arguments: object, **options: object) -> None:
        launches.append(self)
        run(self, *arguments, **options)

    hooks = triton.knobs.runtime.launch_enter_hook
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        hooks.add(launches.append)
        try:
            yield launches
        finally:
            hooks.remove(launches.append)
