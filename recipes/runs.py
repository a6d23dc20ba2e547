"""Folders of runs: `<root>/version_0`, `version_1`, ... A new run never writes into an older one's folder.

A run's folder holds `config.yaml`, `metrics.csv`, `checkpoints/best.ckpt` and `last.ckpt`, `tensorboard/`, and at the
end `report.md` with its figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import ConfigError


def versions(root: Path) -> list[Path]:
    """The folders of the runs under `root`, oldest first."""
    numbered = [(path.name.removeprefix("version_"), path) for path in root.glob("version_*") if path.is_dir()]
    return [path for _, path in sorted((int(number), path) for number, path in numbered if number.isdigit())]


def new_run(root: Path) -> Path:
    """Make the next folder. Two processes that start together get two folders."""
    while True:
        runs = versions(root)
        path = root / f"version_{int(runs[-1].name.removeprefix('version_')) + 1 if runs else 0}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def find_checkpoint(root: Path, name: str) -> Path:
    """The checkpoint that `--ckpt_path NAME` means: `last` or `best` of the newest run, or a path.

    The path of `last` is returned even if the newest run was killed before it wrote one: its folder is where to go on.
    """
    if name not in ("last", "best"):
        if not Path(name).is_file():
            raise ConfigError(f"ckpt_path: there is no file {name!r}")
        return Path(name)
    runs = versions(root)
    if not runs:
        raise ConfigError(f"ckpt_path: {name!r} means the newest run under {str(root)!r}, and there is none")
    return runs[-1] / "checkpoints" / f"{name}.ckpt"


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, or None for a checkpoint that was moved elsewhere."""
    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == "checkpoints" and run.name.startswith("version_") else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise ConfigError(f"ckpt_path: the run {path.parent.parent} has no {path.name}; give another's path") from error
    except Exception as error:  # torch raises half a dozen types for files that are not checkpoints
        raise ConfigError(f"ckpt_path: {path} cannot be read as a checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"ckpt_path: {path} is not a checkpoint of a run")
    return checkpoint


def check_fits(checkpoint: dict[str, Any], model: torch.nn.Module, path: str) -> None:
    """Refuse a checkpoint of another network, by name of the first parameter that differs."""
    there = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            have, want = there.get(name, "missing"), here.get(name, "missing")
            raise ConfigError(f"ckpt_path: {path} is of another network: {name} is {have}, the model's is {want}")
