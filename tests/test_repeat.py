"""bp-torch repeat: several runs in one process, and the table of their spread."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from commands import FIT_ALONE

pytest.importorskip("lightning")
from bp_torch import cli
from bp_torch.recipes import ConfigError
from bp_torch.recipes import cli as recipes_cli
from bp_torch.recipes.repeat import OURS, Summary, lower_is_better, parse_seeds, take_options

ONE_BACKEND = "what is told about several runs depends on no backend"
pytestmark = pytest.mark.usefixtures("own_folder")

QUICK = [
    *("--config", "digits"),
    *("--model.network.hidden_features", "[16]"),
    *("--trainer.max_epochs", "1"),
    *FIT_ALONE,
]


def test_repeat_tells_what_each_fit_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["repeat", *QUICK, "--seeds", "3,0"]) == 0
    shown = capsys.readouterr().out
    alone = recipes_cli.run(["fit", *QUICK, "--seed_everything", "3"])
    assert alone is not None
    told = json.loads(Path("runs/digits/summary.json").read_text())
    assert [run["seed"] for run in told["runs"]] == [3, 0]
    assert [Path(run["folder"]).name for run in told["runs"]] == ["version_0", "version_1"]
    assert told["runs"][0]["results"][OURS] == alone.test  # the same bits, whatever ran before in the process
    accuracy = told["results"][OURS]["accuracy"]
    assert accuracy["values"] == [run["results"][OURS]["accuracy"] for run in told["runs"]]
    assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 2)
    text = Path("runs/digits/summary.md").read_text()
    assert text.count("seed 3") == 3
    assert "| runs/digits/version_1 | max_epochs = 1 reached |" in text
    for value in accuracy["values"]:
        assert f"{value:.2%}" in text
        assert f"{value:.2%}" in shown


def test_folds_test_each_row_once() -> None:
    assert cli.main(["repeat", *QUICK, "--folds=3"]) == 0
    told = json.loads(Path("runs/digits/summary.json").read_text())
    assert [(run["seed"], run["fold"], run["label"]) for run in told["runs"]] == [
        (0, 0, "fold 0"),
        (0, 1, "fold 1"),
        (0, 2, "fold 2"),
    ]


def summary(ours: list[float], theirs: list[float], metric: str) -> Summary:
    runs = [
        {"label": f"seed {i}", "results": {OURS: {metric: a}, "Other": {metric: b}}, "seconds": 1.0}
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    return Summary("bp-torch repeat", Path("runs"), runs, {metric: ".2f"})


def test_spread_and_comparison() -> None:
    ours, theirs = [0.9, 0.8, 0.7], [0.85, 0.8, 0.75]
    for metric, better in (("accuracy", 1), ("loss", 1)):
        spread = summary(ours, theirs, metric).results["Other"][metric]
        assert spread.better == better  # a tie is not better
        assert spread.deviation == pytest.approx(statistics.stdev(theirs))
    assert list(summary(ours, theirs, "auc").rows("auc")) == [
        ["this recipe", "0.80", "0.10", "0.90", "0.80", "0.70", ""],
        ["Other", "0.80", "0.05", "0.85", "0.80", "0.75", "1 of 3"],
    ]
    one = summary([0.5], [0.6], "rmse").results
    assert one["Other"]["rmse"].deviation is None
    assert one["Other"]["rmse"].better == 1


def test_a_model_that_a_run_lacks_is_left_out() -> None:
    some = summary([1.0, 1.0], [1.0, 1.0], "auc")
    del some.runs[1]["results"]["Other"]
    assert list(some.results) == [OURS]


@pytest.mark.parametrize(
    "metric", ["loss", "rmse", "log loss", "relative L2 error", "cost_per_loan", "Brier score", "ece"]
)
def test_lower_is_better(metric: str) -> None:
    assert lower_is_better(metric)


@pytest.mark.parametrize("metric", ["accuracy", "auc", "ndcg@10", "balanced accuracy", "glossary"])
def test_higher_is_better(metric: str) -> None:
    assert not lower_is_better(metric)


@pytest.mark.parametrize("text", ["", "a", "0,,1", "0;1", "-1", "1,1", "1.5", "4294967296"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--seeds: expected different numbers"):
        parse_seeds(text)


def test_options_are_taken_out() -> None:
    taken = take_options(["-c", "x", "--seeds=1,2", "--folds", "3", "--y"], ("--seeds", "--folds"))
    assert taken == ({"--seeds": "1,2", "--folds": "3"}, ["-c", "x", "--y"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--seeds", "x"], "--seeds: "),
        (["--seeds"], "--seeds: a value must follow"),
        (["--folds", "1"], "--folds: "),
        (["--seed_everything", "1"], "--seed_everything: "),
        (["--ckpt_path=last"], "--ckpt_path: "),
        (["--model.network.dropout", "2"], "dropout: "),
        (["--nonsense", "1"], "--nonsense"),
    ],
)
def test_bad_arguments_get_one_line(given: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["repeat", *QUICK, *given]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert expected in told


def test_fast_dev_run_has_no_summary() -> None:
    assert cli.main(["repeat", *QUICK, "--seeds", "0", "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("runs/digits/summary.md").exists()
