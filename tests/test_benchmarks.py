"""The benchmark as a command: it writes every row, does not time what is wrong, and goes on where it stopped."""

from __future__ import annotations

import ast
import csv
import dataclasses
import itertools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import bp_torch
import bp_torch.functional as bpF
from benchmarks import __main__ as command
from benchmarks import layers, models, page, providers, report, training

ONE_BACKEND = "timing is tested here, whatever is timed; the kernels have tests of their own"

TINY = list(layers.tiny())
QUICK = ["--device", "cpu", "--tiny", "--threads", "1", "--repeats", "2"]
TWO = ["--provider", "bp_torch", "--provider", "torch"]


def results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*QUICK, *TWO, "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    (run,) = found["runs"]
    assert run["torch"] == torch.__version__
    assert run["threads"] == 1
    assert run["date"]
    assert run["cpu"]
    assert run["allocator"]
    assert run["copy_bytes_per_s"] > 0
    assert run["product_operations_per_s"] > 0
    rows = found["rows"]
    names = {kind: {row["name"] for row in rows if row["kind"] == kind} for kind in command.KINDS}
    assert names["layer"] == {layer.title for layer in TINY}
    assert names["model"] == {model.title for model in models.tiny()}
    assert names["overhead"] == {layer.title for layer in layers.overhead()}
    calls = {"overhead": 3 * 2, "layer": 2 * 2, "model": 2 * 3}  # providers, modes
    assert len(rows) == sum(calls[kind] * len(of) for kind, of in names.items())
    for row in rows:
        assert set(row) == set(report.COLUMNS)
        assert row["status"] == "measured"
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["speedup"] > 0
        assert row["saved_bytes"] >= 0
        assert row["peak_bytes"] > 0
        assert (row["share_of_ceiling"] is None) == (row["kind"] == "model")
        assert (row["overhead_us"] is None) == (row["kind"] != "overhead")
    assert {row["speedup"] for row in rows if row["provider"] == "torch"} == {1.0}
    with next(tmp_path.glob("*.csv")).open(encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in rows]
    printed = capsys.readouterr().out
    assert str(next(tmp_path.glob("*.json"))) in printed
    assert printed.count("x torch") == len(rows)


def test_a_wrong_layer_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (softmax,) = (layer for layer in TINY if layer.name == "softmax")
    wrong = dataclasses.replace(softmax, ours=lambda x, p: bpF.softmax(x * 1.01, -1))
    monkeypatch.setattr(layers, "tiny", lambda: iter([wrong]))
    assert command.main([*QUICK, *TWO, "--kind", "layer", "--out", str(tmp_path)]) == 1
    for row in results(tmp_path)["rows"]:
        assert (row["median_ms"] is None) == (row["provider"] == "bp_torch")
        assert (row["status"] == "wrong") == (row["provider"] == "bp_torch")
    assert "wrong, not timed: y: error" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_of_a_compiler_is_told_and_the_others_go_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise OutOfResources(300_000, 232_448, "shared memory")
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise CompilationError("x = 1\ny = 2", ast.parse("y").body[0], "this is no kernel")

    (softmax,) = (layer for layer in TINY if layer.name == "softmax")
    other = next(layer for layer in TINY if layer.name != "softmax")
    failing = dataclasses.replace(softmax, ours=lambda x, p: Fails.apply(bpF.softmax(x, -1)))
    monkeypatch.setattr(layers, "tiny", lambda: iter([failing, other]))
    assert command.main([*QUICK, *TWO, "--kind", "layer", "--out", str(tmp_path)]) == 1
    for row in results(tmp_path)["rows"]:
        failed = row["provider"] == "bp_torch" and row["name"].startswith("softmax")
        assert row["status"] == ("failed" if failed else "measured")
    reason = "shared memory, Required: 300000" if where == "forward" else "this is no kernel"
    assert reason in capsys.readouterr().out
    assert reason in page.text([results(tmp_path)])


class Off(torch.nn.Module):
    """relu whose gradient is 1 % too large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        y.register_hook(lambda dy: 1.01 * dy) if y.requires_grad else None
        return y


def test_a_wrong_model_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        model[1] = Off()
        return model

    monkeypatch.setattr(bp_torch, "convert", wrong)
    arguments = [
        *QUICK,
        *TWO,
        "--kind",
        "model",
        "--only",
        "gradient_penalty",
        "--only",
        "mlp 64",
        "--out",
        str(tmp_path),
    ]
    assert command.main(arguments) == 1
    rows = results(tmp_path)["rows"]
    assert {row["status"] for row in rows if row["provider"] == "bp_torch"} == {"wrong"}
    assert {row["status"] for row in rows if row["provider"] == "torch"} == {"measured"}
    assert "the gradient of 0.weight: error" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by Dynamo
def test_an_exception_of_ours_is_a_fault_and_one_of_the_compilers_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(f: Any, name: str) -> Any:
        return torch.compile(f, backend="aot_eager")

    monkeypatch.setattr(training, "compiled", refuse)
    arguments = [*QUICK, "--kind", "model", "--only", "gradient_penalty", "--out", str(tmp_path)]
    assert command.main([*arguments, "--provider", "compile", "--provider", "torch"]) == 0
    refused, *rest = sorted(results(tmp_path)["rows"], key=lambda row: row["provider"])
    assert refused["status"] == "refused"
    assert refused["median_ms"] is None
    assert "double backward" in refused["message"]
    assert rest[-1]["status"] == "measured"
    assert "double backward" in page.text([results(tmp_path)])

    def fail(model: torch.nn.Module) -> torch.nn.Module:
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no such kernel")))
        return model

    monkeypatch.setattr(bp_torch, "convert", fail)
    assert command.main([*arguments, *TWO]) == 1
    assert results(tmp_path)["rows"][0]["message"] == "no such kernel"


def test_a_baseline_may_be_less_exact_but_not_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (softmax,) = (layer for layer in TINY if layer.name == "softmax")
    monkeypatch.setattr(layers, "tiny", lambda: iter([softmax]))
    arguments = [*QUICK, "--provider", "compile", "--provider", "torch", "--kind", "layer", "--out", str(tmp_path)]
    for factor, status in ((1 + 1e-6, "measured"), (1.01, "wrong")):
        monkeypatch.setattr(providers, "compiled", lambda f, name, factor=factor: lambda x, p: factor * f(x, p))
        assert command.main(arguments) == (status == "wrong")
        row = results(tmp_path)["rows"][0]
        assert row["provider"] == "compile"
        assert row["status"] == status
        assert "y: error" in row["message"]
        assert f"- {row['name']}, torch.compile: `y: error" in page.text([results(tmp_path)])


def test_resnet18_is_the_architecture() -> None:
    model = models.resnet18(1, 224).build(0.0)
    torchvisions, its_head = 11_689_512, 512 * 1000 + 1000  # parameters with 1000 classes
    assert sum(p.numel() for p in model.parameters()) == torchvisions - its_head + 512 * 10 + 10
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 17 + 3
    assert model[:-3](torch.zeros(2, 3, 64, 64)).shape == (2, 512, 2, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tables_name_each_row_once(device: str) -> None:
    for quick in (False, True):
        for table in (layers, models):
            titles = [row.title for row in getattr(table, device)(quick)]
            assert len(titles) == len(set(titles))


def test_a_run_goes_on_where_one_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, *TWO, "--kind", "layer", "--only", "mse", "--only", "softmax", "--out", str(tmp_path)]
    assert command.main([*arguments, "--limit", "0"]) == 0
    assert "2 rows left after 0 s" in capsys.readouterr().out
    assert command.main([*arguments, "--only", "dropout_residual", "--part", "2/3"]) == 0
    assert command.main([*arguments, "--disturbed", "1000"]) == 0
    assert "1 rows to measure" in capsys.readouterr().out
    found = results(tmp_path)
    assert report.disturbed(found, 1000) == set()
    found["rows"][0]["others_cpus"] = 0.7
    assert report.disturbed(found, 0.1) >= {f"layer {found['rows'][0]['name']}"}


def test_runs_are_merged(tmp_path: Path) -> None:
    def row(name: str, provider: str, median: float, mode: str = "both") -> dict[str, Any]:
        about = {"kind": "layer", "name": name, "dtype": "float32", "mode": mode, "provider": provider}
        return dict.fromkeys(report.COLUMNS) | about | {"median_ms": median}

    def run(date: str) -> dict[str, Any]:
        return {"date": date, "device": "Some Processor (R)", "cpu": "", "threads": 2, "cuda": None}

    order = ["layer b", "layer a"]
    first = [row("a", "torch", 1.0), row("a", "compile", 2.0), row("a", "torch", 3.0, "forward")]
    report.write(tmp_path, run("1"), first, order)
    report.write(tmp_path, run("2"), [row("b", "torch", 4.0)], order)
    paths = report.write(tmp_path, run("3"), [row("a", "torch", 5.0)], order)
    assert paths[0].name == "some-processor-r-2-threads.json"
    found = results(tmp_path)
    assert [(r["name"], r["mode"], r["median_ms"], r["run"]) for r in found["rows"]] == [
        ("b", "both", 4.0, "2"),
        ("a", "forward", 3.0, "1"),
        ("a", "both", 5.0, "3"),  # and compile's ratio, of the first run, is gone
    ]
    assert [r["date"] for r in found["runs"]] == ["1", "2", "3"]
    report.write(tmp_path, run("4"), [row("b", "torch", 4.0), row("a", "torch", 3.0, "forward")], order)
    assert [r["date"] for r in results(tmp_path)["runs"]] == ["3", "4"]


def test_parts_make_up_the_whole() -> None:
    names = list(command.table(Namespace(tiny=False, quick=False, device="cpu")))
    options = Namespace(kind=None, only=[], part=(1, 1))
    assert command.chosen(options, names) == names
    parts = [command.chosen(Namespace(kind=None, only=[], part=(i, 4)), names) for i in (1, 2, 3, 4)]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    chosen = command.chosen(Namespace(kind=["model"], only=["mlp", "resnet18"], part=(1, 1)), names)
    assert chosen == ["model mlp 1024x512x3", "model mlp_batch_norm 1024x512x3", "model resnet18 16x3x64x64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "convolution"], "no such row: --kind None, --only ['convolution']"),
        (["--part", "5/4"], "expected I/N with 1 <= I <= N, got '5/4'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
