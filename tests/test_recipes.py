"""The recipes' parts, and the digits recipe itself held to the accuracy that its header states."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from lightning.pytorch import Trainer

from bp_torch import cli, nn
from bp_torch.recipes import ConfigError
from bp_torch.recipes.augment import RandomAffine
from bp_torch.recipes.callbacks import Checkpoints, EpochSeeds, GradientNorms, History, replace_file, stop_reason
from bp_torch.recipes.data import Batches, Digits
from bp_torch.recipes.modules import Classifier, parameter_groups
from bp_torch.recipes.runs import find_checkpoint, new_run, run_of, versions

ONE_BACKEND = "data, augmentation, callbacks and reports; test_convergence.py trains on both"


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits(seed=3)
    data.setup("fit")
    return data


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def test_split_is_whole_disjoint_stratified_and_seeded(digits: Digits) -> None:
    sizes = {name: len(y) for name, (_, y) in digits.splits.items()}
    assert sizes == {"train": 1167, "val": 270, "test": 360}
    x = {name: rows(x) for name, (x, _) in digits.splits.items()}
    assert not x["train"] & x["val"]
    assert not x["train"] & x["test"]
    assert not x["val"] & x["test"]
    everything, _ = digits.load()
    assert x["train"] | x["val"] | x["test"] == rows(torch.tensor(everything, dtype=torch.float32))
    for _, y in digits.splits.values():
        share = torch.bincount(y, minlength=10) / len(y)
        assert share.sub(0.1).abs().max() < 0.01
    same, other = Digits(seed=3), Digits(seed=4)
    same.setup("fit")
    other.setup("test")
    assert torch.equal(same.splits["test"][0], digits.splits["test"][0])
    assert not torch.equal(other.splits["test"][0], digits.splits["test"][0])


def test_seed_is_that_of_torch_unless_given() -> None:
    torch.manual_seed(11)
    assert Digits().seed == 11
    assert Digits(seed=5).seed == 5


def test_standardization_is_by_the_training_split_alone(digits: Digits) -> None:
    train = digits.standardize(digits.splits["train"][0])
    assert train.mean().abs() < 1e-6
    assert train.std(correction=0) == pytest.approx(1, abs=1e-6)
    other = Digits(seed=3)
    other.setup("fit")
    other.splits = {}
    x, y = other.load()
    test_pixels = rows(digits.splits["test"][0])
    spoiled = [
        row if torch.tensor(row, dtype=torch.float32).numpy().tobytes() not in test_pixels else row + 9 for row in x
    ]
    other.load = lambda: (np.stack(spoiled), y)  # type: ignore[method-assign]
    other.setup("fit")
    assert torch.equal(other.mean, digits.mean)
    assert torch.equal(other.deviation, digits.deviation)


def test_a_constant_feature_stays_finite() -> None:
    class Constant(Digits):
        def load(self) -> tuple[np.ndarray, np.ndarray]:
            return np.stack([np.arange(100.0), np.full(100, 7.0)], 1), np.arange(100) % 2

    data = Constant(seed=0)
    data.setup("fit")
    x = data.standardize(data.splits["train"][0])
    assert x[:, 1].eq(0).all()
    assert x[:, 0].std(correction=0) == pytest.approx(1, abs=1e-5)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)

    def noise(batch: tuple[torch.Tensor, ...], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x, y = batch
        return x + torch.rand(x.shape, generator=generator), y

    def epoch(seed: int, number: int) -> list[torch.Tensor]:
        batches = Batches([x, y], 4, seed, noise)
        batches.set_epoch(number)
        torch.rand(number + 1)  # what the global generator does must not matter
        seen = list(batches)
        assert len(seen) == len(batches) == 3
        assert torch.cat([y for _, y in seen]).sort().values.equal(y)
        return [tensor for batch in seen for tensor in batch]

    first = epoch(0, 0)
    assert all(map(torch.equal, first, epoch(0, 0)))
    assert not all(map(torch.equal, first, epoch(0, 1)))
    assert not all(map(torch.equal, first, epoch(1, 0)))


def test_no_training_batch_has_a_single_row() -> None:
    x = torch.arange(9.0)[:, None]
    assert [len(x) for x, _ in Batches([x, x], 4, seed=0)] == [4, 4]
    in_order = Batches([x, x], 4)
    assert [len(x) for x, _ in in_order] == [4, 4, 1]
    assert torch.cat([x for x, _ in in_order]).equal(x)


def test_only_training_batches_are_augmented() -> None:
    data = Digits(seed=0, augment=RandomAffine(degrees=90))
    data.setup("fit")
    for batches, split in ((data.val_dataloader(), "val"), (data.test_dataloader(), "test")):
        assert torch.cat([x for x, _ in batches]).equal(data.standardize(data.splits[split][0]))
    train = torch.cat([x for x, _ in data.train_dataloader()])
    assert not rows(train) & rows(data.standardize(data.splits["train"][0]))


def test_affine_rotates_shifts_and_scales() -> None:
    x = torch.zeros(400, 1, 15, 15)
    x[:, :, 7, 10:13] = 1  # a bar to the right of the middle
    centre = torch.arange(15.0) - 7

    def position(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mass = x.sum((1, 2, 3))
        return (x.sum((1, 2)) * centre).sum(1) / mass, (x.sum((1, 3)) * centre).sum(1) / mass

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    assert RandomAffine()(x, draw()).allclose(x, atol=1e-6)
    across, down = position(RandomAffine(degrees=30)(x, draw()))
    assert torch.hypot(across, down).sub(4).abs().max() < 0.15
    turned = torch.atan2(down, across).rad2deg()
    assert -30.5 < turned.min() < -28
    assert 28 < turned.max() < 30.5
    across, down = position(RandomAffine(shift=0.1)(x, draw()))
    assert 1.4 < (across - 4).abs().max() <= 1.51
    assert 1.4 < down.abs().max() <= 1.51
    across, down = position(RandomAffine(scale=0.2)(x, draw()))
    assert 3.15 < across.min() < 3.3
    assert 4.7 < across.max() < 4.85
    assert down.abs().max() < 1e-5
    some = RandomAffine(degrees=30, probability=0.25)(x, draw())
    assert 0.17 < 1 - (some == x).flatten(1).all(1).double().mean() < 0.33
    assert RandomAffine(degrees=30)(x, draw()).equal(RandomAffine(degrees=30)(x, draw()))


@pytest.mark.parametrize(("name", "value"), [("degrees", -1), ("shift", 1.0), ("scale", -0.1), ("probability", 1.5)])
def test_affine_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        RandomAffine(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("batch_size", 1), ("val_fraction", 0.0), ("test_fraction", 0.9)])
def test_data_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Digits(**{name: value})  # type: ignore[arg-type]


def test_another_split_is_refused(digits: Digits) -> None:
    with pytest.raises(ConfigError, match="add --seed_everything 3"):
        Digits(seed=0).load_state_dict(digits.state_dict())


def test_weight_decay_leaves_biases_and_norms_alone() -> None:
    model = nn.MLP(4, [8], 3, norm="batch")
    decayed, exempt = parameter_groups(model)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in exempt["params"]} == {1}
    assert exempt["weight_decay"] == 0
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))


def test_a_trainer_without_the_command(digits: Digits, tmp_path: Path) -> None:
    """The callbacks in somebody's own Trainer; gradient norms against torch's own, on a network of one layer."""
    norms: list[float] = []

    class Watched(Classifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in self.parameters() if p.grad is not None)))

    torch.manual_seed(0)
    model = Watched(nn.Linear(64, 10))
    history, checkpoints = History(), Checkpoints(monitor="val_accuracy", mode="max")
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[EpochSeeds(), GradientNorms(), history, checkpoints],
        default_root_dir=str(tmp_path),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=2,
    )
    trainer.fit(model, digits)
    assert stop_reason(trainer) == "max_epochs = 2 reached"
    assert [row["epoch"] for row in history.rows] == [1, 2]
    steps = len(norms) // 2
    assert history.rows[1]["grad_norm/network"] == pytest.approx(sum(norms[steps:]) / steps, rel=1e-5)
    assert history.rows[1]["lr"] == pytest.approx(0.001)
    with (tmp_path / "metrics.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in written] == [row["val_loss"] for row in history.rows]
    best = torch.load(checkpoints.best_model_path, weights_only=True)
    assert best["callbacks"]["Checkpoints"]["best_score"] == max(row["val_accuracy"] for row in history.rows)


def test_replaced_files_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert path.read_text() == "old"
    replace_file(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"


def test_folders_of_runs(tmp_path: Path) -> None:
    assert [new_run(tmp_path).name for _ in range(11)] == [f"version_{i}" for i in range(11)]
    (tmp_path / "version_x").mkdir()
    assert versions(tmp_path)[-1].name == "version_10"
    last = find_checkpoint(tmp_path, "last")
    assert last == tmp_path / "version_10" / "checkpoints" / "last.ckpt"
    assert run_of(last) == tmp_path / "version_10"
    assert run_of(tmp_path / "elsewhere" / "last.ckpt") is None


def test_baselines_are_as_good_as_known(digits: Digits) -> None:
    scores = digits.baselines()
    assert 0.95 < scores["LogisticRegression"]["accuracy"] < 0.99
    assert 0.96 < scores["MLPClassifier"]["accuracy"] < 0.995
    assert all(0 < score["loss"] < 0.5 for score in scores.values())


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_digits_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped configuration as it stands, one of the five seeds of its header."""
    assert cli.main(["fit", "--config", "digits", "--trainer.enable_progress_bar", "false"]) == 0
    run = tmp_path / "runs" / "digits" / "version_0"
    report = (run / "report.md").read_text()
    lines = [line.split("|")[1:-1] for line in report.splitlines() if line.count("|") == 4]
    accuracy = {name.strip(): float(value.strip(" %")) for name, value, _ in lines if value.strip().endswith("%")}
    ours = accuracy.pop("this run")
    assert ours >= 99.0
    assert set(accuracy) == {"LogisticRegression", "MLPClassifier"}
    assert ours > max(accuracy.values())
    assert "Results" in capsys.readouterr().out
    for name in ("curves", "learning_rate", "gradient_norms", "confusion", "misclassified"):
        assert f"(figures/{name}.png)" in report
        assert (run / "figures" / f"{name}.png").stat().st_size > 5000
    assert "| why it stopped |" in report
