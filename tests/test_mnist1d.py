"""MNIST-1D: its data, augmentation and views, a short training, and in full what the headers say."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from commands import fit, repeat

from bp_torch import nn
from bp_torch.recipes.applications import mnist1d
from bp_torch.recipes.applications.mnist1d import MNIST1D, RandomSignal, SignalCNN, Views
from bp_torch.recipes.repeat import OURS

ONE_BACKEND = "recipes' data and tasks; their layers are tested on both elsewhere"

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def signals() -> MNIST1D:
    data = MNIST1D(seed=0)
    data.setup("fit")
    return data


def test_mnist1d_is_the_papers_and_leaves_the_random_numbers_alone(signals: MNIST1D) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    mnist1d.generate.cache_clear()
    x, y, tested = mnist1d.generate()
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert (x.shape, y.shape, tested) == ((5000, 1, 40), (5000,), 1000)
    assert (np.bincount(y) == 500).all()
    assert x.mean() == pytest.approx(0, abs=1e-12)
    assert x.std() == pytest.approx(1)
    other = MNIST1D(seed=1)
    other.setup("fit")
    for data in (signals, other):
        assert torch.equal(data.splits["test"][0], torch.tensor(x[-1000:], dtype=torch.float32))
        assert {name: len(y) for name, (_, y) in data.splits.items()} == {"train": 3500, "val": 500, "test": 1000}
        seen = torch.cat([data.splits["train"][0], data.splits["val"][0]])
        assert len(seen.flatten(1).unique(dim=0)) == 4000
    assert not torch.equal(signals.splits["val"][0], other.splits["val"][0])


def test_random_signal_changes_nothing_unless_told() -> None:
    x = torch.randn(5, 2, 40)
    assert RandomSignal()(x, torch.Generator()).allclose(x, atol=1e-5)


def test_random_signal_moves_widens_lifts_and_tilts() -> None:
    place = torch.arange(41.0) - 20
    bump = torch.exp(-(place**2) / 18).expand(500, 1, 41)  # of deviation 3, in the middle

    def draw(**amounts: float) -> torch.Tensor:
        return RandomSignal(**amounts)(bump, torch.Generator().manual_seed(0))[:, 0]

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mass = x.sum(1)
        mean = (x * place).sum(1) / mass
        return mass, mean, ((x * place**2).sum(1) / mass - mean**2).sqrt()

    mass, mean, deviation = moments(draw(shift=6))
    assert mass.allclose(mass[0], rtol=1e-3)
    assert 5.8 < mean.max() < 6.01
    assert -6.01 < mean.min() < -5.8
    assert (deviation - 3).abs().max() < 0.1
    _, mean, deviation = moments(draw(width=0.3))
    assert mean.abs().max() < 1e-3
    assert 3 * 1.3 < deviation.max() < 3 * 1.37  # exp(0.3) = 1.35; interpolation adds a little
    assert 3 * 0.74 < deviation.min() < 3 * 0.78
    height = draw(height=0.2).amax(1)
    assert 0.8 <= height.min() < 0.81
    assert 1.19 < height.max() <= 1.2
    slope = (draw(tilt=0.5) - bump[:, 0]) @ (place / 40) / (place / 40).square().sum()
    assert 0.48 < slope.max() <= 0.5
    assert -0.5 <= slope.min() < -0.48
    assert (draw(noise=0.1) - bump[:, 0]).std() == pytest.approx(0.1, rel=0.02)


def test_random_signal_keeps_the_line_and_shifts_around_it() -> None:
    line = torch.linspace(-1, 1, 40).expand(3, 1, 40) * torch.tensor([1.0, 0.0, -2.0]).reshape(3, 1, 1)
    moved = RandomSignal(shift=9)(line, torch.Generator().manual_seed(0))
    assert (moved - line).abs().max() < 0.12 * line.abs().max()  # the mean of three samples is not quite the end


@pytest.mark.parametrize(
    ("name", "value"), [("shift", -1), ("width", -0.1), ("height", 1.0), ("tilt", -1), ("noise", -1)]
)
def test_random_signal_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        RandomSignal(**{name: value})


def test_signal_cnn_on_any_length() -> None:
    for length in (40, 41, 7):
        network = SignalCNN(length, 3, 5, 4, dropout=0.5)
        assert network(torch.randn(6, length)).shape == (6, 4)
        kinds = {type(m) for m in network}
        assert {nn.BatchNormAct1d, nn.Dense, nn.Dropout, nn.Linear, torch.nn.Conv1d} <= kinds


def test_views_are_averaged_in_evaluation_alone(signals: MNIST1D) -> None:
    network = torch.nn.Linear(40, 10).double()
    views = Views(network, shift=2, widths=[0.0, 0.1])
    x = signals.standardize(signals.splits["val"][0].double())[:, 0]
    assert torch.equal(views.train()(x), network(x))
    said = views.eval()(x).exp()
    torch.testing.assert_close(said.sum(1), torch.ones(len(x), dtype=x.dtype))
    expected = torch.zeros_like(said)
    for shift in range(-2, 3):
        for width in (0.0, 0.1):
            moved, line, _ = mnist1d.move(x[:, None], torch.tensor(shift), torch.tensor(width, dtype=x.dtype).exp())
            expected += network((moved + line)[:, 0]).softmax(1) / 10
    torch.testing.assert_close(said, expected, atol=1e-6, rtol=1e-6)  # widths are kept in float32
    torch.testing.assert_close(Views(network).eval()(x).exp(), network(x).softmax(1))
    assert Views(network, 1).state_dict().keys() == {"network.weight", "network.bias"}


def test_moving_and_standardizing_may_change_places(signals: MNIST1D) -> None:
    x = signals.splits["val"][0].double()
    shift, width = torch.tensor(3), torch.tensor(1.1, dtype=x.dtype)

    def moved(x: torch.Tensor) -> torch.Tensor:
        ends, line, _ = mnist1d.move(x, shift, width)
        return ends + line

    torch.testing.assert_close(moved(signals.standardize(x)), signals.standardize(moved(x)))


@pytest.mark.parametrize(("settings", "name"), [({"shift": -1}, "shift"), ({"widths": []}, "widths")])
def test_views_refuse_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Views(torch.nn.Linear(40, 10), **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("mnist1d", "6"), ("mnist1d_cnn", "3")])
def test_mnist1d_learns(name: str, epochs: str, signals: MNIST1D) -> None:
    """A few epochs beat logistic regression on the same rows; the report draws what was read wrongly."""
    from sklearn.linear_model import LogisticRegression

    outcome = fit(name, "--trainer.max_epochs", epochs, "--baselines", "false")
    x, y = outcome.data.splits["train"]
    x_test, y_test = signals.splits["test"]
    linear = LogisticRegression(max_iter=2000).fit(x.flatten(1), y).score(x_test.flatten(1), y_test)
    assert 0.25 < linear < 0.35
    assert outcome.test["accuracy"] > linear + 0.05
    assert (outcome.run / "figures" / "misclassified.png").stat().st_size > 20_000


@pytest.mark.recipes
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "accuracy"), [("mnist1d", 0.9372), ("mnist1d_cnn", 0.984)])
def test_mnist1d_in_full(name: str, accuracy: float) -> None:
    results = repeat(name, "--seeds", "0,1,2,3,4")
    ours = results.pop(OURS)["accuracy"]
    assert ours["mean"] == pytest.approx(accuracy, abs=0.005)
    assert min(ours["values"]) >= accuracy - 0.01
    assert all(scores["accuracy"]["better"] == 5 for scores in results.values())
