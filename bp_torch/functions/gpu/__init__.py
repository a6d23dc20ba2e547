"""Faster ways by the Triton kernels. A file for each layer, which registers them."""

from . import batch_norm, dense, dropout, epilogue, mlp, residual, softmax  # noqa: F401
