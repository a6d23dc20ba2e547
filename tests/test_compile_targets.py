"""Every kernel compiles ahead of time for four GPUs, spills nothing, and accesses memory 16 bytes at a time."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import compile_targets
import pytest
import triton

ONE_BACKEND = "compiles the kernels, runs none"

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "kernels.md"
OUTSIDE_THE_INTERPRETER = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
OUTSIDE_THE_INTERPRETER |= {"OMP_NUM_THREADS": "1"}


def run(*command: str | Path, **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=OUTSIDE_THE_INTERPRETER | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def problems(result: dict[str, Any]) -> list[str]:
    return compile_targets.problems(compile_targets.Result(**result))


def rows(table: str) -> dict[tuple[str, str, str], list[str]]:
    """Family, kernel and dtype → the numbers of each chip."""
    found = {}
    for family in table.split("\n## ")[1:]:
        title, *lines = family.splitlines()
        for line in lines:
            if line.startswith("| ") and not line.startswith("| kernel "):
                name, dtype, *cells, _ = line.strip("| ").split(" | ")
                columns = [cell.split(" / ") for cell in cells]
                found[title, name, dtype] = [" ".join(numbers) for numbers in zip(*columns, strict=True)]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_and_the_table_is_up_to_date(tmp_path: Path) -> None:
    """The table says by which compiler and from which sources it was made, after all had passed. So each kernel once is
    enough, unless the compiler is another: then all have to compile, and may spill.
    """
    committed = TABLE.read_text(encoding="utf-8")
    same = f"Triton\n{triton.__version__} from sources" in committed
    results = run(HERE / "compile_targets.py", "--briefly" if same else "--may-spill", tmp_path / "kernels.md")
    assert {r["chip"] for r in results} == set(compile_targets.CHIPS)
    now = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    source = re.compile(r"digest is (\w+)")
    if same:
        assert source.findall(now) == source.findall(committed), "a kernel has changed: run make kernels"
        before = rows(committed)
        for key, chips in rows(now).items():
            assert chips == before[key], key


KERNELS = compile_targets.modules("bp_torch.triton_kernels")


@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_launched_kernels_are_listed(module: ModuleType) -> None:
    """``_kernel[grid](...)`` somewhere in the file, and ``_kernel`` in the TARGETS of the file of its name."""
    calls = [node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    launched = {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}
    kernels = {name for name in launched if hasattr(getattr(module, name, None), "arg_names")}
    layer = module.__name__.rpartition(".")[2]
    lists = {targets.__name__: targets.TARGETS for targets in compile_targets.modules()}
    assert kernels == {target["kernel"].fn.__name__ for target in lists.get(f"targets.{layer}", ())}


PLANTED = """
import triton, triton.language as tl

@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr, STEP: tl.constexpr):
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * STEP
    tl.store(Y + i, tl.load(X + i, mask=i < n, other=0.0) + 1, mask=i < n)

@triton.jit
def wrong(X, Y, n, BLOCK: tl.constexpr, STEP: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK), tl.load(X + tl.arange(0, 3)))

TYPES = {"X": "*{dtype}", "Y": "*{dtype}", "n": "i32"}

def target(name, kernel, types=TYPES, block=1024, step=1, **more):
    constants = {"BLOCK": block, "STEP": step}
    return {"name": name, "kernel": kernel, "types": types, "constants": constants, "num_warps": 1,
            "wide_accesses": True, **more}

TARGETS = [
    target("sound", copy, block=256),
    target("narrow", copy, block=256, step=3),
    target("spilling", copy, block=2048, options={"maxnreg": 24}),
    target("wrong", wrong),
    target("untyped", copy, {"X": "*{dtype}", "Y": "*{dtype}"}),
]
"""


def test_faults_are_found(tmp_path: Path) -> None:
    """Narrow accesses, spilled registers, too much shared memory, errors of the compiler and of the list."""
    (tmp_path / "planted_kernels.py").write_text(PLANTED, encoding="utf-8")
    code = (
        "import json, sys; from dataclasses import asdict; from compile_targets import compile_one\n"
        "chips = ('sm_80', 'gfx942')\n"
        "print(json.dumps([asdict(compile_one(('planted_kernels', i, 'fp32', c))) for i in range(5) for c in chips]))"
    )
    results = run("-c", code, PYTHONPATH=f"{HERE}{os.pathsep}{tmp_path}", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    found = {(r["name"], r["chip"]): " ".join(problems(r)) for r in results}
    for chip in ("sm_80", "gfx942"):
        assert found["sound", chip] == ""
        assert "are accessed 16 at a time" in found["narrow", chip]
        assert "CompilationError" in found["wrong", chip]
        assert "neither type nor value for {'n'}" in found["untyped", chip]
    assert "are spilled" in found["spilling", "sm_80"]  # gfx942 has no such limit
    (sound,) = (r for r in results if (r["name"], r["chip"]) == ("sound", "sm_80"))
    assert sound["bytes"] == sound["wide_bytes"] == 64  # 8 elements a thread, loaded and stored
    sound["shared"] = 164 * 1024
    assert problems(sound) == ["167936 bytes of shared memory, 166912 are there"]


def test_spills_are_read_from_amds_metadata() -> None:
    text = "    .sgpr_spill_count: 3\n    .vgpr_count:     45\n    .vgpr_spill_count: 4\n"
    result = compile_targets.Result("family", "name", "gfx942", "fp32")
    compile_targets._read_amd({"amdgcn": text}, "", result)
    assert problems(asdict(result)) == ["7 bytes or registers are spilled"]
