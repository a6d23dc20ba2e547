"""Autotuning, for those who ask for it with ``BP_TORCH_AUTOTUNE=1``, and where its results are kept.

The first use of a shape class on a GPU times the blocks of that row of the table and keeps the fastest, in
``launch.json`` in the folder ``$BP_TORCH_CACHE`` (``~/.cache/bp_torch`` by default), by device name, Triton version,
family, class, dtype and kernel. Later runs read it from there. While a CUDA graph is captured nothing can be timed: the
table's block serves. In the interpreter there is nothing to time, and autotuning is off.

Another block may sum in another order: results of different machines, or of before and after tuning, may then differ
in their last bits. On one machine they stay the same for as long as the file does. In batch-invariant mode a row's
bits do not depend on its batch either way: no class of those families is told by the number of rows.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

__all__ = ["ENABLED", "INTERPRETED", "best"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors."""

ENABLED = os.environ.get("BP_TORCH_AUTOTUNE") == "1" and not INTERPRETED

Block = TypeVar("Block")
_chosen: dict[tuple[str, torch.device], Any] = {}


def cache_file() -> Path:
    folder = os.environ.get("BP_TORCH_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "bp_torch") / "launch.json"


def best(
    key: str, blocks: Sequence[Block], device: torch.device, launch: Callable[[Block], object]
) -> Block:  # fmt: skip
    """The block kept for this key, or the fastest one, which is then kept."""
    if (key, device) in _chosen:
        return _chosen[key, device]
    full_key = f"{device_name(device)} | triton {triton.__version__} | {key}"
    names = {describe(block): block for block in blocks}
    block = names.get(read(cache_file()).get(full_key, ""))
    if block is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return blocks[0]
        if len(blocks) == 1:
            block = blocks[0]
        else:
            block = min(blocks, key=lambda candidate: _time(lambda: launch(candidate)))
        keep(cache_file(), full_key, describe(block))
    _chosen[key, device] = block
    return block


def _time(run: Callable[[], object]) -> float:
    """In milliseconds; infinite for a block that this GPU has too little shared memory or too few registers for."""
    try:
        return milliseconds(run)
    except OutOfResources:
        return math.inf


def milliseconds(run: Callable[[], object]) -> float:
    """The median time of one run on the GPU, with a cold L2 cache."""
    time: float = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return time


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe(block: Any) -> str:
    """What is written to disk: a block that is no longer in the table is not found again, and is timed anew."""
    depth = f" x {block.depth}" if block.depth > 1 else ""
    return f"{block.rows} x {block.columns}{depth}, {block.warps} warps"


def read(path: Path) -> dict[str, str]:
    """What was kept. A file that cannot be read is ignored, with a warning."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or not all(isinstance(value, str) for value in kept.values()):
            raise ValueError("expected one object of strings")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"bp_torch: ignored the launch parameters in {path}: {error}", stacklevel=2)
        return {}
    return kept


def keep(path: Path, key: str, value: str) -> None:
    """Add one entry. Other processes see the old file or the new one, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {**read(path), key: value}
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1, sort_keys=True)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"bp_torch: could not keep launch parameters in {path}: {error}", stacklevel=2)
