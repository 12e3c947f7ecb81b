"""Augmentation by name, as configs and the command line give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gif.data.augment import RandomAffine

AugmentationName = Literal["affine", "mirror", "none"]


def mirror(images: Tensor) -> Tensor:
    """Half of the images (B, c, h, w), at random, mirrored: what the field trains aligned faces with."""
    turned = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(turned, images.flip(3), images)


def unchanged(images: Tensor) -> Tensor:
    """The images as they are."""
    return images


AUGMENTATIONS: dict[AugmentationName, Callable[[Tensor], Tensor]] = {
    "affine": RandomAffine(),
    "mirror": mirror,
    "none": unchanged,
}
"""affine: rotated, scaled and shifted a little, for glyphs. mirror: for faces. none: as they are."""
