"""The table of checks. Each file beside this one adds rows by the decorator :func:`check`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CHECKS", "Check", "Failed", "NotApplicable", "check", "describe", "line", "refusal"]


class Failed(Exception):
    """What is wrong, in one line, and the tensors that show it by name."""

    def __init__(self, what: str, example: dict[str, Any] | None = None) -> None:
        super().__init__(what)
        self.what, self.example = what, example or {}


class NotApplicable(Exception):
    """The reason, in one line."""


@dataclass(frozen=True)
class Check:
    name: str
    what: str
    """What is checked, in one line."""
    means: str
    """What a failure means for training, in one line."""
    run: Callable[..., str | None]
    """Takes a context; returns a note or None; raises Failed or NotApplicable."""
    gradients: bool = False
    """It differentiates, so that it needs an output that depends on an input."""
    repeats: bool = True
    """It compares two calls, so that these must agree when the seed is the same."""
    shrinks: bool = True
    """A failure is looked for again on fewer rows."""


CHECKS: dict[str, Check] = {}


def check(name: str, what: str, means: str, **options: Any) -> Callable[[Callable[..., str | None]], Any]:
    def add(run: Callable[..., str | None]) -> Callable[..., str | None]:
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, what, means, run, **options)
        return run

    return add


# How torch itself says that something is not offered: a limit, stated aloud. All else is a defect, a crash whose
# message happens to say "unsupported" or "not implemented" included. An error of a subclass of the type counts as well.
_REFUSALS: tuple[tuple[type[Exception], str], ...] = (
    # torch/autograd/function.py. That backward or forward itself is missing is no limit, but a mistake.
    (RuntimeError, r"trying to differentiate twice a function that was marked with @once_differentiable"),
    (NotImplementedError, r"You must implement the jvp function for custom autograd\.Function to use it with forward"),
    (
        RuntimeError,
        r"In order to use an autograd\.Function with functorch transforms .* it must override the setup_cont",
    ),
    # torch/_functorch/autograd_function.py
    (RuntimeError, r"You tried to vmap over \S+, but it does not have vmap support"),
    # tools/autograd/gen_variable_type.py: operators without a forward-mode formula
    (NotImplementedError, r"Trying to use forward AD with \S+ that does not support it"),
    # torch/csrc/autograd/FunctionsManual.cpp and autograd_not_implemented_fallback.cpp: operators without a backward
    (NotImplementedError, r"the derivative for '\S+' is not implemented"),
    (RuntimeError, r"derivative for aten::\S+ is not implemented"),
    # aten/src/ATen/functorch: operators and programs that cannot be batched
    (RuntimeError, r"Batching rule not implemented for \S+[.;] (We could not generate a|the) fallback"),
    (RuntimeError, r"vmap: [wW]e do not yet support "),
    (RuntimeError, r"vmap: It looks like you're (either \(1\) )?calling \.item\(\) on a Tensor"),
    (RuntimeError, r"vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow"),
    (RuntimeError, r"vmap: We do not support batching operators that can support dynamic shape"),
    (
        RuntimeError,
        r"vmap: aten::\S+\(self, \*extra_args\) is not possible because there exists a Tensor `other` in extra_args",
    ),
    (RuntimeError, r"Batch norm got a batched tensor as input while the running_mean or running_var, which will be up"),
    # aten/src/ATen/functorch and c10/core/TensorImpl.cpp: what a transform wraps has no memory of its own for a kernel
    (NotImplementedError, r"Cannot access storage of (TensorWrapper|BatchedTensorImpl)$"),
    (RuntimeError, r"Cannot access data pointer of Tensor that doesn't have storage$"),
    # aten/src/ATen/Dispatch.h, native/LinearAlgebraUtils.h and native/*/SpectralOps: operators without a kernel for a
    # low precision. Where there is none for integers or float64, it is not the dtype that is at fault.
    (NotImplementedError, r""""\S+" not implemented for '(Half|BFloat16|ComplexHalf)'$"""),
    (RuntimeError, r"linalg\.\S+: Low precision dtypes not supported\. Got (Half|BFloat16)$"),
    (RuntimeError, r"(Unsupported dtype|MKL FFT doesn't support tensors of type:) (Half|BFloat16)$"),
    # torch/nn/functional.py, aten/src/ATen/native/RNN.cpp and Loss.cpp: batches and values without a meaning
    (ValueError, r"Expected more than 1 (value per channel|spatial element) when training, got input size "),
    (RuntimeError, r"Expected sequence length to be larger than 0 in RNN$"),
    (RuntimeError, r"all elements of (input|target) should be between 0 and 1$"),
    # bp_torch/functional/batch_norm.py, as torch/nn/functional.py
    (ValueError, r"batch_norm\w*\(\): 'input': expected more than 1 value per channel when training, got "),
    # torch/_dynamo: modules that it does not trace
    (RuntimeError, r"Attempted to wrap RNN, GRU, or LSTM\n"),
)


def refusal(error: BaseException) -> str | None:
    """The message, if it is one of torch's own that say that something is not offered; else None."""
    told = any(isinstance(error, kind) and re.match(said, str(error)) for kind, said in _REFUSALS)
    return f"refused: {line(error)}" if told else None


def line(error: BaseException, width: int = 160) -> str:
    """An error as one line: its type, and the first sentence or line of its message."""
    text = next((row.strip() for row in str(error).splitlines() if row.strip()), "")
    text = text if len(text) <= width else text[: width - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def describe(value: Any) -> str:
    """A tensor by shape, strides, dtype and values, of which at most twelve are written."""
    if not isinstance(value, Tensor):
        return repr(value)
    t = value.detach()
    parts = [f"shape {tuple(t.shape)}", f"strides {t.stride()}", str(t.dtype).removeprefix("torch.")]
    if t.device.type != "cpu":
        parts.append(str(t.device))
    # Rows first, so that a view over a large storage is not copied whole.
    flat = t.reshape(-1)[:12].cpu() if t.numel() <= 12 else torch.stack([t[_at(t, i)] for i in range(12)]).cpu()
    shown = [f"{v:.6g}" if isinstance(v, float) else str(v) for v in flat.tolist()]
    values = ", ".join(shown) + (", …" if t.numel() > 12 else "")
    return f"{', '.join(parts)}, values {values if shown else 'none'}"


def _at(t: Tensor, i: int) -> tuple[int, ...]:
    return tuple(int(k) for k in torch.unravel_index(torch.tensor(i), t.shape))
