"""From encoded images to pixels: RGB or grey, one size, and a clear word where an image is broken."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gif.errors import InputError
from gif.packages import needs

Fit = Literal["squash", "crop", "exact"]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_SIGNATURES = {".jpg": (0, b"\xff\xd8\xff"), ".png": (0, b"\x89PNG\r\n\x1a\n"), ".webp": (8, b"WEBP")}


class BrokenImageError(ValueError):
    """An image that cannot be read or decoded; the message says which and why."""


@dataclass(frozen=True)
class ImageDecoder:
    """JPEG, PNG or WebP to uint8 (channels, size, size), turned as EXIF says; decoded by Pillow.

    Args:
        size: height and width.
        channels: 3 for RGB, in this order, or 1 for grey levels. Either is made of whatever the file holds.
        fit: an image of another size is resized to exactly ``size``, whatever its aspect ratio ("squash": nothing is
            lost), resized to cover it and its centre kept ("crop"), or counts as broken ("exact"). Resizing is bilinear
            and antialiased, by torchvision.

    Raises ValueError for other values.
    """

    size: int = 112
    channels: int = 3
    fit: Fit = "squash"

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3):
            raise InputError(f"wanted size >= 1 and 1 or 3 channels, got {self.size} and {self.channels}")
        if self.fit not in ("squash", "crop", "exact"):
            raise InputError(f"fit must be 'squash', 'crop' or 'exact', got {self.fit!r}")

    def __call__(self, encoded: bytes) -> Tensor:
        """Pixels (channels, size, size) uint8. Raises BrokenImageError."""
        with needs("pillow", "reading images"):
            from PIL import Image, ImageOps
        suffix(encoded)
        try:
            with Image.open(BytesIO(encoded)) as stored:
                if stored.mode not in _EIGHT_BITS:
                    raise BrokenImageError(f"its pixels are of mode {stored.mode}, wanted 8 bits a channel")
                ImageOps.exif_transpose(stored, in_place=True)
                mode = "RGB" if self.channels == 3 else "L"
                image = np.array(stored if stored.mode == mode else stored.convert(mode))
        except Exception as error:  # of damaged bytes Pillow's decoders raise almost anything
            raise BrokenImageError(str(error)) from error
        return self._resize(torch.from_numpy(image).view(*image.shape[:2], self.channels).permute(2, 0, 1))

    def _resize(self, image: Tensor) -> Tensor:
        if image.shape[1:] == (self.size, self.size):
            return image
        if self.fit == "exact":
            raise BrokenImageError(f"it is {image.shape[1]} x {image.shape[2]}, wanted {self.size} x {self.size}")
        with needs("torchvision", "resizing images"):
            from torchvision.transforms.v2 import functional as F  # here: as slow to import as torch itself

        if self.fit == "squash":
            return F.resize(image, [self.size, self.size], antialias=True)
        return F.center_crop(F.resize(image, [self.size], antialias=True), [self.size, self.size])


def suffix(encoded: bytes) -> str:
    """The suffix of the file an encoded image belongs into, told from its first bytes.

    Raises BrokenImageError if it is no JPEG, PNG or WebP.
    """
    for name, (offset, signature) in _SIGNATURES.items():
        if encoded[offset : offset + len(signature)] == signature:
            return name
    raise BrokenImageError(f"it is no JPEG, PNG or WebP ({len(encoded)} bytes, first {encoded[:8].hex(' ')})")
