"""Pairs of images for verification: the field's .bin files, and the text files that name pairs."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gif.data.bare_pickle import Array, interpret, type_name
from gif.data.decoding import SUFFIXES, BrokenImageError, ImageDecoder
from gif.data.listing import Tally, read_text
from gif.errors import InputError
from gif.files import atomic_path, existing_file
from gif.progress import progress


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """Encoded images, pair i in 2i and 2i + 1, and whether the two show one identity, (n,) bool."""

    encoded: list[bytes]
    issame: Tensor

    def batches(self, size: int, decoder: ImageDecoder = ImageDecoder()) -> Iterator[Tensor]:  # noqa: B008 (frozen)
        """All images in their order, (b, c, h, w) uint8, ``size`` at a time, the last batch smaller.

        Raises BrokenImageError: a protocol's pairs are all or none.
        """
        for places in torch.arange(len(self.encoded)).split(size):
            yield torch.stack([self.image(place, decoder) for place in places.tolist()])

    def check(self, decoder: ImageDecoder = ImageDecoder()) -> None:  # noqa: B008 (frozen)
        """Decode all images once. Raises BrokenImageError that names them: pairs are all or none."""
        broken, first = Tally(), ""
        with progress("looking at pairs", len(self.encoded), "images") as advance:
            for place in range(len(self.encoded)):
                try:
                    self.image(place, decoder)
                except BrokenImageError as error:
                    broken.add(f"image {place % 2} of pair {place // 2}")
                    first = first or str(error)
                advance(1)
        if broken.number:
            raise BrokenImageError(f"{first}; of {len(self.encoded):,} images are broken: {broken}")

    def image(self, place: int, decoder: ImageDecoder = ImageDecoder()) -> Tensor:  # noqa: B008 (frozen)
        """Image ``place`` in [0, 2n), (c, h, w) uint8. Raises BrokenImageError."""
        try:
            return decoder(self.encoded[place])
        except BrokenImageError as error:
            raise BrokenImageError(f"image {place % 2} of pair {place // 2} is broken: {error}") from error


def read_bin(path: str | Path) -> ImagePairs:
    """The pairs of a verification .bin file: LFW, CFP-FP, AgeDB and their like, as insightface hands them around.

    Such a file is a pickle, by Python 2 or 3, of (images, issame): images as bytes or uint8 arrays, two a pair. It is
    not unpickled: lists, bytes, numbers and arrays are read from it, and nothing that it names is called.

    Raises FileNotFoundError, or ValueError where it is damaged or holds anything else.
    """
    path = existing_file(path)
    try:
        content = interpret(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged, or no verification .bin file: {error}; copy or make it again") from error
    parts = _sequence(content)
    images, issame = map(_sequence, parts) if parts is not None and len(parts) == 2 else (None, None)
    if images is None or issame is None:
        raise InputError(f"{path} holds no two lists, images and truth values; give a verification .bin file")
    if len(images) != 2 * len(issame) or not len(issame):
        raise InputError(f"{path} has {len(images)} images and {len(issame)} truth values; wanted 2n and n > 0")
    encoded = []
    for place, image in enumerate(images):
        data = image.value if isinstance(image, Array) else image
        if not isinstance(data, bytes):
            raise InputError(f"{path}: image {place} is a {type_name(image)}, wanted bytes or a uint8 array (k,)")
        encoded.append(data)
    for place, same in enumerate(issame):
        if not isinstance(same, int) or same not in (0, 1):
            found = repr(same) if isinstance(same, int | None) else f"a {type_name(same)}"
            raise InputError(f"{path}: truth value {place} is {found}, wanted true or false")
    return ImagePairs(encoded, torch.tensor([bool(same) for same in issame]))


def _sequence(value: Any) -> Sequence[Any] | None:
    """The elements of a list, a tuple or an array of `interpret`; None where a value is none of them."""
    if isinstance(value, Array):
        return value.value
    return value if isinstance(value, list | tuple) else None


def write_bin(path: str | Path, pairs: Iterable[tuple[Path, Path, bool]], total: int) -> None:
    """Write pairs of image files, and whether they show one identity, as a verification .bin file, atomically.

    The files' bytes go into it as they are. Raises FileNotFoundError for a missing image.
    """
    encoded, issame = [], []
    with progress("reading pairs", total, "pairs") as advance:
        for first, second, same in pairs:
            encoded += [existing_file(first).read_bytes(), existing_file(second).read_bytes()]
            issame.append(same)
            advance(1)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        pickle.dump((encoded, issame), file, protocol=4)


def read_pairs(path: str | Path, root: Path) -> list[tuple[Path, Path, bool]]:
    """The pairs that a text file names, of images below ``root``.

    A line is "file file 0|1", two paths below root and 1 for one identity; or as LFW's pairs.txt has it: "name i j" for
    images i and j of a name, "name i other j" for two names, with files name/name_0001.jpg, after a line of counts.
    Fields are separated by tabs where a line has one, otherwise by blanks.

    Raises FileNotFoundError, or ValueError for another line.
    """
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        match line.split("\t") if "\t" in line else line.split():
            case []:
                pass
            case [name, first, second] if first.isdecimal() and second.isdecimal():
                pairs.append((_lfw(root, name, first), _lfw(root, name, second), True))
            case [name, first, other, second] if first.isdecimal() and second.isdecimal():
                pairs.append((_lfw(root, name, first), _lfw(root, other, second), False))
            case [first, second, "0" | "1" as same]:
                pairs.append((root / first, root / second, same == "1"))
            case fields if number == 1 and all(field.isdecimal() for field in fields):
                pass  # LFW's counts
            case _:
                raise InputError(
                    f"{path}, line {number}: {line[:80]!r}; wanted 'file file 0|1', 'name i j' or 'name i other j'"
                )
    if not pairs:
        raise InputError(f"{path} names no pair")
    return pairs


def _lfw(root: Path, name: str, number: str) -> Path:
    stem = root / name / f"{name}_{int(number):04d}"
    paths = [stem.with_name(stem.name + ending) for ending in SUFFIXES]
    return next((path for path in paths if path.exists()), paths[0])
