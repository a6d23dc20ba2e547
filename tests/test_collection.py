"""Which tests a run has, where packages or a GPU are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ONE_BACKEND = "collects tests, runs none"

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ci", [False, True])
def test_a_file_without_its_extra_is_left_out_with_the_reason_but_not_in_ci(ci: bool, tmp_path: Path) -> None:
    lacking = "raise ModuleNotFoundError(\"No module named 'jsonargparse'\", name='jsonargparse')"
    (tmp_path / "jsonargparse.py").write_text(lacking, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | ({"CI": "true"} if ci else {})
    files = [HERE / "test_triton_softmax.py", HERE / "test_mlp.py"]  # the second imports bp_torch.recipes
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    told = "test_mlp.py:1: left out, because jsonargparse is not installed: an extra has it"
    assert (told in done.stdout) == (not ci), done.stdout
    assert done.returncode == (2 if ci else 0), done.stdout
    assert "test_triton_softmax.py::test_the_kernels_run[softmax]" in done.stdout  # kernels run where the GPU is
