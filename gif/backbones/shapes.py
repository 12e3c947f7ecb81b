"""What the convolutional backbones share about sizes."""

from __future__ import annotations

from gif.errors import InputError

STRIDE = 16  # four stages, each halving the image


def map_size(image_size: int) -> int:
    """Height and width of the last feature map. Raises ValueError unless ``image_size`` is a multiple of 16."""
    if image_size % STRIDE or image_size < STRIDE:
        raise InputError(f"image_size must be a multiple of {STRIDE}, got {image_size}; resize the images")
    return image_size // STRIDE
