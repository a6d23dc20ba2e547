"""Mutation testing: would the tests notice if a line of the mathematics, or of a kernel, were wrong?

`cosmic-ray <https://cosmic-ray.readthedocs.io>`_ breaks one operator, number or condition at a time, and the tests
that reach the line run against it, each test function's first case first. What survives is listed, to be looked at;
``docs/testing.md`` has the figures and what was made of them. It is no gate, and no part of ``make test``::

    pip install -c constraints.txt -e '.[mutation]'
    python tests/mutation.py measure                  # which test reaches which line, and how long it takes
    cosmic-ray init tests/mutation.toml build/mutation/session.sqlite
    cr-filter-operators build/mutation/session.sqlite tests/mutation.toml
    python tests/mutation.py sample build/mutation/session.sqlite --share 0.08
    cosmic-ray exec tests/mutation.toml build/mutation/session.sqlite
    python tests/mutation.py report build/mutation/session.sqlite

After a test was added: ``measure`` anew, ``python tests/mutation.py again SESSION`` forgets what survived, and ``exec``
tries that. The sources are changed in place and put back, so run it in a clone of its own, with nothing uncommitted.
For two at a time: two clones, with ``--part 1/2`` and ``--part 2/2``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("build/mutation")
COVERAGE, DURATIONS = FOLDER / "coverage", FOLDER / "durations.xml"
SOURCES = ("bp_torch/functions", "triton_kernels")
# The fast tier: what tests numbers and gradients, without what compiles a program or starts a process.
FILES = """activation arguments batch_invariant batch_norm batch_norm_accuracy batch_norm_dropout batch_norm_modules
contracts contracts_transforms cross_entropy dense dropout exact fast_paths formulas fusion in_place launch leaf
linear_arguments loss mlp modules new_activation other_dtypes penalty residual softmax subclasses sync_batch_norm triton
triton_batch_norm triton_batch_norm_tiles triton_dense triton_loss triton_mlp triton_penalty triton_softmax ways"""
TIER = ["-m", "not slow", "-k", "not compile and not trace and not export"]
# Of tests against one mutant, as measured under coverage, which takes about twice as long.
SECONDS = float(os.environ.get("MUTATION_SECONDS", "60"))


def measure() -> int:
    """Runs the fast tier under coverage, which notes the test that reached a line."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    configuration = FOLDER / "coveragerc"
    configuration.write_text(f"[run]\nrelative_files = true\ndata_file = {COVERAGE}\n")
    sources = [f"--cov={source}" for source in SOURCES]
    reports = ["--cov-context=test", f"--cov-config={configuration}", "--cov-report=", f"--junitxml={DURATIONS}"]
    files = [f"tests/test_{name}.py" for name in FILES.split()]
    command = ["-m", "pytest", "-n", "2", "--dist", "worksteal", "-q", *sources, *reports, *TIER, *files]
    return subprocess.run([sys.executable, *command], env=_environment()).returncode


def sample(session: str, share: float, part: str) -> None:
    """Leaves out what changes no behaviour, and all but a share of each file's mutants: always the same ones."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    number, parts = (int(n) for n in part.split("/"))
    with use_db(session) as db:
        items = defaultdict(list)
        skipped = []
        spans = {path: list(_annotations(path)) for path in _sources()}
        for item in db.pending_work_items:
            (m,) = item.mutations
            path = Path(m.module_path).as_posix()
            if any(start <= m.start_pos and m.end_pos <= end for start, end in spans[path]):
                skipped.append((item, "an annotation"))
            else:
                items[path].append((_draw(path, m.operator_name, m.occurrence), item))
        chosen = []
        for path in sorted(items):
            drawn = sorted(items[path], key=lambda pair: pair[0])
            cut = math.ceil(share * len(drawn))
            chosen += [item for _, item in drawn[:cut]]
            skipped += [(item, "not in the sample") for _, item in drawn[cut:]]
        skipped += [(item, "in another part") for i, item in enumerate(chosen) if i % parts != number - 1]
        for item, why in skipped:
            db.set_result(item.job_id, WorkResult(output=why, worker_outcome=WorkerOutcome.SKIPPED))
    print(f"{sum(map(len, items.values()))} mutants in {len(items)} files, {len(chosen)} drawn")


def test() -> int:
    """Tests the one file that differs from the last commit, by the tests that reach the line."""
    path, line = _mutated()
    chosen = tests_of(path, line)
    print(f"{path}:{line}: {len(chosen)} tests", flush=True)
    status = _pytest(chosen)
    if status == 4:  # a case has another name, or none, because the table that makes the cases is broken: all of them
        took: defaultdict[str, float] = defaultdict(float)
        for name, seconds in _durations().items():
            took[_function_of(name)] += seconds
        status = _pytest(_in_time(dict.fromkeys(map(_function_of, chosen)), took))
    return status


def _pytest(names: list[str]) -> int:
    if not names:  # pytest would run everything
        return 0
    arguments = FOLDER / f"tests-{os.getpid()}.txt"
    arguments.write_text("\n".join(names))
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, f"@{arguments}"]
    try:
        return subprocess.run(command, env=_environment()).returncode
    finally:
        arguments.unlink()


def tests_of(path: str, line: int) -> list[str]:
    """The tests that reach a line, as many as :data:`SECONDS` allows.

    Of each test function the first case, then of each the second: different tests find more than many cases of one.
    A line that runs at import alone has those of the function around it (a signature, a default), or of the lines that
    name what it sets (a constant), or else of the file (a row of a table).
    """
    durations = _durations()
    reached = _reached(path)
    tests = reached.get(line, set())
    for lines in (_function_around, _uses) if not tests else ():
        tests = tests or set().union(*(reached.get(n, set()) for n in lines(path, line)))
    if not tests:
        tests = set().union(*reached.values())
    of_function = defaultdict(list)
    for name in sorted(tests & durations.keys(), key=lambda t: (durations[t], t)):
        of_function[_function_of(name)].append(name)
    # The cheapest case, then cases from over the whole range of costs: the cheapest are often the degenerate ones.
    order = sorted(
        (rank, durations[name], name)
        for names in of_function.values()
        for rank, name in enumerate([names[0], *sorted(names[1:], key=lambda t: _draw(t))])
    )
    return _in_time((name for _, _, name in order), durations)


def _in_time(names: Iterable[str], took: Mapping[str, float]) -> list[str]:
    chosen, seconds = [], 0.0
    for name in names:
        if seconds + took[name] <= SECONDS:
            chosen.append(name)
            seconds += took[name]
    return chosen


def _function_of(name: str) -> str:
    """A test without its case."""
    return name.partition("[")[0]


def again(session: str) -> None:
    """Forgets what survived, so that ``exec`` tries it against what the tests are now."""
    with contextlib.closing(sqlite3.connect(session)) as db, db:
        print(db.execute("DELETE FROM work_results WHERE test_outcome = 'SURVIVED'").rowcount, "to try again")


def report(sessions: list[str], output: str | None) -> None:
    """Prints the kill rate of each file, and every survivor."""
    from cosmic_ray.work_db import WorkDB, use_db

    rows = []
    for session in sessions:
        with use_db(session, WorkDB.Mode.open) as db:
            for item, result in db.completed_work_items:
                if result.worker_outcome.value == "skipped":
                    continue
                (m,) = item.mutations
                rows.append(
                    {
                        "file": Path(m.module_path).as_posix(),
                        "line": m.start_pos[0],
                        "operator": m.operator_name.removeprefix("core/"),
                        "occurrence": m.occurrence,
                        "outcome": result.test_outcome.value if result.test_outcome else result.worker_outcome.value,
                        "change": [d for d in (result.diff or "").splitlines() if re.match(r"[-+](?![-+]{2} )", d)],
                        "tests": (result.output or "").strip().splitlines()[-1:],
                    }
                )
    rows.sort(key=lambda row: (row["file"], row["line"], row["operator"], row["occurrence"]))
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        outcomes[row["file"]][row["outcome"]] += 1
    for path, counts in [*outcomes.items(), ("all", sum(outcomes.values(), Counter()))]:
        print(f"{path:45} {counts['killed']:4} of {counts.total():4}  {counts['killed'] / counts.total():6.1%}")
    for row in rows:
        if row["outcome"] != "killed":
            print(
                f"\n{row['file']}:{row['line']} {row['operator']} {row['occurrence']}: {row['outcome']} {row['tests']}"
            )
            print("\n".join(row["change"]))
    if output:
        Path(output).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def _draw(*key: Any) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()


def _sources() -> Iterator[str]:
    for source in SOURCES:
        for path in Path(source).rglob("*.py"):
            yield path.as_posix()


def _annotations(path: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end; none is evaluated, except those of dataclasses, whose values nobody reads."""
    for node in ast.walk(ast.parse(Path(path).read_text())):
        for name in ("annotation", "returns"):
            a = getattr(node, name, None)
            if a is not None:
                yield (a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)


def _mutated() -> tuple[str, int]:
    difference = subprocess.run(
        ["git", "diff", "-U0", "--", *SOURCES], capture_output=True, text=True, check=True
    ).stdout
    paths = re.findall(r"^\+\+\+ b/(.*)$", difference, re.MULTILINE)
    lines = re.findall(r"^@@ -(\d+)", difference, re.MULTILINE)
    if len(paths) != 1 or len(lines) != 1:
        raise SystemExit(f"expected one change in one file, got {difference or 'none'}")
    return paths[0], int(lines[0])


def _durations() -> dict[str, float]:
    """The seconds of each test that passed."""
    passed = {}
    for case in ElementTree.parse(DURATIONS).getroot().iter("testcase"):
        if not {"failure", "error", "skipped"} & {child.tag for child in case}:
            passed[f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"] = float(case.get("time", 0))
    return passed


def _reached(path: str) -> dict[int, set[str]]:
    from coverage import CoverageData

    data = CoverageData(str(COVERAGE))
    data.read()
    return {
        line: {context.removesuffix("|run") for context in contexts if context.endswith("|run")}
        for line, contexts in data.contexts_by_lineno(path).items()
    }


def _unbroken(path: str) -> str:
    return subprocess.run(["git", "show", f"HEAD:{path}"], capture_output=True, text=True, check=True).stdout


def _uses(path: str, line: int) -> Iterable[int]:
    source = _unbroken(path)
    names = [
        target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.lineno <= line <= (node.end_lineno or 0)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    numbered = enumerate(source.splitlines(), 1)
    return [n for n, text in numbered if any(re.search(rf"\b{name}\b", text) for name in names)]


def _function_around(path: str, line: int) -> Iterable[int]:
    around: range = range(0)
    for node in ast.walk(ast.parse(_unbroken(path))):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node.lineno <= line <= (node.end_lineno or 0):
            around = range(node.lineno, (node.end_lineno or 0) + 1)  # the innermost one comes last
    return around


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure")
    commands.add_parser("test")
    sampling = commands.add_parser("sample")
    sampling.add_argument("session")
    sampling.add_argument("--share", type=float, default=0.08)
    sampling.add_argument("--part", default="1/1")
    commands.add_parser("again").add_argument("session")
    reporting = commands.add_parser("report")
    reporting.add_argument("sessions", nargs="+")
    reporting.add_argument("--output")
    a = parser.parse_args()
    if a.command == "sample":
        sample(a.session, a.share, a.part)
    elif a.command == "again":
        again(a.session)
    elif a.command == "report":
        report(a.sessions, a.output)
    else:
        sys.exit(measure() if a.command == "measure" else test())
