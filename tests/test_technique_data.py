"""What the techniques of data do: folds, groups that stay whole, augmented signals, data that is streamed."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from test_technique_effects import Toy

from bp_torch.recipes import ConfigError
from bp_torch.recipes.augment import RandomSignal
from bp_torch.recipes.streaming import MappedRows, Streamed

ONE_BACKEND = "recipes; test_convergence.py trains on both"
pytestmark = pytest.mark.usefixtures("own_folder")


class Groups(Toy):
    grouped = True


def test_folds_test_each_row_once() -> None:
    tests, kept = [], []
    for fold in range(4):
        data = Toy(folds=4, fold=fold, seed=1)
        split = data.split(data.load()[1])
        tests.append(split["test"])
        assert sorted(np.concatenate(list(split.values()))) == list(range(400))
        assert [len(split[name]) for name in ("train", "val", "test")] == [240, 60, 100]
        assert data.load()[1][split["test"]].mean() == pytest.approx(0.1, abs=0.01)
        kept.append(data)
    assert sorted(np.concatenate(tests)) == list(range(400))
    kept[0].setup("fit")
    kept[0].load_state_dict(kept[0].state_dict())
    kept[1].setup("fit")
    with pytest.raises(ConfigError, match=r"data.init_args.fold: the checkpoint was trained with 1, this run has 0"):
        kept[0].load_state_dict(kept[1].state_dict())


@pytest.mark.parametrize("folds", [0, 4])
def test_groups_stay_whole(folds: int) -> None:
    tests = []
    for fold in range(max(folds, 1)):
        data = Groups(folds=folds, fold=fold, seed=2)
        _, y, groups = data.load()
        split = data.split(y, groups)
        assert sorted(np.concatenate(list(split.values()))) == list(range(400))
        named = [set(groups[rows]) for rows in split.values()]
        assert sum(map(len, named)) == len(set().union(*named)) == 80
        assert all(0 < y[rows].mean() < 0.2 for rows in split.values())
        tests.append(split["test"])
        data.setup("fit")
        assert len(data.splits["test"][0]) == len(split["test"])
    if folds:
        assert sorted(np.concatenate(tests)) == list(range(400))


def test_signals_are_shifted_scaled_and_get_noise() -> None:
    x = torch.zeros(500, 2, 20)
    x[..., 9] = 1.0

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    assert RandomSignal()(x, draw()).equal(x)
    moved = RandomSignal(shift=0.25)(x, draw())
    place = moved.argmax(-1)
    assert set(place.flatten().tolist()) == set(range(4, 15))
    assert place[:, 0].equal(place[:, 1])
    assert moved.sum(-1).eq(1).all()
    edge = torch.zeros(500, 20)
    edge[:, 0] = 1.0
    assert 0.3 < RandomSignal(shift=0.25)(edge, draw()).sum(-1).eq(0).float().mean() < 0.6
    assert RandomSignal(shift=0.25, wrap=True)(edge, draw()).sum(-1).eq(1).all()
    size = RandomSignal(scale=0.2)(x, draw())[..., 9]
    assert 0.8 <= size.min() < 0.82
    assert 1.18 < size.max() <= 1.2
    assert size[:, 0].equal(size[:, 1])
    noise = RandomSignal(noise=0.1)(x, draw()) - x
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    some = RandomSignal(noise=0.1, probability=0.25)(x, draw())
    assert 0.18 < 1 - (some == x).flatten(1).all(1).double().mean() < 0.32
    for name, value in (("shift", 1.0), ("scale", -0.1), ("noise", -1.0), ("probability", 2.0)):
        with pytest.raises(ValueError, match=name):
            RandomSignal(**{name: value})  # type: ignore[arg-type]


def test_streamed_data_is_the_data_in_memory(tmp_path: Path) -> None:
    whole, streamed = Toy(seed=3), Streamed(str(tmp_path / "rows"), Toy(), chunk=32, buffer=3, seed=3)
    for data in (whole, streamed):
        data.setup("fit")
    torch.testing.assert_close(streamed.mean, whole.mean)
    torch.testing.assert_close(streamed.deviation, whole.deviation)
    assert streamed.classes == Toy.classes

    def in_order(x: torch.Tensor) -> torch.Tensor:
        return x[x[:, 0].argsort()]

    for name, loader in (("val", streamed.val_dataloader()), ("test", streamed.test_dataloader())):
        x, y = (torch.cat(part) for part in zip(*loader, strict=True))
        torch.testing.assert_close(in_order(x), in_order(whole.prepare(*whole.splits[name])[0]))
        assert y.equal(streamed.splits[name][1])

    def epoch(number: int) -> list[torch.Tensor]:
        loader = streamed.train_dataloader()
        loader.set_epoch(number)
        batches = [x for x, _ in loader]
        assert len(batches) == len(loader) == math.ceil(260 / 64)
        return batches

    first = epoch(0)
    torch.testing.assert_close(in_order(torch.cat(first)), in_order(whole.standardize(whole.splits["train"][0])))
    assert all(map(torch.equal, first, epoch(0)))
    assert not all(map(torch.equal, first, epoch(1)))
    for rows in streamed.splits.values():
        assert rows[0].largest <= 32 * 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"has no x\.npy"):
        Streamed(str(tmp_path / "nothing")).setup("fit")


def test_streaming_needs_little_memory(tmp_path: Path) -> None:
    """All of a file of 64 MB goes by, and the process grows by less than a quarter of that."""
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from bp_torch.recipes.streaming import MappedRows, StreamedBatches
import torch

path = Path(sys.argv[1])
np.lib.format.open_memmap(path, "w+", np.float32, (16384, 1024)).flush()  # zeros, which take no space on the disk
rows = MappedRows(path, np.arange(16384), 512)
batches = StreamedBatches(rows, torch.zeros(16384), buffer=2, batch_size=64, seed=0)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seen = sum(len(x) for x, _ in batches)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
print(seen, grown)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.npy")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    seen, grown = ended.stdout.split()
    assert int(seen) == 16384
    assert float(grown) < 16


def test_mapped_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    np.save(tmp_path / "x.npy", x)
    rows = MappedRows(tmp_path / "x.npy", np.arange(10, 50), 16)
    asked = torch.tensor([7, 0, 7, 39])
    assert rows[asked].equal(torch.tensor(x[[17, 10, 17, 49]], dtype=torch.float32))
    assert rows[2:4].equal(torch.tensor(x[12:14], dtype=torch.float32))
    assert (len(rows), rows.shape, rows.ndim, rows.largest) == (40, (40, 3), 2, 4)
    assert [len(chunk) for chunk in rows.chunks()] == [16, 16, 8]
