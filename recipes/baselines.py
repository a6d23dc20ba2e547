"""What scikit-learn reaches on the same split: the numbers that a recipe must stand beside."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .data import ArrayData, derive_seed


def classification_baselines(data: ArrayData) -> dict[str, dict[str, float]]:
    """Fit each baseline on the training split of a data module that was set up; return its test accuracy and loss.

    The rows are flattened and each column is standardized by the training split, as is usual with these models.
    They see the recorded rows, not the augmented ones.
    """

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        x, y = data.splits[split]
        return x.flatten(1).double().numpy(), y.numpy()

    seed = derive_seed(data.seed, 2) % 2**32
    models = {
        "LogisticRegression": LogisticRegression(max_iter=5000),
        "MLPClassifier": MLPClassifier(hidden_layer_sizes=(256,), max_iter=1000, random_state=seed),
    }
    results = {}
    for name, model in models.items():
        fitted = make_pipeline(StandardScaler(), model).fit(*arrays("train"))
        x, y = arrays("test")
        probability = fitted.predict_proba(x)
        results[name] = {
            "accuracy": float(fitted.score(x, y)),
            "loss": float(log_loss(y, probability, labels=np.arange(len(data.classes)))),
        }
    return results
