"""Images of a data set as a person wants to see them: in colour, and ink dark on white."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gif.data.encoded import EncodedImages
from gif.data.images import IdentityDataset
from gif.spacing import evenly_spaced

DARK = 64  # mean grey level below which drawings are ink on black
DRAWN, EXTREME = 0.8, 40  # share of a drawing's pixels that are so near to black or white
LOOKED_AT = 64  # images, evenly spaced
BROKEN = 224  # grey level that stands for an image that cannot be read

Pixels = NDArray[np.uint8]


class Pictures:
    """Images (h, w, 3) uint8 to look at, of a data set.

    Grey drawings in white on black, as the glyphs are stored, are turned into black on white. One that cannot be read
    is plain grey.
    """

    def __init__(self, data: IdentityDataset) -> None:
        self._data = data
        self._turned = len(data) > 0 and self._is_white_on_black()

    def __getitem__(self, index: int) -> Pixels:
        if isinstance(self._data, EncodedImages):
            images = self._data.batch([index])[0]
            image = images[0] if len(images) else torch.full(self._data.image_shape, BROKEN, dtype=torch.uint8)
        else:
            image = self._data[index][0]
        return self._shown(image)

    def sheet(self, rows: list[list[int]], gap: int = 2) -> Pixels:
        """Images by their numbers, row below row, with ``gap`` pixels of white between them."""
        height, width = (side + gap for side in self._data.image_shape[1:])
        columns = max(map(len, rows))
        sheet = np.full((len(rows) * height - gap, columns * width - gap, 3), 255, np.uint8)
        for row, images in enumerate(rows):
            for column, index in enumerate(images):
                shown = self[index]
                sheet[row * height :, column * width :][: shown.shape[0], : shown.shape[1]] = shown
        return sheet

    def _is_white_on_black(self) -> bool:
        places = evenly_spaced(len(self._data), LOOKED_AT)
        images = self._data.batch(places)[0]
        if not len(images) or not bool((images == images[:, :1]).all()):
            return False
        extreme = ((images < EXTREME) | (images > 255 - EXTREME)).float().mean()
        return float(images.float().mean()) < DARK and float(extreme) >= DRAWN

    def _shown(self, image: Tensor) -> Pixels:
        pixels: Pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        return 255 - pixels if self._turned else pixels
