"""What scikit-learn reaches on the same split: the numbers that a recipe must stand beside."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Arrays = tuple[np.ndarray, np.ndarray]


def classification_baselines(train: Arrays, test: Arrays, classes: int, seed: int) -> dict[str, dict[str, float]]:
    """Fit each baseline on the rows (N, columns) and classes (N) to train on; return its test accuracy and loss.

    Each column is standardized by the rows to train on, as is usual with these models.
    """
    models = {
        "LogisticRegression": LogisticRegression(max_iter=5000),
        "MLPClassifier": MLPClassifier(hidden_layer_sizes=(256,), max_iter=1000, random_state=seed),
    }
    results = {}
    for name, model in models.items():
        fitted = make_pipeline(StandardScaler(), model).fit(*train)
        x, y = test
        probability = fitted.predict_proba(x)
        results[name] = {
            "accuracy": float(fitted.score(x, y)),
            "loss": float(log_loss(y, probability, labels=np.arange(classes))),
        }
    return results
