"""The benchmark's targets, and its page, which says what its results say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import figures, page, report, targets

ONE_BACKEND = "timing is tested here, whatever is timed; the kernels have tests of their own"


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


def test_bars_start_at_torchs_own_speed() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    one = {"status": "measured", "speedup": 4.0}
    figures.ratios(axes, {"a": {"bp_torch": one, "compile": one | {"speedup": 0.25}}, "b": {"bp_torch": one}})
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert ends[:3] == [(1, 4), (1, 0.25), (1, 4)]
    low, high = axes.get_xlim()
    assert low < 0.25 < 4 < high
    assert {text.get_text() for text in axes.texts} == {"4.00", "0.25"}


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


def test_the_readme_names_every_speed_below_torchs() -> None:
    """Of a layer's forward and backward, and of a model's training step."""
    root = Path(__file__).parents[1]
    section = (root / "README.md").read_text("utf-8").split("\n## Speed and memory\n")[1].split("\n## ")[0]
    (name,) = re.findall(r"figures/benchmarks-(.+)-ratios\.png", section)
    rows = json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))["rows"]
    mode = {"layer": "both", "model": "step"}
    ours = [row for row in rows if row["provider"] == "bp_torch" and row["mode"] == mode.get(row["kind"])]
    slower = {f"{row['speedup']:.2f}" for row in ours if row["speedup"] < 0.995}
    told = re.findall(r"\b(0\.\d\d)\b(?: to (0\.\d\d))?", section)
    ranges = [(low, high or low) for low, high in told]
    assert all(any(low <= value <= high for low, high in ranges) for value in slower), slower
    assert slower >= {end for pair in ranges for end in pair}
