"""How the rows of a batch are shared out among processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from bp_torch.recipes import ConfigError, data
from bp_torch.recipes.data import Batches
from bp_torch.recipes.streaming import MappedRows, StreamedBatches

ONE_BACKEND = "data, on no backend"


def of_each(processes: int, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The rows of each batch, by rank."""
    found = []
    for rank in range(processes):
        monkeypatch.setattr(data, "process", lambda rank=rank: (rank, processes))
        found.append([rows for rows, *_ in batches])
        assert len(batches) == len(found[-1])
        if batches.seed is not None:
            together = [len(rows) for rows in batches.together()]
            weights = [batches.weight(k) for k in range(len(batches))]
            assert weights == [len(rows) * processes / n for rows, n in zip(found[-1], together, strict=True)]
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("rows", [96, 95, 97, 100, 33])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_together_they_are_the_batches_of_one(rows: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(rows)
    for epoch in (0, 3):
        one, several = Batches([x], 4 * processes, seed=5), Batches([x], 4, seed=5)
        one.set_epoch(epoch)
        several.set_epoch(epoch)
        expected = [batch for (batch,) in one]
        found = of_each(processes, several, monkeypatch)
        assert len({len(batches) for batches in found}) == 1
        assert all(len(batch) >= 2 for batches in found for batch in batches)
        joined = [torch.cat(shares) for shares in zip(*found, strict=True)]
        assert all(map(torch.equal, joined, expected))
        left = expected[len(joined) :]  # fewer than two rows for each
        assert sum(map(len, left)) < 2 * processes


@pytest.mark.parametrize("rows", [96, 97, 270, 7])
@pytest.mark.parametrize("processes", [2, 4])
def test_in_order_each_row_is_once_with_one_process(rows: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches for each, because DistributedDataParallel's evaluation waits at each."""
    found = of_each(processes, Batches([torch.arange(rows)], 16), monkeypatch)
    assert len({len(batches) for batches in found}) == 1
    assert torch.cat([torch.cat(batches) for batches in found]).sort().values.equal(torch.arange(rows))
    assert max(len(batch) for batches in found for batch in batches) <= 16


def test_random_amounts_differ_by_rank_and_not_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(batch: tuple[torch.Tensor, ...], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        return (torch.rand(len(batch[0]), generator=generator),)

    batches = Batches([torch.arange(64)], 8, 0, noise)
    first, again = (of_each(2, batches, monkeypatch) for _ in range(2))
    assert all(map(torch.equal, first[0], again[0]))
    assert not any(map(torch.equal, *first))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_streamed(processes: int, seed: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process reads its own rows alone; together they are one process's batches, or every row once."""
    np.save(tmp_path / "x.npy", np.arange(103, dtype=np.float32)[:, None])
    y = torch.arange(103)

    def batches(size: int) -> tuple[MappedRows, StreamedBatches]:
        x = MappedRows(tmp_path / "x.npy", np.arange(103), chunk=16)
        return x, StreamedBatches(x, y, buffer=2, batch_size=size, seed=seed)

    _, one = batches(8 * processes)
    x, several = batches(8)
    expected = [rows for rows, _ in one]
    found = of_each(processes, several, monkeypatch)
    assert x.largest <= 32 // processes + 16
    if seed is None:
        assert torch.cat([torch.cat(b) for b in found]).flatten().sort().values.equal(torch.arange(103.0))
    else:
        joined = [torch.cat(shares) for shares in zip(*found, strict=True)]
        assert all(map(torch.equal, joined, expected))


def test_too_few_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "process", lambda: (0, 4))
    with pytest.raises(ConfigError, match="7 training rows make no batch for 4"):
        len(Batches([torch.arange(7)], 4, seed=0))
    with pytest.raises(ConfigError, match="4 processes cannot share 3 rows"):
        len(Batches([torch.arange(3)], 4))


def test_the_rows_of_one_process_are_its_own() -> None:
    assert data.process() == (0, 1)
    assert data.gathered(torch.arange(3)).equal(torch.arange(3))
