"""Fused Triton kernels of bp_torch, one file per layer; installed as ``bp_torch.triton_kernels``.

This package imports torch and triton, and nothing of bp_torch. It holds no kernel yet: this release computes every
layer by the torch formulas of ``bp_torch.functions``, on every device.
"""
