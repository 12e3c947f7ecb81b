"""Faces as the field's networks expect them: five points moved to fixed places by a similarity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gif.errors import InputError

SIZE = 112
FIVE_POINTS = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=torch.float64,
)
"""Where a 112 x 112 crop has the eyes, the nose and the corners of the mouth: (5, 2), x and y in pixels."""


def align_face(image: Tensor, landmarks: Tensor) -> Tensor:
    """Warp a face so that its five landmarks come to lie on `FIVE_POINTS`, as nearly as a similarity can.

    The similarity (rotation, one scale, shift) is the least-squares one; pixels are sampled bilinearly at their
    centres, and what lies outside the image is black.

    Args:
        image: (c, h, w) uint8.
        landmarks: (5, 2), x and y in pixels, pixel centres at whole numbers.

    Returns (c, 112, 112) uint8. Raises ValueError for another shape or dtype, or landmarks that all coincide.
    """
    if image.ndim != 3 or image.dtype != torch.uint8 or landmarks.shape != FIVE_POINTS.shape:
        wanted = "wanted an image (c, h, w) uint8 and landmarks (5, 2)"
        raise InputError(f"{wanted}, got {tuple(image.shape)} {image.dtype} and {tuple(landmarks.shape)}")
    factor, shift = _similarity(landmarks)
    axis = torch.arange(SIZE, dtype=torch.float64)
    place = (torch.complex(*torch.meshgrid(axis, axis, indexing="xy")) - shift) / factor  # in the image, x + iy
    height, width = image.shape[1:]
    grid = torch.stack([(2 * place.real + 1) / width - 1, (2 * place.imag + 1) / height - 1], dim=-1)
    warped = F.grid_sample(image[None].double(), grid[None], align_corners=False)
    return warped[0].round().to(torch.uint8)


def _similarity(landmarks: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity z -> factor z + shift of the complex plane that takes landmarks nearest to `FIVE_POINTS`."""
    source, target = (torch.complex(*points.double().unbind(1)) for points in (landmarks, FIVE_POINTS))
    centered = source - source.mean()
    spread = centered.abs().square().sum()
    if not spread > 0:
        raise InputError(f"the landmarks {landmarks.tolist()} coincide or are NaN; leave that image out")
    factor = (centered.conj() * (target - target.mean())).sum() / spread
    return factor, target.mean() - factor * source.mean()
