"""Augmentation: random changes of normalised images in training, by name as configs and the command line give them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AugmentationName = Literal["affine", "mirror", "photo", "none"]
"""The augmentations that a training config knows by name."""
BRIGHTNESS, CONTRAST = 0.2, 1.3  # of photographs: the largest shift, and the largest factor


@dataclass(frozen=True)
class RandomAffine:
    """A random rotation, scale and shift for each image of a batch, by bilinear sampling.

    Args:
        degrees: rotation, uniform in [-degrees, degrees].
        scale: largest factor; log-uniform in [1 / scale, scale].
        shift: largest shift along each axis, as a share of the image's side.

    Pixels from outside the image take the value ``fill`` (in the normalised range; -1 is black), or that of the image's
    nearest pixel where it is None.
    """

    degrees: float = 10.0
    scale: float = 1.15
    shift: float = 0.08
    fill: float | None = -1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, c, h, w) float, changed; random numbers come from torch's global generator."""
        count, device = len(images), images.device

        def uniform(limit: float) -> Tensor:
            return (torch.rand(count, device=device) * 2 - 1) * limit

        angle = uniform(math.radians(self.degrees))
        zoom = torch.exp(uniform(math.log(self.scale)))
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        x, y = uniform(2 * self.shift), uniform(2 * self.shift)
        matrices = torch.stack([cosine, -sine, x, sine, cosine, y], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        if self.fill is None:
            return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return F.grid_sample(images - self.fill, grid, align_corners=False) + self.fill


def mirror(images: Tensor) -> Tensor:
    """Half of the images (B, c, h, w), at random, mirrored: what the field trains aligned faces with."""
    turned = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(turned, images.flip(3), images)


def photo(images: Tensor) -> Tensor:
    """Images (B, c, h, w) as other photographs of the same: mirrored, moved a little, brighter or of other contrast."""
    moved = _MOVED(mirror(images))

    def uniform() -> Tensor:
        return torch.rand(len(images), 1, 1, 1, device=images.device) * 2 - 1

    contrast = torch.exp(uniform() * math.log(CONTRAST))
    return (moved * contrast + BRIGHTNESS * uniform()).clamp(-1, 1)


_MOVED = RandomAffine(fill=None)


def unchanged(images: Tensor) -> Tensor:
    """Return the images as they are."""
    return images


AUGMENTATIONS: dict[AugmentationName, Callable[[Tensor], Tensor]] = {
    "affine": RandomAffine(),
    "mirror": mirror,
    "photo": photo,
    "none": unchanged,
}
"""affine: rotated, scaled and shifted a little, for glyphs. mirror: for aligned faces. photo: both, and in other light,
for photographs that are not aligned. none: as they are."""
