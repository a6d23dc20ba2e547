"""Parkinson's disease from the voice: 252 people, 751 features of a sustained vowel, 188 of the people have it.

Source: C. O. Sakar et al., A comparative analysis of speech signal processing algorithms for Parkinson's disease
classification and the use of the tunable Q-factor wavelet transform, 2019; as in R's package modeldata (`pd_speech`),
one row a person, the mean of the recordings.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..data import ArrayData, derive_seed
from .binary import BinaryClassifier, log_odds
from .scores import auc
from .tables import piecewise_linear, quantile_edges, read_table


class PDSpeech(ArrayData):
    """Class 1 has the disease. Each person is a group of its own: no person stands in two splits.

    What the network sees of each feature x, by the training rows alone:

    - `piecewise`, the default: T = `bins` numbers, e_t - mean of e_t, with e_t = clip((x - b_{t-1}) / (b_t - b_{t-1}),
      0, 1) and b₀ ≤ ... ≤ b_T the feature's quantiles (`tables.piecewise_linear`): a dense layer of them is a
      piecewise-linear function of x, which can end or turn at each quantile;
    - `scores`: x̂ = Φ⁻¹((r + 1/2) / (n + 1)), normally distributed, cut to ±`limit`, with r how many of the n training
      rows are below x, equal ones counting half;
    - `standardize`: x̂ = (x - mean) / deviation, cut likewise.

    Args:
        features: `piecewise` (751 · `bins` of them), `scores` or `standardize` (751).
        bins: of each feature, for `piecewise`; ≥ 1.
        limit: the largest |x̂|, for the others; > 0.
        The others: as in `ArrayData`.
    """

    classes = ("control", "PD")

    def __init__(
        self,
        batch_size: int = 32,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        seed: int | None = None,
        folds: int = 0,
        fold: int = 0,
        features: Literal["piecewise", "scores", "standardize"] = "piecewise",
        bins: int = 8,
        limit: float = 3.0,
    ) -> None:
        super().__init__(batch_size, val_fraction, test_fraction, None, seed, folds, fold)
        if not limit > 0:
            raise ValueError(f"limit must be positive, got {limit}")
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        self.features, self.bins, self.limit = features, bins, limit
        self.baseline_probabilities: dict[str, np.ndarray] = {}

    def load(self) -> tuple[np.ndarray, ...]:
        table = read_table("modeldata", "pd_speech")
        x = table.drop(columns="class").to_numpy(np.float64)
        return x, (table["class"].to_numpy() == "PD").astype(np.int64), np.arange(len(x))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        x = self.splits["train"][0]
        self.sorted = x.T.contiguous().sort(1).values
        self.edges = quantile_edges(x.double(), self.bins)
        self.centre = piecewise_linear(x.double(), self.edges).mean(0)

    def standardize(self, x: Tensor) -> Tensor:
        if self.features == "piecewise":
            return (piecewise_linear(x.double(), self.edges) - self.centre).to(x)
        if self.features == "standardize":
            return super().standardize(x).clamp(-self.limit, self.limit)
        n, values = self.sorted.shape[1], x.T.contiguous()
        rank = torch.searchsorted(self.sorted, values) + torch.searchsorted(self.sorted, values, right=True)
        share = (rank.T / 2 + 0.5) / (n + 1)
        return torch.special.ndtri(share).clamp(-self.limit, self.limit).to(x)

    def baselines(self) -> dict[str, dict[str, float]]:
        """scikit-learn on the same people: fitted to training and validation rows together, since they choose their
        settings by cross-validation inside (5 folds, by AUC). They see recorded features, which the first two
        standardize; with `piecewise`, another LogisticRegression sees what the network sees."""
        from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        seed = derive_seed(self.seed, 2) % 2**32
        inside = StratifiedKFold(5, shuffle=True, random_state=seed)

        def search(model: Any, **grid: list[float]) -> Any:
            name = type(model).__name__.lower()
            named = {f"{name}__{key}": values for key, values in grid.items()}
            return GridSearchCV(make_pipeline(StandardScaler(), model), named, scoring="roc_auc", cv=inside)

        strengths = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
        models: dict[str, Any] = {
            "LogisticRegression": search(LogisticRegression(max_iter=2000), C=strengths),
            "SVC": search(SVC(), C=[0.3, 1.0, 3.0, 10.0], gamma=[1e-4, 3e-4, 1e-3, 3e-3]),
            "RandomForestClassifier": RandomForestClassifier(300, random_state=seed),
            "HistGradientBoostingClassifier": HistGradientBoostingClassifier(max_iter=60, random_state=seed),
        }
        fit_on, y = (torch.cat([self.splits[s][i] for s in ("train", "val")]) for i in (0, 1))
        test, y_test = self.splits["test"][0], self.splits["test"][1].numpy()
        seen = {name: (fit_on.double().numpy(), test.double().numpy()) for name in models}
        if self.features == "piecewise":
            name = "LogisticRegression, the pieces"
            plain = LogisticRegression(max_iter=2000)
            models[name] = GridSearchCV(plain, {"C": strengths}, scoring="roc_auc", cv=inside)
            seen[name] = self.standardize(fit_on).numpy(), self.standardize(test).numpy()
        results = {}
        for name, model in models.items():
            x, x_test = seen[name]
            fitted = model.fit(x, y.numpy())
            score = fitted.decision_function(x_test) if name == "SVC" else fitted.predict_proba(x_test)[:, 1]
            said = fitted.predict(x_test)
            results[name] = {"auc": auc(y_test, score), "accuracy": float((said == y_test).mean())}
            results[name]["mcc"] = matthews(y_test, said)
            if name != "SVC":  # its score is no probability
                self.baseline_probabilities[name] = score
        return results


class SpeechClassifier(BinaryClassifier):
    """`BinaryClassifier` with Matthews' correlation, which does not reward calling everybody ill."""

    formats: ClassVar[dict[str, str]] = {"auc": ".4f", "accuracy": ".2%", "mcc": ".4f", "loss": ".4f"}

    def test_metrics(self, outputs: Tensor, data: Any) -> dict[str, float]:
        said = (log_odds(outputs) > 0).numpy()
        y = data.splits["test"][1].numpy()
        return super().test_metrics(outputs, data) | {"mcc": matthews(y, said)}


def matthews(y: np.ndarray, said: np.ndarray) -> float:
    """The correlation of what is and what was said, both 0 or 1: in [-1, 1]; 0 where one of them never varies."""
    y, said = y - y.mean(), said - said.mean()
    scale = float(np.sqrt((y * y).sum() * (said * said).sum()))
    return float((y * said).sum()) / scale if scale > 0 else 0.0
