"""MNIST-1D: signals of 40 samples, each with one of ten shapes at an unknown place, width and height, in noise.

Source: S. Greydanus and D. Kobak, Scaling down deep learning with MNIST-1D, 2024. Its table: logistic regression 32 %,
MLP 68 %, GRU 91 %, CNN 94 %, people 96 %, without augmentation. The data are generated, not loaded: the paper's 4,000
training rows and 1,000 test rows come from its generator and its seed, and are the same on every machine.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bp_torch import nn

from .. import ConfigError
from ..data import ArrayData, Augmentation, derive_seed, part
from ..modules import Classifier
from ..outcome import Outcome, Section
from ..report import Mistakes, classification_sections


@functools.cache
def generate() -> tuple[np.ndarray, np.ndarray, int]:
    """The signals (5000, 1, 40), float64, their classes (5000,), and how many rows, the last ones, are for testing."""
    try:
        from mnist1d.data import make_dataset
    except ModuleNotFoundError as missing:
        raise ConfigError("data: MNIST1D needs mnist1d, which is not installed: pip install 'bp-torch[recipes]'") from (
            missing
        )
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  it seeds the global generators
    made = make_dataset()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    x = np.concatenate([made["x"], made["x_test"]])[:, None]
    return x, np.concatenate([made["y"], made["y_test"]]), len(made["y_test"])


class MNIST1D(ArrayData):
    """The paper's test rows are the test split, whatever the seed; the seed chooses validation rows among the others.

    Args:
        batch_size, val_fraction, augment, seed: as in `ArrayData`; `val_fraction` is a share of all 5,000 rows.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        augment: Augmentation | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, 0.2, augment, seed)

    def load(self) -> tuple[np.ndarray, ...]:
        return generate()[:2]

    def split(self, y: np.ndarray, groups: np.ndarray | None = None) -> dict[str, np.ndarray]:
        rows, tested = np.arange(len(y)), generate()[2]
        share = self.val_fraction * len(y) / (len(y) - tested)
        train, val = part(rows[:-tested], y, groups, share, derive_seed(self.seed) % 2**32)
        return {"train": train, "val": val, "test": rows[-tested:]}

    def baselines(self) -> dict[str, dict[str, float]]:
        """scikit-learn on the same rows: standardized columns, no augmentation; rows for validation are left out."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import log_loss
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        seed = derive_seed(self.seed, 2) % 2**32
        models = {
            "LogisticRegression": LogisticRegression(max_iter=5000),
            "KNeighborsClassifier": KNeighborsClassifier(),
            "SVC": SVC(C=10),
            "MLPClassifier": MLPClassifier((256, 256), alpha=0.1, max_iter=1000, random_state=seed),
        }
        x, y, x_test, y_test = (
            t.squeeze(1).numpy() if t.ndim > 1 else t.numpy() for s in ("train", "test") for t in self.splits[s]
        )
        results = {}
        for name, model in models.items():
            fitted = make_pipeline(StandardScaler(), model).fit(x, y)
            results[name] = {"accuracy": float(fitted.score(x_test, y_test))}
            if name in ("LogisticRegression", "MLPClassifier"):
                results[name]["loss"] = float(log_loss(y_test, fitted.predict_proba(x_test)))
        return results


class RandomSignal(Augmentation):
    """Move, widen, lift, tilt and disturb the signals of a batch, each by its own random amounts.

        straight line through the ends taken off  →  x(s), s in samples from the middle, read around the end
        x'(s) = height · x(width · s - shift) + line + tilt · s / length + noise
        shift ~ U(-shift, shift)   width = exp(U(-width, width))   height ~ U(1 - height, 1 + height)
        tilt ~ U(-tilt, tilt)      noise ~ N(0, noise²)

    Between samples x is linear. Without the line, what comes in at one end joins what was at the other.

    Args:
        shift: largest shift either way, in samples; ≥ 0.
        width: largest logarithm of the change of width; ≥ 0.
        height: largest change of height, as a share; in [0, 1).
        tilt: largest slope that is added, in units of the signal over its length; ≥ 0.
        noise: deviation of the noise, in units of the signal; ≥ 0.

    Shape: (N, channels, length) → the same, any floating dtype; channels change alike, but for the noise.
    """

    def __init__(
        self, shift: float = 0.0, width: float = 0.0, height: float = 0.0, tilt: float = 0.0, noise: float = 0.0
    ) -> None:
        for name, amount in (("shift", shift), ("width", width), ("tilt", tilt), ("noise", noise)):
            if amount < 0:
                raise ValueError(f"{name} must be at least 0, got {amount}")
        if not 0 <= height < 1:
            raise ValueError(f"height must be in [0, 1), got {height}")
        self.shift, self.width, self.height, self.tilt, self.noise = shift, width, height, tilt, noise

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.empty(4, len(x), 1, 1).uniform_(-1, 1, generator=generator).to(x)
        moved, line, ramp = move(x, self.shift * u[0], (self.width * u[1]).exp())
        noise = torch.randn(x.shape, generator=generator).to(x)
        return moved * (1 + self.height * u[2]) + line + self.tilt * u[3] * ramp + self.noise * noise


def move(x: Tensor, shift: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signals (N, channels, length) without their line, x(width · s - shift); the line; and s / length.

    `shift`, in samples, and `width` are (N or 1, 1, 1). `RandomSignal` has the formula.
    """
    length = x.shape[-1]
    place = torch.arange(length, dtype=x.dtype, device=x.device) - (length - 1) / 2
    ramp = place / (length - 1)
    line = (x[..., -3:].mean(-1, keepdim=True) - x[..., :3].mean(-1, keepdim=True)) * ramp
    position = place * width + (length - 1) / 2 - shift
    before = position.floor()
    share = position - before
    left = before.long().remainder(length).expand(x.shape)
    right = (left + 1).remainder(length)
    x = x - line
    return x.gather(-1, left) * (1 - share) + x.gather(-1, right) * share, line, ramp


class Views(torch.nn.Module):
    """A network that is asked, in evaluation mode, about each signal moved and widened, and averages what it says.

        training      forward(x) = network(x)
        evaluation    softmax(forward(x)) = mean over shifts a and widths b of softmax(network(x moved by a, b))

    A move is `RandomSignal`'s with a as shift and exp(b) as width. It gives the same before and after `MNIST1D`
    standardizes, because it is linear and keeps constants.

    Args:
        network: from signals (N, length) to logits (N, classes).
        shift: moves are -shift, ..., shift samples, all the whole numbers; ≥ 0.
        widths: logarithms of the changes of width; not empty.
    """

    moves: Tensor

    def __init__(self, network: torch.nn.Module, shift: int = 0, widths: Sequence[float] = (0.0,)) -> None:
        super().__init__()
        if shift < 0:
            raise ValueError(f"shift must be at least 0, got {shift}")
        if not widths:
            raise ValueError("widths must not be empty")
        self.network = network
        moves = [(a, b) for a in range(-shift, shift + 1) for b in widths]
        self.register_buffer("moves", torch.tensor(moves, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.network(x)
        said = []
        for shift, width in self.moves.to(x):
            moved, line, _ = move(x[:, None], shift.view(1, 1, 1), width.exp().view(1, 1, 1))
            said.append(self.network((moved + line)[:, 0]).log_softmax(1))
        return torch.stack(said).logsumexp(0) - math.log(len(said))


class SignalCNN(torch.nn.Sequential):
    """Three convolutions of torch's, then dense layers; batch norm, activation and dropout are bp_torch's.

    conv(kernel 5) – BN – f,  2 × [conv(kernel 3, stride 2) – BN – f],  dropout,  dense – f – dropout,  linear

    Args:
        length: samples of a signal.
        channels: of each convolution.
        hidden_features: of the dense layer.
        out_features: classes.
        activation: f, a key of the activation table.
        dropout: p of both dropouts.

    Shape: (N, length) → (N, out_features).
    """

    def __init__(
        self,
        length: int,
        channels: int,
        hidden_features: int,
        out_features: int,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        layers: list[torch.nn.Module] = [torch.nn.Unflatten(1, (1, length))]
        before = 1
        for kernel, stride in ((5, 1), (3, 2), (3, 2)):
            layers.append(torch.nn.Conv1d(before, channels, kernel, stride, kernel // 2, bias=False))
            layers.append(nn.BatchNormAct1d(channels, activation=activation))
            before, length = channels, -(-length // stride)
        layers += [torch.nn.Flatten(), nn.Dropout(dropout)]
        layers += [nn.Dense(channels * length, hidden_features, activation=activation, dropout=dropout)]
        super().__init__(*layers, nn.Linear(hidden_features, out_features))


class SignalClassifier(Classifier):
    """`Classifier`, whose report draws the signals that were read wrongly."""

    def report_sections(self, outcome: Outcome) -> list[Section]:
        sections = classification_sections(outcome)
        x, y = outcome.data.splits["test"]
        probability = outcome.outputs.softmax(1)
        mistakes = Mistakes(outcome.data.classes, y, probability.argmax(1), probability)
        for section in sections:
            if section.name == "misclassified":
                section.figure = signals(x[mistakes.rows, 0].numpy(), mistakes.captions())
        return sections


def signals(x: np.ndarray, captions: Sequence[str], shown: int = 24) -> Figure:
    """The signals (N, length) that were read wrongly, each under its caption; the first `shown` of them."""
    columns = 6
    lines = max(1, -(-min(len(x), shown) // columns))
    figure = Figure(figsize=(12, 1.7 * lines + 0.5), layout="constrained")
    figure.suptitle(f"Misclassified in the test split: {len(x)}" + (f" (the first {shown})" if len(x) > shown else ""))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place < min(len(x), shown):
            axes.plot(x[place], color="tab:blue", linewidth=1.2)
            axes.set_title(captions[place].replace("\n", " "), fontsize=8)
    return figure
