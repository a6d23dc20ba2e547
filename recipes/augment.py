"""Augmentation of whole batches. Every random number comes from a generator that the caller passes in."""

from __future__ import annotations

import torch
from kornia.geometry.transform import get_affine_matrix2d, warp_affine
from torch import Tensor

from .data import Augmentation


class RandomAffine(Augmentation):
    """Rotate, shift and scale images of a batch, each by its own random amounts (bilinear, zeros outside the image).

        angle ~ U(-degrees, degrees)    shift ~ U(-shift, shift) × (width, height)    zoom ~ U(1 - scale, 1 + scale)

    Args:
        degrees: largest rotation either way, in degrees; ≥ 0.
        shift: largest shift either way, as a share of the width and height; in [0, 1).
        scale: largest change of size either way; in [0, 1).
        probability: share of the images that are changed; in [0, 1]. The others keep the sharpness
            that interpolation takes from small images.

    Shape: (N, C, H, W) → (N, C, H, W), any floating dtype; the labels do not change.
    The amounts are drawn on the CPU in float32, so they are the same whatever device and dtype the images have.
    """

    def __init__(self, degrees: float = 0.0, shift: float = 0.0, scale: float = 0.0, probability: float = 1.0) -> None:
        if degrees < 0:
            raise ValueError(f"degrees must be at least 0, got {degrees}")
        for name, share in (("shift", shift), ("scale", scale)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be in [0, 1), got {share}")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {probability}")
        self.degrees, self.shift, self.scale, self.probability = degrees, shift, scale, probability

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        u = torch.empty(n, 4).uniform_(-1, 1, generator=generator).to(x)
        size = torch.tensor([width, height]).to(x)
        matrix = get_affine_matrix2d(
            translations=u[:, 0:2] * self.shift * size,
            center=((size - 1) / 2).expand(n, 2),
            scale=(1 + u[:, 2:3] * self.scale).expand(n, 2),
            angle=u[:, 3] * self.degrees,
        )
        changed = torch.rand(n, 1, 1, 1, generator=generator) < self.probability
        return torch.where(changed.to(x.device), warp_affine(x, matrix[:, :2], (height, width)), x)


class RandomSignal(Augmentation):
    """Shift, scale and add noise to signals of a batch, each by its own random amounts.

        y(t) = a x(t - s) + ε(t)    s ~ U{-n, ..., n}, n = ⌊shift L⌋    a ~ U(1 - scale, 1 + scale)    ε ~ N(0, noise²)

    What is shifted in is zero, or with `wrap` what was shifted out on the other side. The channels of a signal are
    shifted and scaled together.

    Args:
        shift: largest shift either way, as a share of the length L; in [0, 1).
        scale: largest change of amplitude either way; in [0, 1).
        noise: standard deviation of the noise, in the units of the signals; ≥ 0.
        wrap: whether signals are periodic.
        probability: share of the signals that are changed; in [0, 1].

    Shape: (N, ..., L) → (N, ..., L), any floating dtype; the labels do not change.
    The amounts are drawn on the CPU in float32, so they are the same whatever device and dtype the signals have.
    """

    def __init__(
        self,
        shift: float = 0.0,
        scale: float = 0.0,
        noise: float = 0.0,
        wrap: bool = False,
        probability: float = 1.0,
    ) -> None:
        for name, share in (("shift", shift), ("scale", scale)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be in [0, 1), got {share}")
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {probability}")
        self.shift, self.scale, self.noise = shift, scale, noise
        self.wrap, self.probability = wrap, probability

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, length = len(x), x.shape[-1]
        column = (n, *(1,) * (x.ndim - 1))
        furthest = int(self.shift * length)
        shift = torch.randint(-furthest, furthest + 1, column, generator=generator)
        factor = 1 + self.scale * torch.empty(column).uniform_(-1, 1, generator=generator)
        noise = self.noise * torch.randn(x.shape, generator=generator)
        changed = torch.rand(column, generator=generator) < self.probability
        source = (torch.arange(length) - shift).to(x.device)
        moved = x.gather(-1, (source % length).expand(x.shape))
        if not self.wrap:
            moved = torch.where((source >= 0) & (source < length), moved, 0.0)
        return torch.where(changed.to(x.device), moved * factor.to(x) + noise.to(x), x)
