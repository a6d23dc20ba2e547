"""The studies: verdicts from planted numbers, and each study, quick, through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from rich.console import Console

from bp_torch import cli, nn
from bp_torch.recipes.studies import STUDIES, initialization, overfitting, vanishing_gradients
from bp_torch.recipes.studies.core import Cells, Claim, Column, Findings, Numbers, Study, exceeds, run_study, spread
from bp_torch.recipes.studies.training import Recipe, Split, digits, train

ONE_BACKEND = "what studies compute with, test_convergence.py trains on both backends"


def test_paired_difference_must_exceed_its_standard_error_by_students_t() -> None:
    noise = [0.3, -0.2, 0.1, -0.4, 0.2]  # common to both sides: paired, it does not matter
    a = [1.0 + n for n in noise]
    b = [0.9 + n + d for n, d in zip(noise, [0.01, -0.01, 0.02, -0.02, 0.0], strict=True)]
    compared = exceeds(a, b)
    difference = np.subtract(a, b)
    assert compared.mean == pytest.approx(0.1)
    assert compared.error == pytest.approx(difference.std(ddof=1) / math.sqrt(5))
    assert compared.bound == pytest.approx(2.131847 * compared.error, rel=1e-6)  # t(0.95, 4), from a table
    assert compared.holds
    assert not exceeds(b, a).holds
    assert not exceeds(a, b, margin=0.1).holds
    assert not exceeds([1.0, 0.0, 2.0], [0.9, 0.4, 0.2]).holds  # above on average, but not by enough
    assert not exceeds(a, a).holds
    assert exceeds([1.1, 2.1], [1.0, 2.0]).holds


def test_divergence_decides_only_what_it_can() -> None:
    assert exceeds([math.inf, 3.0], [1.0, 1.0]).holds
    assert not exceeds([math.inf, 0.5], [1.0, 1.0]).holds
    assert not exceeds([math.nan, 3.0], [1.0, 1.0]).holds
    assert not exceeds([math.inf, math.inf], [math.inf, 1.0]).holds
    assert not exceeds([1.0, 1.0], [math.inf, math.inf]).holds
    with pytest.raises(ValueError, match="two seeds"):
        exceeds([1.0], [0.0])
    assert spread([0.5, 0.7], percent=True) == "60.0 ± 14.1 %"
    assert spread([1.0, math.inf]) == "1 ± 0 (1 of 2 diverged)"
    assert spread([math.inf, math.nan]) == "diverged"


def planted(gain: float, required: bool = True) -> Study:
    """A study whose remedy gains `gain` over plain, give or take."""

    def run(cells: Cells) -> Findings:
        def cell(shift: float, seed: int) -> Numbers:
            return {"score": shift + seed + 0.01 * (-1) ** seed * shift, "curve": [1.0, math.nan]}

        cells.run({"plain": 0.0, "remedy": gain}, cell, "setting")
        compared = cells.exceeds("score", "remedy", "plain")
        claim = Claim("the remedy helps", compared.holds, f"by {compared}", required)
        return Findings([Claim("always", True, "-"), claim], [Column("score", "score")], setup="How.")

    return Study("planted", "Planted", "a remedy helps.", 4, run)


@pytest.mark.parametrize(
    ("gain", "required", "status"), [(1.0, True, 0), (-1.0, True, 1), (0.0, True, 1), (-1.0, False, 0)]
)
def test_failed_claim_gives_status_1(gain: float, required: bool, status: int, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, width=120)
        assert run_study(planted(gain, required), None, tmp_path / "out", quick=False, console=console) == status
    shown = (tmp_path / "screen").read_text()
    report = (tmp_path / "out" / "report.md").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["holds"] is (status == 0)
    assert results["seeds"] == [0, 1, 2, 3]
    assert results["settings"]["remedy"]["score"][3] == pytest.approx(gain + 3 - 0.01 * gain)
    assert "curve" not in results["settings"]["remedy"]
    if status:
        for text in (report, " ".join(shown.split())):
            assert "The claim did not hold in 1 of its 2 parts: the remedy helps" in text
        assert "| the remedy helps | **no** | by " in report
    else:
        assert "The claim held: all" in report
    assert "bp-torch study planted" in report


def test_list_and_wrong_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["study"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        (["nope"], "'nope' is not a study; choose from overfitting, underfitting"),
        (["overfitting", "--seeds", "1"], "--seeds must be at least 2"),
        (["overfitting", "--seeds", "many"], "invalid int value: 'many'"),
        (["overfitting", "--fast"], "unrecognized arguments: --fast"),
        (["overfitting", "--out", "file"], "--out 'file' is a file"),
    ):
        assert cli.main(["study", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("bp-torch: error: study: ")
        assert told.count("\n") == 1
        assert expected in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert cli.main(["--help"]) == 0
    assert "bp-torch study [NAME]" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_quick_study(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way through. A quick run is too short for every claim to hold; the status must say what it found."""
    status = cli.main(["study", name, "--quick", "--seeds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    report = (tmp_path / "report.md").read_text()
    required = [claim for claim in results["claims"] if claim["required"]]
    assert status == (0 if all(claim["holds"] for claim in required) else 1)
    assert len(required) >= 5
    assert any(claim["holds"] for claim in required)
    assert results["quick"] is True
    assert results["seeds"] == [0, 1]
    for setting, numbers in results["settings"].items():
        assert f"| {setting} | " in report
        assert all(len(values) == 2 for values in numbers.values())
    figures = sorted((tmp_path / "figures").glob("*.png"))
    assert len(figures) >= 2
    assert all(f"(figures/{path.name})" in report and path.stat().st_size > 15_000 for path in figures)
    assert f"bp-torch study {name} --seeds 2 --quick" in report
    assert "from the numbers" in capsys.readouterr().out


def test_cells_are_repeatable_and_paired() -> None:
    run, plain = overfitting.cell(3), overfitting.SETTINGS["plain"]
    torch.manual_seed(1)
    first = run(plain, 4)
    torch.manual_seed(1)
    assert run(plain, 4) == first
    assert run(plain, 5)["test_loss"] != first["test_loss"]
    small, large = digits(4, train=150), digits(4, train=600)
    assert torch.equal(small.test[0], large.test[0])
    assert torch.equal(small.val[1], large.val[1])

    def rows(split: Split, part: str) -> set[bytes]:
        return {row.numpy().tobytes() for row in getattr(split, part)[0]}

    assert len(rows(small, "train")) == 150
    assert rows(small, "train") < rows(large, "train")
    assert not rows(large, "train") & rows(large, "test")
    assert not rows(large, "train") & rows(large, "val")
    assert torch.bincount(small.train[1]).tolist() == [15] * 10


def test_early_stopping_ends_with_the_best_weights() -> None:
    split = digits(0, train=100)
    model = nn.MLP(64, [64], 10)

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.03)  # type: ignore[arg-type]

    outcome = train(model, split, Recipe(200, optimizer, patience=4), seed=0)
    losses = outcome.curves["val_loss"][1:]
    assert len(losses) < 200
    assert outcome.stopped == int(np.argmin(losses)) + 1 == len(losses) - 4
    assert outcome.last["val_loss"] == min(losses)
    model.eval()
    loss = torch.nn.functional.cross_entropy(model(split.prepare(split.val[0])), split.val[1])
    assert float(loss.detach()) == pytest.approx(min(losses))


def test_networks_are_what_they_are_called() -> None:
    x = torch.randn(30, 64)
    for norm in (False, True):
        for residual in (False, True):
            deep = vanishing_gradients.network(vanishing_gradients.Setting("relu", norm, residual))
            assert sum(p.ndim == 2 for p in deep.parameters()) == vanishing_gradients.LAYERS
            kinds = {type(m).__name__ for m in deep.modules()}
            assert ("BatchNormAct1d" in kinds) is norm
            assert ("Residual" in kinds) is residual
            assert deep(x).shape == (30, 10)
    zeros = initialization.network(initialization.SETTINGS["zeros"])
    assert not any(p.any() for p in zeros.parameters())
    large, right = (initialization.network(initialization.Setting(scale=scale)) for scale in (10.0, 1.0))
    assert float((large.hidden3.weight.std() / right.hidden3.weight.std()).detach()) == pytest.approx(10, rel=0.1)
    assert float(right.hidden3.weight.detach().square().mean()) == pytest.approx(2 / 64, rel=0.1)
