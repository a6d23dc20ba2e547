"""Data modules: seeded stratified splits, standardization without leakage, batches that can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from . import ConfigError


class Augmentation:
    """A random change of a training batch that keeps the labels true."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x, changed, in a new tensor; every random amount comes from the generator."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(x, generator)")


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, such as a run's seed and an epoch."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Batches:
    """Mini-batches of tensors that are already in memory, cut by one index operation each.

    Without a seed: every row once, in order. With one: shuffled, and the order and every random amount are a function
    of (seed, epoch) alone, so that a resumed run sees the batches that it would have seen. `transform(batch,
    generator)` makes what the network sees of a batch. A last batch of a single row is left out of training, because
    batch norm has no variance over one row.
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
        rows = self.rows - (self.seed is not None and self.rows % self.batch_size == 1)
        return -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator, order = torch.Generator(), torch.arange(self.rows)
        if self.seed is not None:
            generator.manual_seed(derive_seed(self.seed, self.epoch))
            order = torch.randperm(self.rows, generator=generator)
        for rows in order.split(self.batch_size)[: len(self)]:
            batch = tuple(t[rows] for t in self.tensors)
            yield batch if self.transform is None else self.transform(batch, generator)


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

    The split is stratified by class and seeded. Standardization is x̂ = (x - mean) / deviation for each feature
    (dimension 1: a column of a table, a channel of images), with both taken from the training split alone; a feature
    that never varies there keeps deviation 1. Augmentation is applied to training batches only, before
    standardization, so that what it shifts in from outside an image is background.

    Args:
        batch_size: rows in a mini-batch; ≥ 2.
        val_fraction, test_fraction: shares of all rows, each in (0, 1), together below 1.
        augment: called as augment(x, generator) on each training batch; None leaves the batches as they are.
        seed: governs split, order and augmentation; None takes the number last given to `torch.manual_seed`.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        augment: Augmentation | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, got {batch_size}")
        for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < share < 1:
                raise ValueError(f"{name} must be in (0, 1), got {share}")
        if val_fraction + test_fraction >= 1:
            raise ValueError(f"val_fraction + test_fraction must be below 1, got {val_fraction + test_fraction}")
        self.batch_size, self.val_fraction, self.test_fraction = batch_size, val_fraction, test_fraction
        self.augment = augment
        self.seed = torch.initial_seed() if seed is None else seed
        self.splits = {}

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows as they were recorded, (N, feature or channel, ...), and their classes (N,), 0 to classes - 1."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def setup(self, stage: str) -> None:
        """Split, and measure the training split. The splits hold recorded values; batches are standardized."""
        if self.splits:
            return
        x, y = self.load()
        seed = derive_seed(self.seed) % 2**32
        rows, test = train_test_split(np.arange(len(y)), test_size=self.test_fraction, stratify=y, random_state=seed)
        share = self.val_fraction / (1 - self.test_fraction)
        train, val = train_test_split(rows, test_size=share, stratify=y[rows], random_state=seed)
        for name, index in (("train", train), ("val", val), ("test", test)):
            self.splits[name] = torch.tensor(x[index], dtype=torch.float32), torch.tensor(y[index], dtype=torch.int64)
        x_train = self.splits["train"][0]
        over = [d for d in range(x_train.ndim) if d != 1]
        self.mean = x_train.mean(over, keepdim=True)
        deviation = x_train.std(over, keepdim=True, correction=0)
        self.deviation = torch.where(deviation > 0, deviation, 1.0)

    def standardize(self, x: Tensor) -> Tensor:
        """(x - mean) / deviation, by the training split's statistics."""
        return (x - self.mean) / self.deviation

    def prepare(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = tensors
        return self.standardize(x), *rest

    def train_dataloader(self) -> Batches:
        def transform(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
            x, *rest = batch
            return self.prepare(x if self.augment is None else self.augment(x, generator), *rest)

        return Batches(self.splits["train"], self.batch_size, self.seed, transform)

    def baselines(self) -> dict[str, dict[str, float]]:
        from .baselines import classification_baselines

        return classification_baselines(self)

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint must keep to standardize new rows, and to refuse another split."""
        return super().state_dict() | {"mean": self.mean, "deviation": self.deviation}


class Digits(ArrayData):
    """scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, scaled to [0, 1]: (N, 1, 8, 8). No download.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """

    classes = tuple("0123456789")

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        digits = load_digits()
        return digits.images[:, None] / 16.0, digits.target
