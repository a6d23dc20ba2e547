"""Data larger than memory: rows from a memory-mapped file, some chunks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ConfigError
from .data import ArrayData, Batches


class MappedRows:
    """Chosen rows of an array in a `.npy` file, read when they are asked for.

    The file is mapped for each read and let go after it, so that what was read does not stay in the process.

    Args:
        path: of the file, which `numpy.save` wrote.
        rows: the rows that are offered, in order.
        chunk: how many rows are read at once where many are asked for in turn (`chunks`).

    `largest` is the greatest number of rows that one read has asked for.
    """

    def __init__(self, path: Path, rows: np.ndarray, chunk: int) -> None:
        self.path, self.rows, self.chunk = path, rows, chunk
        self.shape = (len(rows), *np.load(path, mmap_mode="r").shape[1:])
        self.ndim, self.largest = len(self.shape), 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Tensor:
        """Rows as float32, by a slice, or by numbers in any order."""
        rows = self.rows[index.numpy() if isinstance(index, Tensor) else index]
        self.largest = max(self.largest, rows.size)
        order = np.argsort(rows, kind="stable")  # the file is read from its front to its back
        read = np.empty((rows.size, *self.shape[1:]), np.float32)
        read[order] = np.load(self.path, mmap_mode="r")[rows[order]]
        return torch.from_numpy(read)

    def chunks(self) -> Iterator[Tensor]:
        """All rows in order, `chunk` at a time."""
        for start in range(0, len(self), self.chunk):
            yield self[start : start + self.chunk]


class StreamedBatches(Batches):
    """Mini-batches of `MappedRows` and of tensors beside them.

    Without a seed: every row once, in order. With one: the chunks in random order, and rows shuffled among `buffer`
    chunks at a time, which are all that is in memory. Order and random amounts are a function of (seed, epoch) alone.
    """

    def __init__(self, x: MappedRows, *tensors: Tensor, buffer: int, **kwargs: Any) -> None:
        super().__init__([x, *tensors], **kwargs)  # type: ignore[list-item]
        self.buffer = buffer

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        x, *tensors = self.tensors
        generator, amounts = self.generators()
        chunks = list(torch.arange(self.rows).split(x.chunk))
        if self.seed is not None:
            chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()]
        positions = self.positions()
        wanted = torch.zeros(self.rows, dtype=torch.bool)
        wanted[torch.cat(positions)] = True
        sizes = iter([len(batch) for batch in positions])
        size, passed = next(sizes, 0), 0
        held: tuple[Tensor, ...] = ()
        for start in range(0, len(chunks), self.buffer):
            rows = torch.cat(chunks[start : start + self.buffer])
            if self.seed is not None:
                rows = rows[torch.randperm(len(rows), generator=generator)]
            rows, passed = rows[wanted[passed : passed + len(rows)]], passed + len(rows)
            read = tuple(t[rows] for t in (x, *tensors))
            held = tuple(torch.cat(pair) for pair in zip(held, read, strict=True)) if held else read
            while 0 < size <= len(held[0]):
                batch = tuple(t[:size] for t in held)
                held = tuple(t[size:] for t in held)
                size = next(sizes, 0)
                yield batch if self.transform is None else self.transform(batch, amounts)


class Streamed(ArrayData):
    """A classification data set in two files, `x.npy` (N, feature or channel, ...) and `y.npy` (N,), read in chunks.

    It splits, standardizes and augments as `ArrayData` does; the mean and the deviation are summed over the training
    rows chunk by chunk. In memory are the classes of all rows, and at most `buffer · chunk` rows and a batch. There are
    no baselines, because scikit-learn's models want all rows at once.

    Args:
        folder: where the two files are. Large ones can be written in pieces, through `numpy.lib.format.open_memmap`.
        source: written to the folder if it has no such files; None is for files of your own.
        chunk: rows that are read at once.
        buffer: chunks among which rows are shuffled.
        names: of the classes; None takes those of `source`, or the numbers 0, 1, ...
        The others: as in `ArrayData`.
    """

    def __init__(
        self,
        folder: str,
        source: ArrayData | None = None,
        chunk: int = 1024,
        buffer: int = 8,
        names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, number in (("chunk", chunk), ("buffer", buffer)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.folder, self.source, self.chunk, self.buffer, self.names = Path(folder), source, chunk, buffer, names

    def setup(self, stage: str) -> None:
        if self.splits:
            return
        if self.source is not None and not (self.folder / "y.npy").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            x, y = self.source.load()[:2]
            np.save(self.folder / "x.npy", x)
            np.save(self.folder / "y.npy", y)  # last: where it is, the other one is whole
        for name in ("x.npy", "y.npy"):
            if not (self.folder / name).is_file():
                raise ConfigError(f"data.init_args.folder: {self.folder} has no {name}")
        y = np.load(self.folder / "y.npy")
        self.classes = tuple(self.names or (self.source.classes if self.source else map(str, range(y.max() + 1))))
        for name, index in self.split(y).items():
            index = np.sort(index)
            x_rows: Any = MappedRows(self.folder / "x.npy", index, self.chunk)
            self.splits[name] = x_rows, torch.tensor(y[index], dtype=torch.int64)
        self.measure(self.splits["train"][0])

    def measure(self, x: Any) -> None:
        """Mean and deviation of each feature over the training rows, in float64, by Chan's sum over chunks."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for chunk in x.chunks():
            over = [d for d in range(chunk.ndim) if d != 1]
            wide = chunk.double()
            n, m = wide.numel() // wide.shape[1], wide.mean(over, keepdim=True)
            s = (wide - m).square().sum(over, keepdim=True)
            squares = squares + s + (m - mean).square() * (count * n / (count + n))
            mean = mean + (m - mean) * (n / (count + n))
            count += n
        deviation = (squares / count).sqrt()
        self.mean, self.deviation = mean.float(), torch.where(deviation > 0, deviation, 1.0).float()

    def in_order(self, split: str) -> Batches:
        size = min(max(self.batch_size, 256), self.chunk)
        return self.batches(split, batch_size=size, transform=lambda batch, generator: self.prepare(*batch))

    def train_dataloader(self) -> Batches:
        return self.batches("train", batch_size=self.batch_size, seed=self.seed, transform=self.training_batch)

    def batches(self, split: str, **kwargs: Any) -> Batches:
        x, y = self.splits[split]
        return StreamedBatches(x, y, buffer=self.buffer if "seed" in kwargs else 1, **kwargs)  # type: ignore[arg-type]

    def baselines(self) -> dict[str, dict[str, float]]:
        return {}
