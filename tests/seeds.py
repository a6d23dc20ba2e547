"""What the inputs of the tests are drawn from: seeds that are the same in each run, and that INPUTS_SEED=N shifts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

INPUTS_SEED = int(os.environ.get("INPUTS_SEED", "0"))
_draw = 0


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU, for inputs."""
    return torch.Generator("cpu").manual_seed(seed + 1000 * INPUTS_SEED + 100_000_007 * _draw)


@contextmanager
def other_inputs(draw: int) -> Iterator[None]:
    """Inside, what is drawn from ``seeded`` is another for each ``draw``; the usual one for 0."""
    global _draw
    before, _draw = _draw, draw
    try:
        yield
    finally:
        _draw = before
