"""What torch's functional forms refuse in their plain arguments is refused with the same exception type."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bp_torch.functional as bpF
from bp_torch.functions.activation_table import ACTIVATIONS

ONE_BACKEND = "arguments are looked at before a backend is chosen"

WRONG = ["0.5", "tanh", None, math.nan, 1j, [0.5], -0.5, 1.5, math.inf, True, 2]


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def classes() -> Tensor:
    return torch.tensor([0, 1, 2, 0])


ROWS, IMAGES = (x(4, 3),), (x(2, 3, 4, 5),)
PAIRS = (x(4, 3), lambda: torch.rand(4, 3))
CALLS: dict[str, tuple[tuple[Callable[[], Tensor], ...], tuple[str, ...]]] = {
    **{key: (ROWS, tuple(row.arguments)) for key, row in ACTIVATIONS.items() if row.torch_module and row.arguments},
    "dropout": (ROWS, ("p", "training")),
    "dropout1d": ((x(2, 3, 4),), ("p", "training")),
    "dropout2d": (IMAGES, ("p", "training")),
    "dropout3d": ((x(2, 3, 2, 2, 2),), ("p", "training")),
    "alpha_dropout": (ROWS, ("p", "training")),
    "feature_alpha_dropout": (ROWS, ("p", "training")),
    "softmax": (ROWS, ("dim", "dtype")),
    "log_softmax": (ROWS, ("dim", "dtype")),
    "softmin": (ROWS, ("dim", "dtype")),
    "mse_loss": (PAIRS, ("reduction", "size_average", "reduce")),
    "l1_loss": (PAIRS, ("reduction", "size_average", "reduce")),
    "smooth_l1_loss": (PAIRS, ("reduction", "beta")),
    "huber_loss": (PAIRS, ("reduction", "delta")),
    "binary_cross_entropy_with_logits": (PAIRS, ("reduction",)),
    "cross_entropy": ((*ROWS, classes), ("reduction", "ignore_index", "label_smoothing")),
    "nll_loss": ((*ROWS, classes), ("reduction", "ignore_index")),
    "batch_norm": ((x(4, 3), lambda: torch.zeros(3), lambda: torch.ones(3)), ("training", "momentum", "eps")),
}


def refusal(form: Callable[..., Any], *args: Any, **options: Any) -> type[Exception] | None:
    try:
        form(*args, **options)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.filterwarnings("ignore:size_average and reduce", "ignore:Implicit dimension choice")
@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, (_, options) in CALLS.items() for option in options]
)
def test_wrong_values(name: str, option: str) -> None:
    makers, _ = CALLS[name]
    for value in WRONG:
        if (name, value) == ("hardtanh", 1j) or (option, value) == ("ignore_index", True):
            continue  # Python's own error of comparing them; and a bool is an integer
        for more in ({}, {"training": True}) if name == "batch_norm" and option != "training" else ({},):
            inputs = [make() for make in makers]
            ours = refusal(getattr(bpF, name), *inputs, **{option: value}, **more)
            theirs = refusal(getattr(F, name), *inputs, **{option: value}, **more)
            assert ours == theirs, (value, more)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if "loss" not in name and "entropy" not in name])
def test_wrong_dtypes(name: str, dtype: torch.dtype) -> None:
    makers, _ = CALLS[name]
    options: dict[str, Any] = {"dim": 1} if "softm" in name else {"training": True} if "dropout" in name else {}
    inputs = [make() for make in makers]
    inputs[0] = inputs[0].to(dtype)
    theirs = refusal(getattr(F, name), *inputs, **options)
    assert refusal(getattr(bpF, name), *inputs, **options) == theirs
