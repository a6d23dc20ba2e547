"""Numbers that say how good probabilities of two classes are, and the calibration of them. Plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

Array = np.ndarray
Calibration = Literal["none", "scaling", "isotonic"]


def auc(y: Array, score: Array) -> float:
    """The share of pairs (a row of class 1, a row of class 0) in which the first has the higher score; ties count ½.

    AUC = (Σ ranks of class 1 - n₁ (n₁ + 1) / 2) / (n₁ n₀), ranks from 1, equal scores sharing their mean rank
    """
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    n1 = int(y.sum())
    n0 = len(y) - n1
    if not n1 or not n0:
        raise ValueError("auc needs rows of both classes")
    return float((rank[inverse][y == 1].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def log_loss(y: Array, p: Array) -> float:
    """The mean of -log of the probability that was given to the true class; p is cut to 1e-7 from 0 and 1."""
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return float(-np.where(y == 1, np.log(p), np.log1p(-p)).mean())


def reliability(y: Array, p: Array, bins: int = 10) -> tuple[Array, Array, Array]:
    """Rows in order of p, in `bins` bins of equal count: each bin's mean p, its share of class 1, its rows."""
    parts = [part for part in np.array_split(np.argsort(p, kind="stable"), bins) if len(part)]
    said, was = (np.array([v[part].mean() for part in parts]) for v in (p, y))
    return said, was, np.array([len(part) for part in parts])


def expected_calibration_error(y: Array, p: Array, bins: int = 10) -> float:
    """Σ (rows of the bin / rows) |mean p - share of class 1|, over the bins of `reliability`."""
    said, was, rows = reliability(y, p, bins)
    return float((rows * np.abs(said - was)).sum() / rows.sum())


def costs(y: Array, p: Array, threshold: Array | float, ratio: float) -> Array:
    """The mean cost of a row if class 1 is assumed where p ≥ threshold.

    A row of class 1 that was missed costs `ratio`, a row of class 0 that was taken for class 1 costs 1. With true
    probabilities the cheapest threshold is 1 / (1 + ratio).
    """
    assumed = p[:, None] >= np.atleast_1d(threshold)
    is1 = (y == 1)[:, None]
    return (ratio * (is1 & ~assumed) + (~is1 & assumed)).mean(0)


def binary_scores(y: Array, score: Array, p: Array) -> dict[str, float]:
    """AUC of the scores; accuracy at p = ½, Brier score, calibration error and log loss of the probabilities."""
    return {
        "auc": auc(y, score),
        "accuracy": float(((p >= 0.5) == (y == 1)).mean()),
        "brier": float(np.square(p - y).mean()),
        "ece": expected_calibration_error(y, p),
        "loss": log_loss(y, p),
    }


def calibrate(y: Array, logit: Array, how: Calibration) -> Callable[[Array], Array]:
    """A function from logits to probabilities of class 1, fitted to validation rows.

    - none: σ(z).
    - scaling: σ(z / T + c), with T and c of the least log loss. T undoes overconfidence, c a shift such as that of
      class weights.
    - isotonic: the rising step function of the least squared error.

    Sources: J. Platt, 1999; C. Guo et al., On Calibration of Modern Neural Networks, 2017; B. Zadrozny and C. Elkan,
    2002.
    """
    if how == "none":
        return lambda z: 1 / (1 + np.exp(-z))
    if how == "scaling":
        scaling = LogisticRegression(C=1e6, tol=1e-8).fit(logit[:, None], y)
        return lambda z: scaling.predict_proba(z[:, None])[:, 1]
    steps = IsotonicRegression(out_of_bounds="clip").fit(logit, y)
    return lambda z: steps.predict(z)


def ranking_scores(person: Array, score: Array, relevant: Array, k: int = 10) -> dict[str, float]:
    """How good the k candidates with the highest scores are, each number the mean over people.

        precision = hits / k,  recall = hits / relevant candidates,
        NDCG = Σ_{hits} 1 / log₂(place + 1) / the same sum if all relevant ones came first, places from 1

    Args:
        person, score, relevant: of each candidate (M,): whose it is, what it is ranked by, and whether it should be
            found. Each person must have a relevant candidate. Equal scores stay in the order given.
    """
    precision, recall, gain = [], [], []
    weight = 1 / np.log2(np.arange(2, k + 2))
    order = np.lexsort((-score, person))
    for found in np.split(relevant[order].astype(float), np.flatnonzero(np.diff(person[order])) + 1):
        if not found.any():
            raise ValueError("ranking_scores: a person has no relevant candidate")
        top, total = found[:k], int(found.sum())
        precision.append(top.sum() / k)
        recall.append(top.sum() / total)
        gain.append((top * weight[: len(top)]).sum() / weight[:total].sum())
    means = (float(np.mean(values)) for values in (precision, recall, gain))
    return dict(zip((f"precision@{k}", f"recall@{k}", f"ndcg@{k}"), means, strict=True))
