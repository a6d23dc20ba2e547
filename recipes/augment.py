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
