"""The wheel: bp_torch alone at its top level, complete, and working without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ONE_BACKEND = "about what is installed"

ROOT = Path(__file__).resolve().parents[1]

# Where each folder of the repository is found in the wheel.
FOLDERS = {"bp_torch": "bp_torch", "triton_kernels": "bp_torch/triton_kernels", "recipes": "bp_torch/recipes"}

# Run by the new environment's Python. The packages of the extra "recipes" are hidden: the core does without them.
TRAINING_STEP = """
import sys

for name in ("lightning", "jsonargparse", "torchmetrics", "sklearn", "kornia", "matplotlib", "rich", "pandas"):
    sys.modules[name] = None

import torch

import bp_torch
from bp_torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
loss_fn = nn.CrossEntropyLoss()
for layer in (*model, loss_fn):
    assert type(layer).__module__.startswith("bp_torch."), type(layer)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, target = torch.randn(32, 8), torch.randint(3, (32,))
losses = []
for _ in range(50):
    optimizer.zero_grad()
    loss = loss_fn(model(x), target)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses
print(bp_torch.__file__)
print(bp_torch.__version__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it prints; a failure shows its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no earlier build's leftovers get in and the repository stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top_level = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"bp_torch"}
    assert len(top_level) == 2


def test_nothing_is_left_out(wheel: Path) -> None:
    """Every module, stub, configuration and type marker of the three folders is in the wheel, and no other file is."""
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for pattern in ("*.py", "*.pyi", "*.yaml", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert "bp_torch/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("bp_torch/")}
    assert found == expected


def test_every_folder_is_a_package() -> None:
    """A folder without ``__init__.py`` would be importable in the repository and missing from the wheel."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.slow
def test_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel),
        cwd=tmp_path,
    )

    # torch comes from this environment. A .pth file adds its folder behind the new one's, and does not run the .pth
    # files there: the editable install of the repository stays out of reach.
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    site_packages = Path(where.strip())
    parents = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "parent.pth").write_text("\n".join(sorted(parents)) + "\n")

    script = tmp_path / "training_step.py"
    script.write_text(TRAINING_STEP)
    file, version = run(python, "-W", "error", script, cwd=tmp_path).splitlines()
    assert Path(file) == site_packages / "bp_torch" / "__init__.py"
    assert wheel.name.startswith(f"bp_torch-{version}-")

    command = python.with_name("bp-torch.exe" if os.name == "nt" else "bp-torch")
    assert "fit" in run(command, "--help", cwd=tmp_path)
