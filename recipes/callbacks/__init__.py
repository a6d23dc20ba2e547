"""Callbacks for any Lightning Trainer. Files go under the trainer's `default_root_dir`, the folder of the run."""

from .backprop_view import BackpropView, View, backprop_view
from .convert import ConvertLayers
from .gradient_flow import FlowRecorder, GradientFlow, flow_figure
from .rate import LearningRateFinder, StopAfterReductions
from .report import Report
from .run import (
    AtomicCheckpointIO,
    Checkpoints,
    EarlyStopping,
    EpochSeeds,
    GradientNorms,
    History,
    diverged,
    replace_file,
    stop_reason,
)
from .sparsity import ProximalL1, SparsityReport
from .summary import Summary

__all__ = [
    "AtomicCheckpointIO",
    "BackpropView",
    "Checkpoints",
    "ConvertLayers",
    "EarlyStopping",
    "EpochSeeds",
    "FlowRecorder",
    "GradientFlow",
    "GradientNorms",
    "History",
    "LearningRateFinder",
    "ProximalL1",
    "Report",
    "SparsityReport",
    "StopAfterReductions",
    "Summary",
    "View",
    "backprop_view",
    "diverged",
    "flow_figure",
    "replace_file",
    "stop_reason",
]
