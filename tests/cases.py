"""The one table of cases, which the tests read; the rows are in cases_layers.py, cases_batch_norm.py, cases_losses.py.

A case is one way to call a Function, beside the same computation by torch. Its inputs are float64, away from kinks,
and small enough for gradcheck. Random choices (a dropout mask, a target) are constants of the case, so that a case is
a pure function of its inputs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from case_tools import Case, torch_activation, widest, within, written_out
from cases_batch_norm import batch_norm_cases
from cases_layers import (
    activation_backward_cases,
    activation_cases,
    dense_cases,
    dropout_cases,
    mlp_cases,
    penalty_cases,
    residual_cases,
)
from cases_losses import bce_cases, cross_entropy_cases, error_loss_cases, softmax_cases

__all__ = ["CASES", "Case", "all_cases", "on_device", "torch_activation", "widest", "within", "written_out"]


def all_cases() -> list[Case]:
    """The table, on the current default device."""
    return [
        *activation_cases(),
        *activation_backward_cases(),
        *dense_cases(),
        *mlp_cases(),
        *batch_norm_cases(),
        *dropout_cases(),
        *residual_cases(),
        *penalty_cases(),
        *softmax_cases(),
        *cross_entropy_cases(),
        *error_loss_cases(),
        *bce_cases(),
    ]


CASES = all_cases()


@cache
def on_device(device: str) -> dict[str, Case]:
    """The table by name, with its inputs, masks and targets on another device."""
    with torch.device(device):
        cases = all_cases()

    def moved(case: Case) -> Case:  # some cases make their inputs at the call, on the default device of that time
        return replace(case, inputs=lambda: tuple(t.to(device) for t in case.inputs()))

    return {case.name: moved(case) for case in cases}
