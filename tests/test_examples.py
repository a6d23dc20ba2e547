"""The example scripts run, each in a Python of its own, and end well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ONE_BACKEND = "the scripts run as their users would run them"

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# torch's own rules for forward mode still use TorchScript.
WARNINGS = ["-W", "error", "-W", "ignore::DeprecationWarning:torch.jit._script"]


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    command = [sys.executable, *WARNINGS, str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.strip()
