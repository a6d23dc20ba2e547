"""The table that says what conversion did."""

from __future__ import annotations

import pytest
from conversion_models import AutoEncoder, ResNet, encoder, vgg
from torch import nn

import bp_torch

ONE_BACKEND = "the report reads modules and computes nothing"


def test_the_report_lists_every_module_that_computes() -> None:
    model = nn.Sequential(vgg(), ResNet(), encoder(), nn.LSTM(2, 2))
    report = bp_torch.conversion_report(bp_torch.convert(model))
    rows = {row.path: (row.module, row.status, row.why) for row in report}
    assert rows["0.0.1"] == ("BatchNorm2d", "fused", "with '0.0.2' (ReLU)")
    assert rows["0.0.2"] == ("ReLU", "fused", "into '0.0.1' (BatchNorm2d)")
    assert rows["0.2"] == ("Linear", "fused", "with '0.3' (ReLU), '0.4' (Dropout)")
    assert rows["0.5"] == ("Linear", "replaced", "")
    assert rows["0.0.0"] == ("Conv2d", "left", "no Function for Conv2d")
    code = "not fused: called by the code of '1.blocks.0' (BasicBlock), only Sequential is fused"
    assert rows["1.blocks.0.bn1"] == ("BatchNorm2d", "replaced", code)
    assert rows["1.blocks.0.relu"] == ("ReLU", "replaced", "")
    assert rows["2.self_attn"][1:] == ("left", "no Function for MultiheadAttention")
    assert rows["2.self_attn.out_proj"][1:] == ("left", "subclass of Linear: only exact types are converted")
    assert rows["3"][1:] == ("left", "no Function for LSTM")
    assert not {"", "0", "0.0", "1", "1.blocks"} & rows.keys()
    assert len(report) == len(list(report)) == len(rows) == sum(map(report.count, ("replaced", "fused", "left")))

    lines = str(report).splitlines()
    assert lines[0].split() == ["path", "module", "status", "why"]
    assert len(lines) == len(report) + 2
    assert all(line.startswith(row.path) for line, row in zip(lines[1:], report, strict=False))
    assert (
        lines[-1] == f"{report.count('replaced')} replaced, {report.count('fused')} fused, {report.count('left')} left"
    )
    with pytest.raises(KeyError):
        report["nowhere"]


def test_the_report_says_what_was_not_done_yet() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), bp_torch.nn.Dense(2, 2))
    report = bp_torch.conversion_report(model)
    assert [(row.status, row.why) for row in report] == [
        ("left", "not converted yet"), ("left", "not converted yet"), ("left", "is bp_torch's own")
    ]  # fmt: skip
    bp_torch.convert(model, fuse=False)
    assert bp_torch.conversion_report(model)["0"].why == "could be fused with '1' (ReLU)"
    bp_torch.convert(model)
    assert bp_torch.conversion_report(model)["0"].status == "fused"
    assert str(bp_torch.conversion_report(bp_torch.convert(nn.Tanh()))).splitlines()[1].startswith("(model)")


def test_a_module_used_twice_has_a_row_for_each_place() -> None:
    report = bp_torch.conversion_report(bp_torch.convert(AutoEncoder()))
    rows = [(row.path, row.status, row.why) for row in report if row.module == "Tanh"]
    assert rows == [
        ("act", "replaced", ""),
        ("encoder.1", "fused", "into 'encoder.0' (Linear)"),
        ("decoder.3", "fused", "into 'decoder.2' (Linear)"),
    ]
