"""A run on several processes: one folder, and one process that tests and tells what they trained together."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer

import bp_torch


def _in_a_spawned_process() -> OneFolder:
    quiet()  # nothing has been set there yet
    return OneFolder()


class OneFolder(Callback):
    """Several processes have one folder, which rank 0 made."""

    def __reduce__(self) -> Any:
        return _in_a_spawned_process, ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]


@contextlib.contextmanager
def for_other_processes(arguments: list[str]) -> Iterator[None]:
    """Let the processes that Lightning starts run this command; what it tells them in the environment ends with it."""
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given, told = sys.argv, {name: os.environ.get(name) for name in names}
    sys.argv = [str(Path(bp_torch.__file__).with_name("cli.py")), *map(str, arguments)]
    try:
        yield
    finally:
        sys.argv = given
        for name, value in told.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def quiet() -> None:
    """Let Lightning tell of problems alone."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # lightning 2.6 walks containers by a name that torch 2.13 deprecated
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated", FutureWarning)


def end_processes(trainer: Trainer) -> None:
    """End the processes that this one started, which wait for it in the middle of a step."""
    launcher: Any = trainer.strategy.launcher
    processes = getattr(launcher, "procs", [])
    if processes:
        launcher.kill(signal.SIGKILL)
        processes.clear()  # Lightning watches them, and would end this process too


def alone(trainer: Trainer, settings: Namespace, run: Path) -> Trainer:
    """The trainer, if it trained in this process alone; else one that does, with the callbacks as they were at the end.

    Each row is then tested once, and nothing waits for the other processes, which end here.
    """
    if trainer.world_size == 1 and trainer.strategy.launcher is None:
        return trainer
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    elif (last := run / "checkpoints" / "last.ckpt").is_file():  # trained in processes that are no more
        restore(trainer, torch.load(last, weights_only=True))
    one: dict[str, Any] = {
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "logger": False,
        "default_root_dir": str(run),
    }
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    options: dict[str, Any] = settings.as_dict() | one
    return Trainer(**{**options, "callbacks": list(callbacks), "enable_model_summary": False})


def restore(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Give callbacks and loops the state that they had when a checkpoint was written."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    trainer.fit_loop.epoch_progress.current.completed = checkpoint["epoch"] + 1  # it was written just before
