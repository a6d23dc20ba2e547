"""Where the kernels run in the tests: on a CUDA device where there is one, else in Triton's interpreter on the CPU.

``TRITON_INTERPRET=1`` chooses the interpreter on any machine.
"""

from __future__ import annotations

import os

import torch

__all__ = ["DEVICE"]

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
