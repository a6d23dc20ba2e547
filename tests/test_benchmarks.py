"""The benchmark works, and does not time what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

import bp_torch.functional as bpF
from benchmarks import layers, providers, report, timing
from benchmarks.__main__ import main
from benchmarks.layers import Layer
from benchmarks.providers import Setup

TINY = list(layers.tiny())


def test_a_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--tiny", "--repeats", "2", "--provider", "bp_torch", "--provider", "torch"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    json_file, csv_file = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    results = json.loads(json_file.read_text())
    assert results["circumstances"]["torch"] == torch.__version__
    assert results["circumstances"]["date"]
    assert all(rate > 0 for rate in results["ceilings"].values())
    rows = results["rows"]
    assert len(rows) == len(TINY) * 2 * 2
    assert {row["layer"] for row in rows} == {layer.title for layer in TINY}
    for row in rows:
        assert set(row) == set(report.COLUMNS)
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["speedup"] > 0
        assert row["share_of_ceiling"] > 0
        assert not row["fault"]
    assert {row["speedup"] for row in rows if row["provider"] == "torch"} == {1.0}
    with csv_file.open(encoding="utf-8") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == [row["layer"] for row in rows]
    printed = capsys.readouterr().out
    assert str(json_file) in printed
    assert printed.count("x torch") == len(rows)


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (softmax,) = (layer for layer in TINY if layer.name == "softmax")
    wrong = dataclasses.replace(softmax, ours=lambda x, p: bpF.softmax(x * 1.01, -1))
    monkeypatch.setattr(layers, "tiny", lambda: iter([wrong]))
    arguments = ["--device", "cpu", "--tiny", "--repeats", "2", "--provider", "bp_torch", "--provider", "torch"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    for row in rows:
        assert (row["median_ms"] is None) == (row["provider"] == "bp_torch")
    assert "not timed: y: error" in capsys.readouterr().out


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tables_name_each_row_once(device: str) -> None:
    for quick in (False, True):
        titles = [layer.title for layer in getattr(layers, device)(quick)]
        assert len(titles) == len(set(titles))


def test_saved_bytes_are_those_beyond_inputs_and_outputs() -> None:
    setup = Setup.of(layers.dropout(64, 64), "cpu", torch.float32)
    x = setup.inputs[0]
    assert providers.saved_bytes(setup, lambda x, p: x * x) == 0
    assert providers.saved_bytes(setup, lambda x, p: (x + 1).sin()) == x.numel() * 4


def test_quantiles() -> None:
    times = timing.summary([float(n) for n in range(11)])
    assert (times.median, times.low, times.high, times.samples) == (5.0, 1.0, 9.0, 11)
    assert timing.summary([2.0]) == timing.Times(2.0, 2.0, 2.0, 1)


def test_providers_take_turns() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    found = timing.in_turns(runs, "cpu", 3)
    assert set(found) == {"a", "b"}
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes == 7  # once to find the number of calls of each, then a, b, a, b, a, b


def test_a_layer_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--only", "convolution"])
    assert "--only convolution: no such layer" in capsys.readouterr().err
