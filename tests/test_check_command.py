"""`bp-torch check`: the library's layers, a user's own, and one clear line for each wrong command."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bp_torch.functions
from bp_torch import cli
from bp_torch.functions import function
from bp_torch.functions.activation import ACTIVATIONS
from bp_torch.functions.function import Function
from bp_torch.verification import CHECKS, command, library

ONE_BACKEND = "the command chooses the backend itself"

USERS = """
import torch
from torch import nn

class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w, (dy * x).sum(0)

class Wrong(Scale):
    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * w, dy.sum(0)

class Layer(nn.Module):
    def __init__(self, width, *, bias=True):
        super().__init__()
        self.linear = nn.Linear(4, width, bias=bias)

    def forward(self, x):
        return self.linear(x).tanh()

class Strange:
    pass

layer = Layer(3)
number = 3

def gather(x, index, scale):
    return x[index] * scale
"""


@pytest.fixture(autouse=True)
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a module of the user's, as the current one."""
    (tmp_path / "mine.py").write_text(USERS, encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


QUICK = ["--checks", "gradcheck,float32,retain-graph"]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["mine:Scale", "--input", "4,8", "--input", "8"], 0),
        (["mine:Wrong", "--input", "4,8", "--input", "8"], 1),
        (["mine:Layer", "--input", "2,4", "--init", "3", "--init", "bias=False", "--eval"], 0),
        (["mine:layer", "--input", "2,4", "--dtype", "float64"], 0),
        (["mine:gather", "--input", "6,3", "--input", "4:6", "--input", "=0.5"], 0),
        (["torch.nn.functional:silu", "--input", "4,5", "--reference", "torch.nn.functional:silu"], 0),
    ],
)
def test_a_users_own(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *arguments, *QUICK]) == status
    shown = capsys.readouterr()
    if status == 1:
        assert "the gradient of w[" in shown.out
    assert not shown.err


def test_files(tmp_path: Path) -> None:
    arguments = ["check", "mine:Wrong", "--input", "4,8", "--input", "8", *QUICK]
    assert cli.main([*arguments, "--markdown", "report.md", "--json", "report.json"]) == 1
    assert "| gradcheck | **failed** |" in (tmp_path / "report.md").read_text("utf-8")
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["subject"] == "Wrong"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine:Scale"], "give the shape of each input"),
        (["mine:Scale", "--input", "4,x"], "--input '4,x': expected a shape"),
        (["mine:Scale", "--input", "4,8"], "raises TypeError"),
        (["mine:Scale", "--input", "4,8", "--input", "7"], "called with (4, 8), (7,) raises RuntimeError"),
        (["mine:Skale", "--input", "4,8"], "mine has no 'Skale'; it has Layer, Scale"),
        (["mine", "--input", "4,8"], "expected package.module:Name"),
        (["yours:Scale", "--input", "4,8"], "there is no module 'yours'"),
        (["broken:Scale", "--input", "4,8"], "broken cannot be imported: ZeroDivisionError"),
        (["mine:Strange", "--input", "4"], "neither an autograd Function nor a module"),
        (["mine:number", "--input", "4"], "is a int, which cannot be called"),
        (["mine:Layer", "--input", "2,4"], "give its arguments by --init"),
        (["mine:gather", "--input", "4", "--init", "3"], "--init is for a module's class"),
        (["mine:Scale", "--input", "4,8", "--device", "abacus"], "RuntimeError: Expected one of cpu"),
        (["--checks", "gradchek"], "no check 'gradchek'; there are gradcheck"),
        (["--skip", "gradchek"], "no check 'gradchek'"),
        (["--only", "Lineer"], "no layer's name contains 'Lineer'"),
        (["--input", "4,8"], "--input needs a target"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["mine:Scale", "--only", "Linear"], "leave out the target, or --only"),
        (["--markdown", "nowhere/report.md"], "there is no such folder"),
        (["mine:Scale", "--input", "4,8", "--input", "8", "--time-limit", "0"], "'time_limit'"),
    ],
)
def test_a_wrong_command_gets_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_list_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*CHECKS, "nn.BatchNorm2d"])
    assert cli.main(["check", "--help"]) == 0
    assert "--markdown FILE" in capsys.readouterr().out


def test_some_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["check", "--only", "nn.Linear", "--quick", "--backend", "torch", "--skip", "checkpoint"]
    assert cli.main([*arguments, "--markdown", "all.md", "--json", "all.json", "--time-limit", "250"]) == 0
    shown = capsys.readouterr().out
    assert "1 layers" in shown
    assert "nn.Linear no bias" not in shown  # --quick
    assert "| torch | nn.Linear |" in Path("all.md").read_text("utf-8")
    (report,) = json.loads(Path("all.json").read_text("utf-8"))["reports"]
    assert report["layer"] == "nn.Linear"
    assert {"compile", "checkpoint"}.isdisjoint(r["name"] for r in report["results"])


def test_the_kernels_are_checked_where_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    """With TRITON_INTERPRET=1, which tests/conftest.py sets where there is no GPU."""
    arguments = ["check", "--only", "nn.MSELoss", "--backend", "triton", "--time-limit", "250"]
    assert cli.main([*arguments, "--checks", "float32,zero-stride-gradients,nan,gradcheck"]) == 0
    assert "triton  nn.MSELoss" in capsys.readouterr().out


def test_several_processes_find_what_one_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = []
    for jobs in (1, 2):
        chosen = ["--backend", "torch", "--only", "nn.D", "--checks", "nan,seed", "--jobs", str(jobs)]
        assert command.run([*chosen, "--json", str(tmp_path / "report.json")]) == 0
        documents.append(json.loads((tmp_path / "report.json").read_text()))
        assert "failed" not in capsys.readouterr().err
    assert len(documents[0]["reports"]) >= 2 * command.FEWEST
    plain = [
        [(r["layer"], [(c["name"], c["state"], c["detail"]) for c in r["results"]]) for r in d["reports"]]
        for d in documents
    ]
    assert plain[0] == plain[1]


def test_a_failure_of_the_library_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = library.Case("nn.Wrong", lambda: lambda x: x.detach() + 0 * x, lambda: (torch.ones(3),))
    monkeypatch.setattr(command, "cases", lambda: iter([wrong]))
    assert cli.main(["check", "--checks", "gradcheck", "--backend", "torch"]) == 1
    assert "failed: gradcheck" in capsys.readouterr().out


def test_nothing_that_applies_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "mine:Scale", "--input", "4,8", "--input", "8", "--checks", "seed,state-dict"]) == 1
    assert "so nothing was checked" in capsys.readouterr().out
    # In the library one layer that a check does not apply to is no failure: another is.
    assert cli.main(["check", "--only", "nn.Dropout", "--quick", "--backend", "torch", "--checks", "seed"]) == 0
    assert cli.main(["check", "--only", "nn.Linear", "--quick", "--backend", "torch", "--checks", "seed"]) == 1


def test_check_needs_no_recipes() -> None:
    code = "import sys; from bp_torch import cli; cli.main(['check', '--list']); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_importing_bp_torch_imports_no_verification() -> None:
    code = "import sys, bp_torch; a = 'bp_torch.verification' in sys.modules; bp_torch.check; sys.exit(a)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0


def test_no_layer_is_forgotten() -> None:
    assert library.forgotten() == []
    names = [case.name for case in library.cases()]
    assert len(set(names)) == len(names)
    assert {f"nn.Dense {key}" for key in ACTIVATIONS} <= set(names)


def test_a_forgotten_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bp_torch.nn._OURS", ["Linear", "Quadratic"])
    assert library.forgotten() == ["Quadratic"]


def test_every_function_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that need several processes."""
    reached = set()

    def recorded(f: type[Function], *args: Any) -> Any:
        reached.add(f.__name__)
        return original(f, *args)

    original = function.call
    for module in pkgutil.walk_packages(bp_torch.__path__, "bp_torch."):
        if module.name.startswith(("bp_torch.functions.", "bp_torch.functional.")):
            loaded = importlib.import_module(module.name)
            if getattr(loaded, "call", None) is original:
                monkeypatch.setattr(loaded, "call", recorded)
    for case in library.cases():
        subject, inputs = case.make(), case.inputs()
        for training in (True, False):
            if isinstance(subject, torch.nn.Module):
                subject.train(training)
            leaves = [t.requires_grad_() for t in torch.utils._pytree.tree_leaves(inputs) if t.is_floating_point()]
            (g, *_) = torch.autograd.grad(subject(*inputs).sum(), leaves, create_graph=True, allow_unused=True)
            assert g is not None
    defined = {f.__name__ for f in Function.__subclasses__() if f.__module__.startswith("bp_torch.")}
    assert reached == defined - {"AllReduceFunction", "SyncStatisticsFunction"}
