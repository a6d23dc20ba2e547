"""The kernels of the penalties: whole blocks and parts of one, several dtypes, views, and parameters that change."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE
from test_triton_loss import DTYPES, _triton  # noqa: F401  a fixture
from torch import Tensor

import bp_torch
from bp_torch import functional as bpF
from bp_torch import triton_kernels as kernels

ONE_BACKEND = "about the kernels alone"

PENALTIES: list[tuple[str, tuple[float, ...]]] = [
    ("l1_penalty", (0.3,)),
    ("l2_penalty", (0.7,)),
    ("elastic_net_penalty", (0.5, 0.4)),
    ("elastic_net_penalty", (2.0, 0.5)),  # λ₁ = λ₂ = 1
]
every_penalty = pytest.mark.parametrize(
    ("name", "numbers"), PENALTIES, ids=[f"{name}{numbers}" for name, numbers in PENALTIES]
)


def parameters_of(*dtypes: torch.dtype) -> list[Tensor]:
    shapes = [(3, 5), (), (4096,), (0, 4), (5000,), (1,), (2, 4100)]
    return [torch.randn(s, device=DEVICE).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]


@every_penalty
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:2], DTYPES[2:], DTYPES], ids=["f32", "bf16", "f16", "mixed"])
def test_penalties(name: str, numbers: tuple[float, ...], dtypes: list[torch.dtype]) -> None:
    """Whole blocks, parts of one, none; several tensors and dtypes."""
    tensors = [t.requires_grad_() for t in parameters_of(*dtypes)]
    tensors[0].data[0, 0] = 0.0
    R = getattr(bpF, name)(tensors, *numbers)
    gradients = torch.autograd.grad(3 * R, tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    with bp_torch.backend("torch"):
        exact = getattr(bpF, name)(wide, *numbers)
        expected = torch.autograd.grad(3 * exact, wide)
    unit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2
    torch.testing.assert_close(R.double(), exact, rtol=2 * unit if len(dtypes) == 1 else 2e-7, atol=0)
    for got, right, t in zip(gradients, expected, tensors, strict=True):
        assert got.dtype == t.dtype
        assert got.shape == t.shape
        # 3 is exact; one rounding of the slope, one of the product, one of the result, which below the smallest normal
        # number is half a step of those there.
        info = torch.finfo(t.dtype)
        torch.testing.assert_close(got.double(), right, rtol=3 * info.eps, atol=info.smallest_normal * info.eps / 2)


def test_penalties_of_views() -> None:
    """Transposed (kept as it is), with gaps, expanded, and at an address that is no multiple of 16."""
    base = torch.randn(40, 30, device=DEVICE)
    views = [base.t(), base[:, ::2], base[:1].expand(4, 30), base.view(-1)[1:1000]]
    tensors = [v.detach().requires_grad_() for v in views]
    R = bpF.elastic_net_penalty(tensors, 0.5, 0.4)
    expected = sum(0.2 * v.abs().sum() + 0.3 * (v * v).sum() for v in views)
    torch.testing.assert_close(R, expected)
    gradients = torch.autograd.grad(R, tensors)
    for got, v in zip(gradients, views, strict=True):
        torch.testing.assert_close(got, 0.2 * v.sign() + 0.6 * v)
    assert gradients[0].stride() == tensors[0].stride()


def test_a_penalty_follows_its_parameters() -> None:
    """The table of addresses is kept; values that change, and parameters that move, are seen."""
    w = torch.ones(10, device=DEVICE)
    first = bpF.l1_penalty([w], 1.0)
    kept = len(kernels.penalty._tables)
    w.mul_(2)
    torch.testing.assert_close(bpF.l1_penalty([w], 1.0), 2 * first)
    assert len(kernels.penalty._tables) == kept
    torch.testing.assert_close(bpF.l1_penalty([3 * w], 1.0), 6 * first)
    for _ in range(2 * kernels.penalty.KEPT):
        moved = [torch.ones(3, device=DEVICE) for _ in range(torch.randint(1, 5, ()).item())]
        torch.testing.assert_close(bpF.l2_penalty(moved, 1.0).item(), 3.0 * len(moved))
    assert len(kernels.penalty._tables) <= kernels.penalty.KEPT
