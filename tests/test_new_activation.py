"""A new activation is a row of the table and its Triton functions, and nothing else: all that follows is tested on one.

squareplus: y = (x + √(x² + b))/2, f′ = y/√(x² + b), f″ = b/(2 (x² + b)^(3/2)); Barron 2021, arXiv:2112.11687.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ONE_BACKEND = "its process runs both"

ROOT = Path(__file__).parents[1]
END_OF_TABLE = "}  # fmt: skip\n\n\ndef lookup("
ROW = """
    "squareplus": Activation(
        module="Squareplus", parameters={"b": 4.0}, examples=((0.5,),), kinks=lambda b: (0.0,) * (b == 0),
        requires=(Requirement("b", "a number ≥ 0", lambda b: b >= 0, ValueError),),
        f=lambda x, b: _squareplus(wide(x), b)[0].to(x.dtype), df=_squareplus_df, ddf=_squareplus_ddf, saves="input",
        formula="(x + √(x² + b))/2", derivative="(1 + x/√(x² + b))/2", source="Barron 2021, arXiv:2112.11687",
    ),
"""
HELPERS = '''
def _squareplus(x, b):
    """y and √(x² + b), without cancellation."""
    r = torch.sqrt(x * x + b)
    return torch.where(x < 0, b / (r + x.abs()), x + r) / 2, r


def _squareplus_df(x, b):
    y, r = _squareplus(x, b)
    return torch.where(r > 0, y / r, 0.0)


def _squareplus_ddf(x, b):
    r = torch.sqrt(x * x + b)
    return torch.where(r > 0, b / (2 * r**3), 0.0)


ACTIVATIONS: dict['''
UNKNOWN = '    else:\n        tl.static_assert(False, "unknown activation")\n'
FUNCTIONS = {
    "forward": """
        y, _ = squareplus(x, a)
        return y
""",
    "derivative": """
        y, r = squareplus(s, a)
        return tl.where(r > 0, tl.div_rn(y, r), 0.0)
""",
    "curvature": """
        _, r = squareplus(s, a)
        return tl.where(r > 0, tl.div_rn(a, 2 * r * r * r), 0.0)
""",
}
PARTS = """
@triton.jit
def squareplus(x, b):
    r = tl.sqrt_rn(x * x + b)
    return 0.5 * tl.where(x < 0, tl.div_rn(b, r + tl.abs(x)), x + r), r


@triton.jit
def forward("""
TESTS = """
import pickle

import pytest
import torch

import bp_torch
from bp_torch import functional, nn
from bp_torch.verification import library

ONE_BACKEND = "both are named where it matters"


def squareplus(x, b=4.0):
    return (x + (x * x + b).sqrt()) / 2


def test_squareplus_has_a_form_and_a_module():
    x = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(functional.squareplus(x), squareplus(x))
    torch.testing.assert_close(functional.squareplus(x, b=1), squareplus(x, 1))
    module = pickle.loads(pickle.dumps(nn.Squareplus(0.5)))
    assert repr(module) == "Squareplus(b=0.5)"
    assert "squareplus" in functional.__all__ and "Squareplus" in nn.__all__
    torch.testing.assert_close(module(x), squareplus(x, 0.5))


@pytest.mark.parametrize("b", [-1.0, float("nan"), float("inf")])
def test_squareplus_refuses_what_its_row_refuses(b):
    x = torch.randn(2, 3)
    for form in (
        lambda: functional.squareplus(x, b),
        lambda: nn.Squareplus(b),
        lambda: functional.dense(x, torch.ones(4, 3), activation="squareplus", activation_parameters={"b": b}),
        lambda: nn.MLP(3, [4], 2, activation="squareplus", activation_parameters={"b": b}),
    ):
        with pytest.raises(ValueError, match="'b': expected a .*number.*, got"):
            form()
    with pytest.raises(TypeError, match="'b': expected a number, got str"):
        functional.squareplus(x, "4")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_squareplus_is_fused_by_conversion(backend, monkeypatch):
    given = []
    dense = functional.dense
    monkeypatch.setattr(functional, "dense", lambda *args, **options: given.append(options) or dense(*args, **options))
    with bp_torch.backend(backend):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), nn.Squareplus(0.5), torch.nn.Dropout(0.0))
        x = torch.randn(5, 3)
        expected = model(x)
        bp_torch.convert(model)
        torch.testing.assert_close(model(x), expected)
    (options,) = given
    assert options["activation"] == "squareplus" and options["activation_parameters"] == {"b": 0.5}
    assert [row.status for row in bp_torch.conversion_report(model).rows] == ["fused"] * 3


def test_squareplus_is_checked():
    cases = {case.name: case for case in library.cases()}
    assert not library.forgotten()
    assert "nn.Dense squareplus" in cases
    case = cases["nn.Squareplus"]
    report = bp_torch.check(case.make(), *case.inputs(), skip=("compile", "compiled-transforms"))  # contracts have them
    assert report, report
"""


def with_squareplus(folder: Path) -> None:
    """The package, its tests and what they import, with one row and its Triton functions more."""
    for name in ("bp_torch", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copytree(ROOT / "triton_kernels", folder / "bp_torch" / "triton_kernels")
    shutil.copy(ROOT / "pyproject.toml", folder)
    table = folder / "bp_torch" / "functions" / "activation_table.py"
    text = table.read_text("utf-8")
    assert text.count(END_OF_TABLE) == text.count("\nACTIVATIONS: dict[") == 1
    text = text.replace(END_OF_TABLE, ROW.lstrip("\n") + END_OF_TABLE).replace("\nACTIVATIONS: dict[", HELPERS)
    table.write_text(text.replace("import is_plain\n", "import is_plain, wide\n"), "utf-8")
    kernels = folder / "bp_torch" / "triton_kernels" / "activation.py"
    before, *after = kernels.read_text("utf-8").split(UNKNOWN)
    assert len(after) == len(FUNCTIONS)
    for body, rest in zip(FUNCTIONS.values(), after, strict=True):
        before += f'    elif KEY == "squareplus":{body}{UNKNOWN}{rest}'
    before = before.replace('"sin",\n)', '"sin", "squareplus",\n)').replace("\n@triton.jit\ndef forward(", PARTS)
    kernels.write_text(before, "utf-8")
    (folder / "tests" / "test_squareplus.py").write_text(TESTS, "utf-8")


@pytest.mark.slow
def test_a_row_and_its_triton_functions_are_all(tmp_path: Path) -> None:
    with_squareplus(tmp_path)
    # All files that read the table are collected.
    files = [path for path in sorted(Path("tests").glob("test_*.py")) if "ACTIVATIONS" in path.read_text("utf-8")]
    files = [str(path) for path in files if path.name != Path(__file__).name]
    files += ["tests/test_contracts.py", "tests/test_contracts_transforms.py"]
    options = ["-rA", "-q", "-p", "no:randomly", "-p", "no:xdist", "-p", "no:cacheprovider"]
    options += ["-k", "squareplus and not fullgraph"]  # Dynamo is at work in the contracts
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files, "tests/test_squareplus.py"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr
    passed = set(re.findall(r"^PASSED tests/(.*)", run.stdout, re.MULTILINE))
    assert {
        *(
            f"test_contracts.py::{test}[{backend}-activation-squareplus{b}]"
            for test in ("test_equals_torch", "test_same_bits_again")
            for backend in ("torch", "triton")
            for b in ("", "-b=0.5")
        ),
        "test_contracts_transforms.py::test_compile_aot_eager[activation-squareplus]",
        "test_squareplus.py::test_squareplus_is_checked",
        "test_squareplus.py::test_squareplus_is_fused_by_conversion[triton]",
    } <= passed
    names = {re.split("[.:]", name)[0] for name in passed}
    assert {"test_activation", "test_batch_norm", "test_fusion", "test_modules", "test_triton"} <= names
