"""Data modules: seeded stratified splits, standardization without leakage, batches that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split
from torch import Tensor

from . import ConfigError


class Augmentation:
    """A random change of a training batch that keeps the labels true."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x, changed, in a new tensor; every random amount comes from the generator."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, generator)")


def check_batch_size(batch_size: int) -> None:
    """Refuse what no batch of rows can have: one row has no variance for batch norm."""
    if not 2 <= batch_size < 2**63:
        raise ValueError(f"batch_size must be at least 2 and below 2⁶³, got {batch_size}")


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, such as a run's seed and an epoch."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def process() -> tuple[int, int]:
    """The rank of this process and the number of processes that train together; 0 and 1 alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes that train together, in the order of their ranks, on the CPU."""
    parts: list[Any] = [None] * process()[1]
    if len(parts) == 1:
        return rows.cpu()
    torch.distributed.all_gather_object(parts, rows.cpu())
    return torch.cat(parts)


class Batches:
    """Mini-batches of tensors that are already in memory, cut by one index operation each.

    Without a seed: every row once, in order. With one: shuffled, and the order and every random amount are a function
    of (seed, epoch) alone, so that a resumed run sees the batches that it would have seen. `transform(batch,
    generator)` makes what the network sees of a batch. A last batch of a single row is left out of training, because
    batch norm has no variance over one row.

    Where several processes train together (`torch.distributed`), each has its own rows, and all have as many batches.
    In training the k-th batches of all processes are together the k-th batch of one process that takes as many times
    `batch_size` rows; a last batch of less than two rows for each is left out. `weight(k)` is what a process's mean
    loss counts, so that the mean of the processes' gradients is that of the rows. Random amounts depend on the rank.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        seed: int | None = None,
        transform: Callable[[tuple[Tensor, ...], torch.Generator], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.tensors, self.batch_size, self.seed, self.transform = tuple(tensors), batch_size, seed, transform
        self.rows, self.epoch = len(tensors[0]), 0
        self.sampler, self.batch_sampler = self, None  # Lightning calls loader.sampler.set_epoch before each epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions())

    def positions(self) -> list[Tensor]:
        """Of each batch of this process, the places of its rows in the epoch's order."""
        rank, processes = process()
        if self.seed is not None:
            return [rows.tensor_split(processes)[rank] for rows in self.together()]
        if processes == 1:
            return list(torch.arange(self.rows).split(self.batch_size))
        if self.rows < processes:
            raise ConfigError(f"trainer.devices: {processes} processes cannot share {self.rows} rows")
        batches = -(-self.rows // (self.batch_size * processes))
        return list(torch.arange(rank, self.rows, processes).tensor_split(batches))

    def together(self) -> list[Tensor]:
        """Of each training batch, the places of the rows of all processes."""
        processes = process()[1]
        batches = torch.arange(self.rows).split(self.batch_size * processes)
        batches = [rows for rows in batches if len(rows) >= min(self.batch_size, 2) * processes]
        if not batches:
            raise ConfigError(f"data: {self.rows} training rows make no batch for {processes} process(es)")
        return batches

    def weight(self, index: int) -> float:
        """(rows of this process) · processes / (rows of all) of a training batch; 1 of one process."""
        rank, processes = process()
        if processes == 1:
            return 1.0
        rows = self.together()[index]
        return len(rows.tensor_split(processes)[rank]) * processes / len(rows)

    def generators(self) -> tuple[torch.Generator, torch.Generator]:
        """Of the epoch's order, which all processes share, and of random amounts; of one process they are one."""
        rank, processes = process()
        order, amounts = torch.Generator(), torch.Generator()
        if self.seed is not None:
            order.manual_seed(derive_seed(self.seed, self.epoch))
            amounts.manual_seed(derive_seed(self.seed, self.epoch, 4, rank))
        return order, order if processes == 1 else amounts

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator, amounts = self.generators()
        order = torch.arange(self.rows) if self.seed is None else torch.randperm(self.rows, generator=generator)
        for positions in self.positions():
            batch = tuple(t[order[positions]] for t in self.tensors)
            yield batch if self.transform is None else self.transform(batch, amounts)


class Data(LightningDataModule):
    """What every recipe's data offers. `setup` fills `splits`: train, val and test, each a tuple of tensors.

    The splits hold what was recorded, a row of each tensor for each row of the data. Loaders give batches as the
    network sees them, which `prepare` makes of the recorded rows. Everything random comes from `seed`.
    """

    seed: int
    batch_size: int
    classes: Sequence[str] = ()
    """Names of the classes; empty for regression."""
    target_mean: float | Tensor = 0.0
    target_scale: float | Tensor = 1.0
    """Targets are (recorded - target_mean) / target_scale."""
    splits: dict[str, tuple[Tensor, ...]]

    def setup(self, stage: str) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define setup(stage)")

    def prepare(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """A batch as the network sees it, of recorded rows."""
        return tensors

    def example(self, rows: int) -> tuple[Tensor, ...]:
        """The first rows of the training split, as the network sees them."""
        return self.prepare(*(t[:rows] for t in self.splits["train"]))

    def baselines(self) -> dict[str, dict[str, float]]:
        """Test metrics of other people's models, fitted on the training split, by the model's name."""
        return {}

    def in_order(self, split: str) -> Batches:
        """Every row of a split once, in order."""
        return Batches(self.prepare(*self.splits[split]), max(self.batch_size, 256))

    def train_dataloader(self) -> Any:
        return Batches(self.splits["train"], self.batch_size, self.seed, lambda batch, generator: self.prepare(*batch))

    def val_dataloader(self) -> Any:
        return self.in_order("val")

    def test_dataloader(self) -> Any:
        return self.in_order("test")

    def predict_dataloader(self) -> Any:
        return self.in_order("test")

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint must keep to refuse another split."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, object]) -> None:
        if state["seed"] != self.seed:  # another split: rows that were trained on would stand in the test split
            raise ConfigError(
                f"seed_everything: the checkpoint was trained on the split of seed {state['seed']}, this run has "
                f"{self.seed}; add --seed_everything {state['seed']}"
            )


class ArrayData(Data):
    """A classification data set that fits in memory. Subclasses say only where the arrays come from: `load`.

    The split is stratified by class and seeded. Rows of one group (such as one person's recordings), if `load` names
    groups, are never in two of its parts; the parts' sizes are then as near to the fractions as whole groups allow.
    With `folds` the test split is one of that many equal parts, the `fold`-th, and `test_fraction` is not used: runs
    that differ in `fold` alone test each row once.

    Standardization is x̂ = (x - mean) / deviation for each feature (dimension 1: a column of a table, a channel of
    images), with both taken from the training split alone; a feature that never varies there keeps deviation 1.
    Augmentation is applied to training batches only, before standardization, so that what it shifts in from outside
    an image is background.

    Args:
        batch_size: rows in a mini-batch; ≥ 2.
        val_fraction, test_fraction: shares of all rows, each in (0, 1), together below 1.
        augment: called as augment(x, generator) on each training batch; None leaves the batches as they are.
        seed: governs split, order and augmentation; None takes the number last given to `torch.manual_seed`.
        folds: 0, or the number of parts of a k-fold split; ≥ 2.
        fold: which of them is tested; 0 to folds - 1.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        augment: Augmentation | None = None,
        seed: int | None = None,
        folds: int = 0,
        fold: int = 0,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < share < 1:
                raise ValueError(f"{name} must be in (0, 1), got {share}")
        if not folds and val_fraction + test_fraction >= 1:
            raise ValueError(f"val_fraction + test_fraction must be below 1, got {val_fraction + test_fraction}")
        if folds < 0 or folds == 1:
            raise ValueError(f"folds must be 0, or at least 2, got {folds}")
        if not 0 <= fold < max(folds, 1):
            raise ValueError(f"fold must be at least 0 and below folds = {folds}, got {fold}")
        if folds and val_fraction + 1 / folds >= 1:
            raise ValueError(f"val_fraction must be below 1 - 1 / folds = {1 - 1 / folds:.3g}, got {val_fraction}")
        self.batch_size, self.val_fraction, self.test_fraction = batch_size, val_fraction, test_fraction
        self.folds, self.fold, self.augment = folds, fold, augment
        self.seed = torch.initial_seed() if seed is None else seed
        self.splits = {}

    def load(self) -> tuple[np.ndarray, ...]:
        """All rows as they were recorded, (N, feature or channel, ...), and their classes (N,), 0 to classes - 1.

        A third array (N,) may name the group of each row.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def setup(self, stage: str) -> None:
        """Split, and measure the training split. The splits hold recorded values; batches are standardized."""
        if self.splits:
            return
        x, y, *groups = self.load()
        for name, index in self.split(y, *groups).items():
            self.splits[name] = torch.tensor(x[index], dtype=torch.float32), torch.tensor(y[index], dtype=torch.int64)
        x_train = self.splits["train"][0]
        over = [d for d in range(x_train.ndim) if d != 1]
        self.mean = x_train.mean(over, keepdim=True)
        deviation = x_train.std(over, keepdim=True, correction=0)
        self.deviation = torch.where(deviation > 0, deviation, 1.0)

    def split(self, y: np.ndarray, groups: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The rows of each split, from the rows' classes and groups."""
        seed = derive_seed(self.seed) % 2**32
        rows = np.arange(len(y))
        if self.folds:
            test = fold_of(rows, y, groups, self.folds, self.fold, seed)
            rows, taken = np.setdiff1d(rows, test), 1 / self.folds
        else:
            rows, test = part(rows, y, groups, self.test_fraction, seed)
            taken = self.test_fraction
        train, val = part(rows, y, groups, self.val_fraction / (1 - taken), seed)
        return {"train": train, "val": val, "test": test}

    def standardize(self, x: Tensor) -> Tensor:
        """(x - mean) / deviation, by the training split's statistics."""
        return (x - self.mean) / self.deviation

    def prepare(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = tensors
        return self.standardize(x), *rest

    def training_batch(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """A batch of recorded rows, augmented and standardized."""
        x, *rest = batch
        return self.prepare(x if self.augment is None else self.augment(x, generator), *rest)

    def train_dataloader(self) -> Batches:
        return Batches(self.splits["train"], self.batch_size, self.seed, self.training_batch)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Those of classifiers, on the recorded rows, flattened, and not the augmented ones."""
        from .baselines import classification_baselines

        splits = (self.splits[name] for name in ("train", "test"))
        train, test = ((x.flatten(1).double().numpy(), y.numpy()) for x, y in splits)
        return classification_baselines(train, test, len(self.classes), derive_seed(self.seed, 2) % 2**32)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint must keep to standardize new rows, and to refuse another split."""
        split = {"folds": self.folds, "fold": self.fold}
        return super().state_dict() | {"mean": self.mean, "deviation": self.deviation} | split

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        for name in ("folds", "fold"):
            if state.get(name, 0) != getattr(self, name):
                raise ConfigError(
                    f"data.init_args.{name}: the checkpoint was trained with {state.get(name, 0)}, this run has "
                    f"{getattr(self, name)}"
                )


def fold_of(
    rows: np.ndarray, y: np.ndarray, groups: np.ndarray | None, folds: int, which: int, seed: int
) -> np.ndarray:
    """The rows of one of `folds` equal parts, stratified by y; a group lies in one part, whole."""
    if groups is None:
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(rows, y[rows])
    else:
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(rows, y[rows], groups[rows])
    try:
        return rows[[test for _, test in splits][which]]
    except ValueError as error:
        raise ConfigError(f"data.init_args.folds: {error}") from error


def part(
    rows: np.ndarray, y: np.ndarray, groups: np.ndarray | None, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in two, the second with a share of about `share`; stratified by y, and no group in both."""
    if groups is None:
        try:
            first, second = train_test_split(rows, test_size=share, stratify=y[rows], random_state=seed)
        except ValueError as error:
            key = "data.init_args.val_fraction, test_fraction"
            raise ConfigError(f"{key}: {share:.3g} of {len(rows)} rows: {error}") from error
        return first, second
    # There is no stratified random split of groups in scikit-learn; one of 1 / share folds is one.
    second = fold_of(rows, y, groups, max(2, round(1 / share)), 0, seed)
    return np.setdiff1d(rows, second), second


class Digits(ArrayData):
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, scaled to [0, 1]: (N, 1, 8, 8). No download.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """

    classes = tuple("0123456789")

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        digits = load_digits()
        return digits.images[:, None] / 16.0, digits.target
