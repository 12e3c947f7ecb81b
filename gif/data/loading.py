"""A data set by its name or its path, split into identities to train on and held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gif.data.decoding import ImageDecoder
from gif.data.encoded import BrokenPolicy, EncodedImages, Labelled
from gif.data.folder import read_folder
from gif.data.glyphs import all_glyphs, all_glyphs_80k
from gif.data.images import IdentityDataset, IdentityImages, IdentitySplit, check_held_out, split_identities
from gif.data.listing import as_utf8
from gif.data.records import read_records
from gif.data.shards import COMPRESSED, read_shards
from gif.errors import InputError

HELD_OUT = 0.2  # of the identities
NAMES: dict[str, Callable[[], IdentityImages]] = {
    "glyphs": all_glyphs,
    "glyphs-80k": all_glyphs_80k,
    "glyphs-80k-64": partial(all_glyphs_80k, size=64),
}
"""Data sets that are made here: drawn by matplotlib's fonts, and by Debian's in 32 and in 64 pixels."""
_PATHS = (
    "a folder with a folder an identity, a .rec file or the folder of train.rec, tar shards ('shards/{000..127}.tar')"
)


def load_data(
    data: str,
    *,
    held_out: float = HELD_OUT,
    seed: int = 0,
    decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (frozen)
    on_broken: BrokenPolicy = "skip",
) -> IdentitySplit:
    """A data set, split by identity into a part to train on and a held-out one.

    Args:
        data: a name in `NAMES`, or a path as for `open_data`.
        held_out: fraction of the identities to hold out, or how many; 0 trains on all, 1 holds all out.
        seed: decides which identities are held out.
        decoder, on_broken: of images that lie on disk, as for `open_data`; glyphs are drawn in their set's own size.

    Raises ValueError for an unknown name, or where none of a few images can be decoded; and as `open_data` and
    `split_identities` do; FileNotFoundError where fonts are missing.
    """
    if held_out not in (0, 1):
        check_held_out(held_out)
    images = open_data(data, decoder=decoder, on_broken=on_broken)
    if isinstance(images, EncodedImages):
        images.check_readable()
    if held_out in (0, 1):
        nobody = images.of_identities(torch.empty(0, dtype=torch.int64))
        return IdentitySplit(images, nobody) if held_out == 0 else IdentitySplit(nobody, images)
    return IdentitySplit(*split_identities(images, held_out, seed))


def open_data(
    data: str,
    *,
    decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (frozen)
    on_broken: BrokenPolicy = "skip",
) -> IdentityDataset:
    """All images of a data set.

    Args:
        data: a name in `NAMES`, or the path of an image folder, a .rec file, the folder that holds train.rec, a folder
            of tar shards or a pattern of their names.
        decoder: size and colours of images that lie on disk.
        on_broken: what becomes of those that cannot be decoded.

    Raises ValueError for an unknown name or a path that is nothing of the kind, and as the readers do.
    """
    images: IdentityDataset
    if data in NAMES:
        images = NAMES[data]()
        images.origin = data
        return images
    found = find_data(data)
    images = EncodedImages(
        found.source,
        found.labels,
        found.names,
        decoder=decoder,
        on_broken=on_broken,
        passed_over=found.passed_over,
    )
    images.origin = as_utf8(str(Path(data).resolve()))  # it goes into files
    return images


def find_data(path: str) -> Labelled:
    """The encoded images at a path, by what lies there; arguments and errors are those of `open_data`."""
    place = Path(path)
    if place.is_dir():
        if (place / "train.rec").exists():
            return read_records(place / "train.rec")
        if any(place.glob("*.tar")):
            return read_shards(path)
        return read_folder(place)
    if place.suffix == ".rec":
        return read_records(place)
    if place.suffix == ".tar" or place.name.endswith(COMPRESSED):
        return read_shards(path)
    raise InputError(f"unknown data set {path!r}; there are: {', '.join(NAMES)}, and paths of {_PATHS}")
