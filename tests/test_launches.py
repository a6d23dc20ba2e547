"""Every launch of the layers is specialized and compiled as on a GPU, by Triton's own JIT; see stub_driver.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compile_targets
import pytest

ONE_BACKEND = "compiles the kernels, runs none"

HERE = Path(__file__).parent
STAGE = os.environ.get("BP_TORCH_LAUNCHES", "ttir")
"""How far launches are compiled: make launches says cubin, which is all of it."""


def run(*command: str | Path) -> dict[str, Any]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "BP_TORCH_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.timeout(300 if STAGE == "ttir" else 1800)  # some 30 seconds, or 300
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_launch_compiles(dtype: str) -> None:
    result = run(HERE / "launches.py", dtype, STAGE)
    assert not result["failed"], "\n".join(result["failed"])
    functions = [target["kernel"].fn for module in compile_targets.modules() for target in module.TARGETS]
    kernels = {f"{function.__module__}.{function.__name__}" for function in functions}
    assert set(result["launched"]) == kernels


PLANTED = """
import json, sys, torch, triton, triton.language as tl, stub_driver

NAN = tl.constexpr(float("nan"))

@triton.jit
def changed(X):
    tl.store(X, NAN)

@triton.jit
def a_constant(X, n):
    tl.store(X, n.to(tl.float32))

@triton.jit
def too_large(X):
    i = tl.arange(0, 2**21)
    tl.store(X + i, 0.0)

@triton.jit
def sound(X, n):
    tl.store(X, tl.cast(n, tl.float32))

def failure(launch):
    try:
        launch()
    except Exception as error:
        return f"{type(error).__name__}: {error} {error.__cause__}"

stub_driver.install("ttir", sys.argv[1])
x = torch.zeros(4)
launches = [(changed, ()), (a_constant, (1,)), (a_constant, (2,)), (too_large, ()), (sound, (1,))]
found = [failure(lambda: kernel[(1,)](x, *sizes)) for kernel, sizes in launches]
print(json.dumps({"found": found, "launched": stub_driver.LAUNCHED, "untouched": x.eq(0).all().item()}))
"""


def test_faults_of_launches_are_found(tmp_path: Path) -> None:
    """A global constant that differs from itself, a size of 1 used as a tensor, a block that Triton refuses."""
    (tmp_path / "planted.py").write_text(PLANTED, encoding="utf-8")
    result = run(tmp_path / "planted.py", tmp_path)
    changed, of_one, of_two, too_large, sound = result["found"]
    assert "NAN has changed since we compiled this kernel" in changed
    assert of_one.startswith("CompilationError")
    assert "object has no attribute 'to'" in of_one
    assert of_two is None
    assert "exceeds triton maximum tensor numel" in too_large
    assert sound is None
    assert result["launched"] == {"__main__.a_constant": 1, "__main__.sound": 1}
    assert result["untouched"]
