"""Callbacks for any Lightning Trainer. Files go under the trainer's `default_root_dir`, the folder of the run."""

from .run import (
    AtomicCheckpointIO,
    Checkpoints,
    EarlyStopping,
    EpochSeeds,
    GradientNorms,
    History,
    replace_file,
    stop_reason,
)

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoints",
    "EarlyStopping",
    "EpochSeeds",
    "GradientNorms",
    "History",
    "replace_file",
    "stop_reason",
]
