"""What the inputs of the tests are drawn from: seeds that are the same in each run, and that INPUTS_SEED=N shifts."""

from __future__ import annotations

import os

import torch

INPUTS_SEED = int(os.environ.get("INPUTS_SEED", "0"))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator on the CPU, for inputs."""
    return torch.Generator("cpu").manual_seed(seed + 1000 * INPUTS_SEED)
