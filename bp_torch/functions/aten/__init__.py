"""Faster ways by ATen's own kernels, several passes of a formula in one; some serve on the CPU alone.

A file for each layer, which registers them.
"""

from . import batch_norm, cross_entropy, dense, dropout, epilogue, loss, mlp, nll_loss, penalty, residual, softmax
