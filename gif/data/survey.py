"""What the images of a data set are like: sizes, colour, whether they are drawings; from a sample, before any work."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gif.data.decoding import BrokenImageError, decode
from gif.data.encoded import EncodedImages
from gif.data.images import IdentityDataset
from gif.spacing import evenly_spaced

SAMPLE = 256  # images, evenly spaced
COLOR_LEVELS = 12  # that two channels of a pixel differ by where it has a colour: JPEG makes a few of grey
COLORED_PIXELS = 0.01  # share of an image's pixels that have a colour where the image has
EXTREME_LEVELS = 40  # from black or white, of 255


@dataclass(frozen=True)
class Survey:
    """What `survey` found.

    Args:
        images: that were looked at, and could be read.
        sides: the median of their shorter side, in pixels.
        common: the size (height, width) that most of them have.
        common_share: the share that have it.
        colored: the share in colour.
        extreme: of the pixels, the share that are nearly black or nearly white.
        fixed: whether images have one size and number of channels whatever is asked for: they are made here.
        seconds: to read and decode one image.
    """

    images: int
    sides: int
    common: tuple[int, int]
    common_share: float
    colored: float
    extreme: float
    fixed: bool
    seconds: float


def survey(data: IdentityDataset) -> Survey:
    """Look at `SAMPLE` images of a data set, evenly spaced, in the size in which they are stored.

    Raises ValueError where none of them can be read.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    colored = extreme = pixels = 0.0
    begin = time.monotonic()
    places = evenly_spaced(len(data), SAMPLE)
    reason: BrokenImageError | None = None
    for index in places:
        try:
            image = _stored_pixels(data, index)
        except BrokenImageError as error:
            reason = error
            continue
        sizes[image.shape[:2]] += 1
        colored += _has_color(image)
        grey = image.mean(2)
        extreme += float(((grey < EXTREME_LEVELS) | (grey > 255 - EXTREME_LEVELS)).sum())
        pixels += grey.size
    images = sizes.total()
    if not images:
        raise BrokenImageError(f"none of {len(places)} images that were tried can be read; {reason}")
    (common, number), *_ = sizes.most_common(1)
    return Survey(
        images=images,
        sides=int(np.median([min(size) for size in sizes.elements()])),
        common=common,
        common_share=number / images,
        colored=colored / images,
        extreme=extreme / pixels,
        fixed=not isinstance(data, EncodedImages),
        seconds=(time.monotonic() - begin) / len(places),
    )


def _stored_pixels(data: IdentityDataset, index: int) -> NDArray[np.uint8]:
    """An image (h, w, 1 or 3) in the size in which it is stored. Raises BrokenImageError."""
    if not isinstance(data, EncodedImages):
        return data[index][0].permute(1, 2, 0).numpy()
    try:
        return decode(data.encoded(index), "RGB", max_pixels=data.decoder.max_pixels)
    except (ValueError, OSError) as error:
        raise BrokenImageError(f"{data.place(index)} is a broken image: {error}; remove or replace it") from error


def _has_color(image: NDArray[np.uint8]) -> bool:
    levels = image.astype(np.int16)
    differ = (levels.max(2) - levels.min(2)) > COLOR_LEVELS
    return bool(differ.mean() > COLORED_PIXELS)
