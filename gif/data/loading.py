"""A data set by its name or its path, split into identities to train on and held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gif.data.decoding import ImageDecoder
from gif.data.encoded import BrokenPolicy, EncodedImages, Labelled
from gif.data.folder import read_folder
from gif.data.glyphs import all_glyphs, all_glyphs_80k, glyph_word_sets, glyph_words
from gif.data.glyphs.word_sets import HEADLINE, IDENTITIES, SETS
from gif.data.images import IdentityDataset, IdentitySplit, check_held_out, some_identities, split_identities
from gif.data.listing import as_utf8, printable
from gif.data.records import read_records
from gif.data.shards import COMPRESSED, read_shards
from gif.errors import InputError, MissingFileError

HELD_OUT = 0.2
"""The share of the identities that is held out, where none is said."""
WORDS = {"glyph-words": 32, "glyph-words-64": 64}
"""Data sets of words of two glyphs, of as many identities as are asked for, and their size in pixels."""


def _word_set(name: str, size: int) -> IdentityDataset:
    return glyph_word_sets(size=size)[name]


NAMES: dict[str, Callable[[], IdentityDataset]] = {
    "glyphs": all_glyphs,
    "glyphs-80k": all_glyphs_80k,
    "glyphs-80k-64": partial(all_glyphs_80k, size=64),
    **{f"{words}-{name}": partial(_word_set, name, size) for words, size in WORDS.items() for name in SETS},
}
"""Data sets that are made here: drawn by matplotlib's fonts, by Debian's in 32 and in 64 pixels; words that judge."""
_PATHS = (
    "a folder with a folder an identity, a .rec file or the folder of train.rec, tar shards ('shards/{000..127}.tar')"
)


def load_data(
    data: str,
    *,
    identities: float | None = None,
    held_out: float = HELD_OUT,
    seed: int = 0,
    decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (frozen)
    on_broken: BrokenPolicy = "skip",
) -> IdentitySplit:
    """A data set, split by identity into a part to train on and a held-out one.

    Args:
        data: a name in `WORDS` or `NAMES`, or a path as for `open_data`.
        identities: how many of the data set's there are, at random, in the two parts alike; all where not given. Of
            `WORDS` how many there are to train on.
        held_out: fraction of the identities to hold out, or how many; 0 trains on all, 1 holds all out. `WORDS` are
            split by letter: there is no other number.
        seed: decides which identities are held out; which words there are.
        decoder: of images that lie on disk, as for `open_data`; glyphs are drawn in their set's own size.
        on_broken: as for `open_data`.

    Raises ValueError for an unknown name, more identities than there are, or where none of a few images can be decoded;
    and as `open_data` and `split_identities` do; FileNotFoundError where fonts are missing.
    """
    if data in WORDS and held_out not in (0, 1, HELD_OUT):
        raise InputError(
            f"held_out is {held_out}, and {data} is split by letter, whatever the number of its identities; leave it "
            "out, or give 0 for nothing to judge by"
        )
    if held_out not in (0, 1):
        check_held_out(held_out)
    if held_out in (0, 1) or data in WORDS:
        images = open_data(data, identities=identities, seed=seed, decoder=decoder, on_broken=on_broken)
    else:
        images = open_data(data, decoder=decoder, on_broken=on_broken)
    if isinstance(images, EncodedImages):
        images.check_readable()
    if held_out in (0, 1):
        nobody = images.of_identities(torch.empty(0, dtype=torch.int64))
        return IdentitySplit(images, nobody) if held_out == 0 else IdentitySplit(nobody, images)
    if data in WORDS:
        sets = {name: open_data(f"{data}-{name}") for name in SETS}
        return IdentitySplit(images, sets[HEADLINE], sets)
    train, judged = split_identities(images, held_out, seed)
    if identities is not None:
        share = _number_of(images, identities) / images.num_identities
        train, judged = (_some(part, max(2, round(share * part.num_identities)), seed) for part in (train, judged))
    return IdentitySplit(train, judged)


def open_data(
    data: str,
    *,
    identities: float | None = None,
    seed: int = 0,
    decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (frozen)
    on_broken: BrokenPolicy = "skip",
) -> IdentityDataset:
    """All images of a data set, or those of some identities.

    Args:
        data: a name in `WORDS` or `NAMES`, or the path of an image folder, a .rec file, the folder that holds
            train.rec, a folder of tar shards or a pattern of their names.
        identities: how many of the data set's there are, at random; all where not given, a million of `WORDS`.
        seed: decides which.
        decoder: size and colours of images that lie on disk.
        on_broken: what becomes of those that cannot be decoded.

    Raises ValueError for an unknown name or a path that is nothing of the kind, more identities than there are, and as
    the readers do.
    """
    if data in WORDS:
        number = IDENTITIES if identities is None else _whole(identities)
        images: IdentityDataset = glyph_words(number, size=WORDS[data], seed=seed)
        images.origin = data
        return images
    images = _open_all(data, decoder, on_broken)
    return images if identities is None else _some(images, _number_of(images, identities), seed)


def _open_all(data: str, decoder: ImageDecoder, on_broken: BrokenPolicy) -> IdentityDataset:
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


def _some(images: IdentityDataset, number: int, seed: int) -> IdentityDataset:
    if number >= images.num_identities:
        return images
    some = some_identities(images, number, seed)
    some.splits = images.splits + 1  # a part can be split again, by other places
    return some


def _number_of(images: IdentityDataset, identities: float) -> int:
    """So many of a data set's identities."""
    number = _whole(identities)
    if number > images.num_identities:
        raise InputError(f"identities is {number:,}, and {images.origin} has {images.num_identities:,}; give fewer")
    return number


def _whole(identities: float) -> int:
    """A number of identities, which may be written as 1e6."""
    if identities != int(identities) or identities < 2:
        raise InputError(f"identities is {identities:g}; give a whole number from 2")
    return int(identities)


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
    if not place.exists() and len(place.parts) > 1:
        raise MissingFileError(f"no file or folder {printable(path)}; give the path of {_PATHS}")
    raise InputError(f"unknown data set {path!r}; there are: {', '.join([*NAMES, *WORDS])}, and paths of {_PATHS}")
