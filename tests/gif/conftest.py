"""What tests of several modules share."""

import io

import pytest
import torch
from PIL import Image


@pytest.fixture
def png():
    """An image (3, h, w) uint8 as PNG, by Pillow: no pixel changes."""

    def encode(image, format="PNG"):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, format)
        return file.getvalue()

    return encode


@pytest.fixture
def jpeg(png):
    """A random JPEG, 112 x 112 unless another size is given."""
    return lambda height=112, width=112: png(torch.randint(256, (3, height, width), dtype=torch.uint8), "JPEG")
