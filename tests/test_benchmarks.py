"""The benchmark works, does not time what is wrong, and its page says what its results say."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

import bp_torch
import bp_torch.functional as bpF
from benchmarks import __main__ as command
from benchmarks import figures, layers, memory, models, page, providers, report, targets, timing, training
from benchmarks.layers import Layer
from benchmarks.models import Model
from benchmarks.providers import Setup
from benchmarks.training import Training

ONE_BACKEND = "timing is tested here, whatever is timed; the kernels have tests of their own"

TINY = list(layers.tiny())
MODELS = {model.name: model for model in models.tiny()}
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


def faulty(layer: Layer, **changes: object) -> str:
    setup = Setup.of(layer, "cpu", torch.float32)
    return providers.fault(setup, dataclasses.replace(layer, **changes).ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", TINY, ids=lambda layer: layer.title)
def test_the_gate_passes_what_is_right(layer: Layer) -> None:
    assert faulty(layer) == ""


def test_the_gate_sees_wrong_gradients_and_wrong_dropout() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 0.5

    dropout = layers.dropout(64, 64)
    assert "the gradient of input 0" in faulty(dropout, ours=lambda x, p: bpF.dropout(Halved.apply(x), p))
    assert "moment 1" in faulty(dropout, ours=lambda x, p: bpF.dropout(x.abs(), p) if p else x * 1)
    assert "moment 2" in faulty(dropout, ours=lambda x, p: bpF.dropout(x, 0.3 * p))
    assert "is torch.float64" in faulty(dropout, ours=lambda x, p: bpF.dropout(x, p).double())


def test_the_gate_sees_wrong_masks_in_models() -> None:
    case = Training(MODELS["mlp"], "cpu", torch.float32)
    net, loss = case.prepared("bp_torch", case.initial)
    assert training.dropout_fault(net, 0.5, lambda: loss(*case.batch)) == ""
    assert "expected 0.7500" in training.dropout_fault(net, 0.25, lambda: loss(*case.batch))

    class Wrong(torch.nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.4, self.training)

    class Unscaled(torch.nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 - self.p) if self.training else x

    x = torch.randn(64, 64)
    for wrong, message in ((Wrong(0.5), "expected 0.5"), (Unscaled(0.5), "is off by")):
        assert message in training.dropout_fault(torch.nn.Sequential(wrong), 0.5, lambda wrong=wrong: wrong(x))  # type: ignore[misc]
    assert "no layer" in training.dropout_fault(torch.nn.Sequential(torch.nn.ReLU()), 0.5, lambda: None)


def test_the_gate_sees_a_converted_model_with_another_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = bp_torch.convert

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        for module in convert(model).modules():
            if isinstance(module, bp_torch.nn.Dense):
                module.dropout = 0.9 * module.dropout
        return model

    monkeypatch.setattr(bp_torch, "convert", wrong)
    case = Training(MODELS["mlp"], "cpu", torch.float32)
    assert "dropout in 0" in case.candidate("bp_torch").fault(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_models_have_the_same_weights_and_steps(dtype: torch.dtype) -> None:
    model = dataclasses.replace(MODELS["mlp_batch_norm"], p=0.0)
    case = Training(model, "cpu", dtype)
    assert case.precision == ("autocast bfloat16" if dtype == torch.bfloat16 else "float32")
    nets = [case.prepared(name, case.initial) for name in ("torch", "bp_torch")]
    losses = [loss(*case.batch) for _, loss in nets]
    assert losses[0].dtype == losses[1].dtype
    torch.testing.assert_close(*losses, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0)
    for a, b in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
    assert any(type(m).__module__.startswith("bp_torch") for m in nets[1][0].modules())
    candidate = case.candidate("bp_torch")
    assert candidate.fault(2) == ""
    candidate.runs["step"]()


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


def test_saved_bytes_are_those_beyond_inputs_and_outputs() -> None:
    setup = Setup.of(layers.dropout(64, 64), "cpu", torch.float32)
    x = setup.inputs[0]
    assert providers.saved_bytes(setup, lambda x, p: x * x) == 0
    assert providers.saved_bytes(setup, lambda x, p: (x + 1).sin()) == x.numel() * 4


def test_saved_bytes_per_hidden_element() -> None:
    model: Model = dataclasses.replace(MODELS["mlp"], p=0.0)
    case = Training(model, "cpu", torch.float32)
    facts = {name: case.candidate(name).facts()["saved_per_hidden"] for name in ("torch", "bp_torch")}
    assert facts == {"torch": 4.0, "bp_torch": 4.0}  # relu's output, which the next layer needs anyway
    assert Training(MODELS["resnet18"], "cpu", torch.float32).candidate("torch").facts() == {}


def test_peak_bytes() -> None:
    x = torch.zeros(1000, 1000)

    def run() -> torch.Tensor:
        y = x + 1
        z = y + 1
        del y
        return z + 1

    assert 8_000_000 <= memory.peak_bytes(run, "cpu") < 8_100_000


def test_quartiles() -> None:
    times = timing.summary([float(n) for n in range(9)])
    assert (times.median, times.low, times.high, times.samples) == (4.0, 2.0, 6.0, 9)
    assert timing.summary([2.0]) == timing.Times(2.0, 2.0, 2.0, 1)


def test_providers_take_turns() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    found = timing.in_turns(runs, "cpu", 3)
    assert set(found) == {"a", "b"}
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes == 7  # once to find the number of calls of each, then a, b, a, b, a, b


def test_a_limit_in_seconds_leaves_the_least_number_of_rounds() -> None:
    found = timing.in_turns({"a": lambda: time.sleep(0.002)}, "cpu", 1000, seconds=0.0)
    assert found["a"].samples == timing.LEAST


def test_others_are_noticed() -> None:
    others = timing.Others()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        found = others.cpus()
    finally:
        other.kill()
        other.wait()
    if found is None:
        pytest.skip("this system has no /proc/stat")
    assert 0.02 < found <= 2 * (os.cpu_count() or 1)


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


def test_every_target_names_a_row_that_is_measured() -> None:
    for target in targets.TARGETS:
        rows = command.table(Namespace(tiny=False, quick=False, device=target.device))
        for pattern in target.rows:
            assert any(fnmatchcase(name, pattern) for name in rows), (target.key, pattern)
    assert len({target.key for target in targets.TARGETS}) == len(targets.TARGETS)


def measured(name: str, provider: str, **columns: object) -> dict[str, Any]:
    row = dict.fromkeys(report.COLUMNS) | {"kind": "layer", "name": name, "dtype": "bfloat16", "mode": "both"}
    row |= {"provider": provider, "status": "measured", "median_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1}
    row |= {"speedup": 1.0, "share_of_ceiling": 0.5, "saved_bytes": 8, "peak_bytes": 16, "run": "2026-01-02T03:04:05"}
    return row | {"floor_bytes": 2 * 10**9, "floor_operations": 10**9} | columns


def test_targets_are_met_or_missed_by_the_worst_row() -> None:
    def told(target: targets.Target, *rows: dict[str, Any]) -> tuple[object, ...]:
        outcome = targets.outcome(target, list(rows))
        return outcome.met, outcome.value, outcome.row, outcome.verdict

    target = targets.Target("cuda", "softmax", ("layer softmax *",), targets.SPEEDUP, 1.5)
    rows = [measured("softmax 1", "bp_torch", speedup=2.0), measured("softmax 2", "bp_torch", speedup=1.2)]
    assert told(target, *rows) == (False, 1.2, "softmax 2", "missed by 20%")
    assert told(target, rows[0]) == (True, 2.0, "softmax 1", "met")
    assert told(target) == (None, None, "", "not measured")
    assert told(target, rows[0] | {"dtype": "float32"}, rows[0] | {"mode": "forward"})[0] is None
    assert told(target, rows[1] | {"status": "wrong"})[0] is None
    rate = dataclasses.replace(target, measure=targets.RATE, bound=1.5e12)
    assert told(rate, rows[0])[:2] == (True, 2e12)
    slow = dataclasses.replace(target, measure=targets.SLOWDOWN, bound=1.1)
    assert told(slow, measured("softmax 1", "bp_torch", speedup=0.5)) == (False, 2.0, "softmax 1", "missed by 82%")
    saved = dataclasses.replace(target, measure=targets.SAVED, bound=0)
    assert told(saved, rows[0])[3] == "missed"
    compiled = measured("softmax 1", "compile", median_ms=3.0, saved_bytes=4)
    best = measured("softmax 1", "max-autotune", median_ms=2.0, saved_bytes=16)
    over = dataclasses.replace(target, measure=targets.OVER_COMPILE, bound=1.0)
    assert told(over, rows[0], compiled, best)[:2] == (True, 2.0)
    assert told(over, rows[0])[0] is None
    less = dataclasses.replace(target, measure=targets.SAVED_OVER_COMPILE, bound=1.0)
    assert told(less, rows[0], compiled, best)[:2] == (False, 2.0)
    assert told(less, rows[0] | {"saved_bytes": 0}, compiled | {"saved_bytes": 0})[:2] == (True, 1.0)


def test_causes() -> None:
    found = targets.causes("not shown\n\n## cpu\n\nAll.\n\n## cpu: mse 4096x1024\n\nIts cause.\nMore.\n")
    assert found == {"cpu": "All.", "cpu: mse 4096x1024": "Its cause.\nMore."}
    with pytest.raises(ValueError, match="'cpu: mean': expected one of"):
        targets.causes("## cpu: mean\n")
    assert targets.causes() is not None


def gpu_results() -> report.Results:
    run = {
        "date": "2026-01-02T03:04:05",
        "device": "NVIDIA H100",
        "cpu": "Some Processor",
        "cuda": "13.0",
        "threads": 4,
    }
    run |= {"torch": "2.13.0", "copy_bytes_per_s": 3e12, "product_operations_per_s": 6e14}
    rows = [
        measured("softmax 4096x32768", "torch"),
        measured("softmax 4096x32768", "bp_torch", speedup=1.3, median_ms=0.8),
        measured("dropout_residual 65536x1024", "bp_torch", speedup=1.2),
        measured("mlp 1x2x3", "compile", kind="model", mode="step", status="refused", message="no", speedup=None),
        measured("mlp 1x2x3", "bp_torch", kind="model", mode="step", dtype="autocast bfloat16"),
    ]
    return {"device": "NVIDIA H100", "runs": [dict.fromkeys(report.circumstances("cpu")) | run], "rows": rows}


def test_the_page_of_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "h100.json").write_text(json.dumps(gpu_results()), encoding="utf-8")
    written = page.write(tmp_path, tmp_path / "docs")
    assert [path.name for path in written] == [
        "benchmarks.md", "benchmarks-nvidia-h100-ratios.png", "benchmarks-nvidia-h100-roofline.png"
    ]  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in written)
    found = written[0].read_text(encoding="utf-8")
    assert "## NVIDIA H100" in found
    assert "Nothing was measured on a GPU" not in found
    assert "Nothing was measured on a CPU yet" in found
    assert "| dropout + residual | times as fast as torch.nn, forward + backward | ≥ 1.5 × | 1.2 × " in found
    assert "**missed by 20%**" in found
    assert "dropout + residual: *not written yet.*" in found
    assert "- mlp 1x2x3, torch.compile: `no`" in found
    told = page.text([gpu_results()], {"cuda: dropout + residual": "Because of this.", "cuda": "Mostly there."})
    assert "- dropout + residual: Because of this." in told
    assert "### Where the time goes\n\nMostly there." in told


def test_the_page_is_that_of_the_results() -> None:
    """If this fails, run ``python -m benchmarks report``."""
    found = report.load(report.RESULTS)
    committed = page.DOCS / "benchmarks.md"
    assert committed.read_text(encoding="utf-8") == page.text(found)
    for name in itertools.chain.from_iterable(figures.names(results) for results in found):
        assert (page.DOCS / "figures" / name).is_file()


def test_units() -> None:
    assert [page.size(n) for n in (0, 1023, 2048, 1.5 * 2**20)] == ["0", "1023", "2 KiB", "1.5 MiB"]
    assert [page.duration(ms) for ms in (0.0123, 1.0, 999.9, 12345)] == ["12.3 µs", "1 ms", "1000 ms", "12.3 s"]
