"""Faster ways by ATen's own kernels, several passes of a formula in one; some on the CPU alone. A file for each layer, which registers them."""

from . import activation, batch_norm, dense, dropout, epilogue, mlp, residual, softmax  # noqa: F401
