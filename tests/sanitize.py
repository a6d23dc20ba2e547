"""Every case of the table on the GPU, forward and backward, in odd shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/sanitize.py

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that a step outside it is seen.
"""

from __future__ import annotations

import torch
from cases import on_device

import bp_torch
from bp_torch import functional as bpF


def run_cases(dtype: torch.dtype) -> int:
    count = 0
    for case in on_device("cuda").values():
        inputs = tuple(t.to(dtype).requires_grad_() for t in case.inputs())
        ys = case.ours(*inputs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        torch.autograd.grad(ys, inputs, [torch.ones_like(y) for y in ys], allow_unused=True)
        count += 1
    return count


def run_odd_shapes(dtype: torch.dtype) -> None:
    """More than one block in each direction, and none of them full."""
    rows, columns, inner = 131, 1031, 67
    x, W, b, r = (
        torch.randn(shape, device="cuda").to(dtype).requires_grad_()
        for shape in ((rows, inner), (columns, inner), (columns,), (rows, columns))
    )
    y = bpF.dense(x, W, b, r, activation="gelu", p=0.3)
    y = bpF.batch_norm_act(y, None, None, b, b, r, True, activation="relu")
    target = torch.arange(rows, device="cuda")
    loss = bpF.cross_entropy(y, target, label_smoothing=0.1) + bpF.softmax(y, 1).square().mean()
    loss = loss + bpF.mse_loss(y, r) + bpF.log_softmax(y, 0).mean()
    torch.autograd.grad(loss, (x, W, b, r))


if __name__ == "__main__":
    with bp_torch.backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            print(run_cases(dtype), "cases in", dtype)
            run_odd_shapes(dtype)
    torch.cuda.synchronize()
