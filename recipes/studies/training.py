"""The plain training loop of the studies, and their data: scikit-learn's digits, and MNIST-1D."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from bp_torch import nn

from ..data import Augmentation, derive_seed

Pair = tuple[Tensor, Tensor]


@dataclass
class Split:
    """Rows of features (N, ...) and classes (N,), as recorded, and the statistics of the training rows."""

    train: Pair
    val: Pair
    test: Pair

    def __post_init__(self) -> None:
        self.mean, self.deviation = self.train[0].mean(), self.train[0].std(correction=0)

    def prepare(self, x: Tensor) -> Tensor:
        """Standardized by the training rows, flattened."""
        return ((x - self.mean) / self.deviation).flatten(1)


def split_rows(x: np.ndarray, y: np.ndarray, seed: int, train: int, val: int, test: int) -> Split:
    """Stratified by class. The test and validation rows of a seed are the same whatever `train` is, and the training
    rows of a smaller `train` are among those of a larger one."""
    state = derive_seed(seed, 7) % 2**32
    rows, held = train_test_split(np.arange(len(y)), test_size=val + test, stratify=y, random_state=state)
    val_rows, test_rows = train_test_split(held, test_size=test, stratify=y[held], random_state=state)
    parts = (_first_of_each(rows, y, train), val_rows, test_rows)
    pairs = [(torch.tensor(x[r], dtype=torch.float32), torch.tensor(y[r], dtype=torch.int64)) for r in parts]
    return Split(*pairs)


def _first_of_each(rows: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """`count` rows, as many of each class as there may be, in the order that they have."""
    rank = np.empty(len(rows), int)
    for label in np.unique(y):
        mine = y[rows] == label
        rank[mine] = np.arange(mine.sum())
    return rows[np.argsort(rank, kind="stable")[:count]]


def digits(seed: int, train: int = 1000, val: int = 150, test: int = 600) -> Split:
    """scikit-learn's 1,797 digits, (N, 1, 8, 8) in [0, 1]."""
    data = load_digits()
    return split_rows(data.images[:, None] / 16.0, data.target, seed, train, val, test)


@cache
def _mnist1d() -> tuple[np.ndarray, np.ndarray]:
    from mnist1d.data import get_dataset_args, make_dataset

    settings, state = get_dataset_args(), np.random.get_state()  # noqa: NPY002  make_dataset seeds the global generator
    data = make_dataset(settings)
    np.random.set_state(state)  # noqa: NPY002
    return np.concatenate([data["x"], data["x_test"]]), np.concatenate([data["y"], data["y_test"]])


def mnist1d(seed: int, train: int = 3000, val: int = 500, test: int = 1000) -> Split:
    """MNIST-1D: 5,000 signals of 40 points, 10 classes, made here by its package (Greydanus, arXiv:2011.14439)."""
    x, y = _mnist1d()
    return split_rows(x, y, seed, train, val, test)


@dataclass
class Recipe:
    """How to train. `penalty` is called with the matrices; `schedule` with the optimizer; both may lack."""

    epochs: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch: int = 32
    penalty: Callable[[list[Tensor]], Tensor] | None = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    by_step: bool = False
    """Whether the schedule advances with each step, not with each epoch."""
    augment: Augmentation | None = None
    patience: int | None = None
    """Epochs without a better validation loss that end training; then the best epoch's weights are restored."""
    measure_every: int = 1


@dataclass
class Outcome:
    """What came of a training: curves by epoch (each with the epochs at which it was measured), and the end."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    """The measures of the weights that the network ends with."""
    steps: int = 0
    stopped: int = 0
    """The epoch whose weights the network has."""
    rates: list[float] = field(default_factory=list)
    """The learning rate of each step."""

    def numbers(self) -> dict[str, Any]:
        """For a cell: the last measures and, under `curves`, all."""
        return self.last | {"curves": self.curves, "stopped": self.stopped}


def batches(
    x: Tensor, y: Tensor, batch: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Shuffled by (seed, epoch). A last batch of a single row is left out, for batch norm."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, 11))
    for rows in torch.randperm(len(y), generator=generator).split(batch):
        if len(rows) > 1:
            yield x[rows], y[rows], generator


@torch.no_grad()
def measure(model: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy in evaluation mode; a loss that is not finite is +inf."""
    model.eval()
    logits = model(x)
    loss = float(torch.nn.functional.cross_entropy(logits, y))
    return loss if math.isfinite(loss) else math.inf, float((logits.argmax(1) == y).float().mean())


def train(
    model: torch.nn.Module,
    split: Split,
    recipe: Recipe,
    seed: int,
    step_hooks: tuple[Callable[[int], Any], Callable[[int], Any]] | None = None,
) -> Outcome:
    """Train in place. `step_hooks` are called before and after each optimizer step."""
    loss_function = nn.CrossEntropyLoss()
    parameters = list(model.parameters())
    matrices: list[Tensor] = [p for p in parameters if p.ndim > 1]
    best_epoch = 0
    optimizer = recipe.optimizer(parameters)
    schedule = None if recipe.schedule is None else recipe.schedule(optimizer)
    plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    recorded = {"train": split.train, "val": split.val, "test": split.test}
    prepared = {name: (split.prepare(x), y) for name, (x, y) in recorded.items()}
    outcome, best, best_weights = Outcome(), math.inf, None
    x_train, y_train = split.train if recipe.augment is not None else prepared["train"]

    def note(epoch: int, in_curves: bool = True) -> float:
        for name, (x, y) in prepared.items():
            outcome.last[f"{name}_loss"], outcome.last[f"{name}_accuracy"] = measure(model, x, y)
        if in_curves:
            for key, value in {"epoch": epoch, **outcome.last}.items():
                outcome.curves.setdefault(key, []).append(value)
        return outcome.last["val_loss"]

    note(0)
    for epoch in range(recipe.epochs):
        model.train()
        for x, y, generator in batches(x_train, y_train, recipe.batch, seed, epoch):
            if recipe.augment is not None:
                x = split.prepare(recipe.augment(x, generator))
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            if recipe.penalty is not None:
                loss = loss + recipe.penalty(matrices)
            loss.backward()
            if step_hooks is not None:
                step_hooks[0](outcome.steps)
            optimizer.step()
            if step_hooks is not None:
                step_hooks[1](outcome.steps)
            outcome.rates.append(float(optimizer.param_groups[0]["lr"]))
            outcome.steps += 1
            if schedule is not None and recipe.by_step:
                schedule.step()
        last = epoch + 1 == recipe.epochs
        val_loss = math.inf
        if last or plateau or recipe.patience is not None or (epoch + 1) % recipe.measure_every == 0:
            val_loss = note(epoch + 1)
        if schedule is not None and not recipe.by_step:
            schedule.step(*([val_loss] if plateau else []))
        outcome.stopped = epoch + 1
        if recipe.patience is not None:
            if val_loss < best:
                best, best_epoch = val_loss, epoch + 1
                best_weights = {key: value.clone() for key, value in model.state_dict().items()}
            elif epoch + 1 - best_epoch >= recipe.patience:
                break
    if best_weights is not None:
        model.load_state_dict(best_weights)
        note(best_epoch, in_curves=False)
        outcome.stopped = best_epoch
    return outcome
