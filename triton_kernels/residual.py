"""A residual connection in one pass each way, by the elementwise kernels: the activation comes last.

forward    z = keep · x / (1 - p) + r,  y = f(z)
backward   dr = dy · f′(z),  dx = keep · dr / (1 - p)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementwise import run_backward, run_forward
from .epilogue import Epilogue

__all__ = ["backward", "forward"]


def forward(x: Tensor, residual: Tensor, seed: Tensor | None, e: Epilogue) -> tuple[Tensor, Tensor | None]:
    """y, in x's dtype promoted with the residual's; and z where that tells f′."""
    return run_forward(x, None, residual, seed, e, act_last=True)


def backward(
    dy: Tensor, s: Tensor | None, seed: Tensor | None, e: Epilogue, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor]:
    """dx and dr, in these dtypes."""
    return run_backward(dy, s, seed, e, *dtypes)
