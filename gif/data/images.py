"""Images of identities: what every data set offers, the one whose pixels are in memory, and parts that share images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gif.data.identities import DIGEST_BYTES, Identities, Names
from gif.errors import InputError
from gif.spacing import evenly_spaced
from gif_kernels import checks

SPLIT_BY = "BLAKE2b of each name"  # raise it to refuse runs whose identities were split in another way
_SAMPLE = 8192  # images that tell one data set from another


class IdentityDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Images with the identity each shows, wherever they are: what training, encoding and evaluation read.

    Which identity each image shows is known without reading an image. Indexing gives ``(image uint8 (channels, height,
    width), label int64 ())``. A whole batch is read at once by `batch`, or by a DataLoader; images that cannot be read
    may be missing there, see `broken`. Give a DataLoader ``collate_fn=dataset.collate``: then a batch may be empty.

    Attributes:
        labels: (n,) int64, the identity of each image, in [0, len(names)).
        names: what each identity is called: what it is known by wherever a table has a row an identity.
        origin: the data set's name or path, where it was opened by one.
        splits: how many splits this part is the outcome of.
        computed: images and labels follow from a rule, and nothing is kept that grows with the number of images:
            ``labels`` are made when they are asked for.
    """

    labels: Tensor
    names: Names
    origin = ""
    splits = 0
    computed = False

    @property
    def num_identities(self) -> int:
        """m, the number of names."""
        return len(self.names)

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The readable images (k, c, h, w) of some, in their order, and their labels (k,)."""

    def __getitems__(self, indices: list[int]) -> Sequence[tuple[Tensor, Tensor]]:
        """What a DataLoader asks for: the readable images (c, h, w) of some, each with its label ()."""
        return _Pairs(*self.batch(indices))

    @abstractmethod
    def broken(self, indices: Tensor) -> Tensor:
        """Which of the images at ``indices`` (k,) were found to be unreadable so far, (k,) bool; looks at no image."""

    @abstractmethod
    def of_identities(self, identities: Tensor) -> Self:
        """The images of some identities (k,), numbered from 0 in the order they had; no image is copied."""

    def image_counts(self) -> Tensor:
        """How many images each identity has, (m,) int64."""
        return self.labels.bincount(minlength=self.num_identities)

    def images_between(self, begin: int, end: int) -> Tensor | range:
        """Which images, (k,) int64 or a range, show the identities in [begin, end)."""
        return ((self.labels >= begin) & (self.labels < end)).nonzero().flatten()

    @property
    def image_settings(self) -> dict[str, Any]:
        """The settings that decide, together with its file, which pixels an image has."""
        channels, height, width = self.image_shape
        return {"channels": channels, "height": height, "width": width}

    @property
    def identities(self) -> Identities:
        """Who is in the data set, for what is made of it."""
        return Identities(self.names, self.image_settings, self.origin)

    def summary(self) -> dict[str, Any]:
        """What tells this data set from another at the same place: settings of a run, fit for JSON.

        Digests of all names, of all labels, and of a sample of the images (`digest_images`).
        """
        return {
            "identities": self.num_identities,
            "images": len(self),
            "names": self.names.fingerprint[:16],
            "labels": hashlib.sha256(self.labels.numpy().data).hexdigest()[:16],
            "sample of the images": digest_images(len(self), self._stored),
            "read as": self.image_settings,
        }

    def _stored(self, index: int) -> bytes:
        """An image as it is stored; nothing where it cannot be read."""
        return self[index][0].contiguous().numpy().tobytes()

    def image_batches(self, size: int) -> Iterator[Tensor]:
        """All readable images in their order, of ``size`` at a time, no batch empty."""
        every = range(len(self))
        batches = (self.batch(list(every[begin : begin + size]))[0] for begin in every[::size])
        return (images for images in batches if len(images))

    @staticmethod
    def collate(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A DataLoader's batch, as `batch` gives it: images (k, c, h, w) and labels (k,); k may be 0."""
        if isinstance(pairs, _Pairs):
            return pairs.images, pairs.labels
        images, labels = zip(*pairs, strict=True)
        return torch.stack(images), torch.stack(labels)


class _Pairs(Sequence[tuple[Tensor, Tensor]]):
    """Images (k, c, h, w) with their labels (k,), one by one; of none, whoever wants the first is told why.

    `IdentityDataset.collate` takes them as they are: to take a batch apart and stack it can cost more than reading it.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: Any) -> Any:
        if not len(self):
            raise InputError(
                "none of the images of a batch can be read; give the DataLoader collate_fn=dataset.collate to get an "
                "empty batch, and look at the data set with gif data inspect"
            )
        return self.images[place], self.labels[place]


class ImageTable(IdentityDataset):
    """A data set that keeps a row an image: which of the images that are stored it is, and whom it shows.

    Args:
        labels: (n,) integer, the identity of each image, in [0, len(names)).
        names: what each identity is called.
        rows: (n,) integer, which of ``stored`` images the data set consists of, in its order. Parts of one data set
            share its images through their rows.
        stored: N, how many images there are.

    Raises TypeError for labels or rows that are not integers, ValueError where shapes disagree, a label is outside
    [0, len(names)) or a row outside [0, N).
    """

    def __init__(self, labels: Tensor, names: Sequence[str], rows: Tensor | None, stored: int) -> None:
        rows = torch.arange(stored) if rows is None else rows
        if labels.shape != rows.shape:
            raise InputError(f"labels must be ({len(rows)},), one an image, got {tuple(labels.shape)}")
        self.labels = _whole_numbers("labels", labels, len(names), "number the identities from 0")
        self._rows = _whole_numbers("rows", rows, stored, "name images that there are")
        self.names = Names.of(names)

    def __len__(self) -> int:
        return len(self.labels)

    def of_identities(self, identities: Tensor) -> Self:
        identities = identities.sort().values
        numbers = torch.full((self.num_identities,), -1)
        numbers[identities] = torch.arange(len(identities))
        labels = numbers[self.labels]
        keep = labels >= 0
        part = self._part(labels[keep], self.names.where(numbers >= 0), self._rows[keep])
        part.origin, part.splits = self.origin, self.splits
        return part

    @abstractmethod
    def _part(self, labels: Tensor, names: Names, rows: Tensor) -> Self:
        """A data set of these images of this one."""


class IdentityImages(ImageTable):
    """Images of identities that are pixels in memory, or memory-mapped.

    Args:
        images: (N, channels, height, width) uint8; may be memory-mapped.
        labels: as in `ImageTable`.
        names: as in `ImageTable`.
        rows: as in `ImageTable`; all N images where not given.

    Raises ValueError as `ImageTable` does, and for images of another shape or dtype.
    """

    def __init__(self, images: Tensor, labels: Tensor, names: Sequence[str], rows: Tensor | None = None) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise InputError(f"images must be (n, c, h, w) uint8, got {tuple(images.shape)} {images.dtype}")
        super().__init__(labels, names, rows, len(images))
        self._images = images

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._images.shape[1:]
        return channels, height, width

    @property
    def images(self) -> Tensor:
        """All images, (n, c, h, w), in the order of the labels; of a part a copy: `image_batches` needs less memory."""
        if len(self) == len(self._images) and torch.equal(self._rows, torch.arange(len(self))):
            return self._images
        return self._images[self._rows]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[self._rows[index]], self.labels[index]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self._images[self._rows[indices]], self.labels[indices]

    def broken(self, indices: Tensor) -> Tensor:
        """Return (k,) of False: what is in memory can be read."""
        return torch.zeros(len(indices), dtype=torch.bool)

    def _part(self, labels: Tensor, names: Names, rows: Tensor) -> Self:
        return type(self)(self._images, labels, names, rows)


@dataclass(frozen=True)
class IdentitySplit:
    """Images to train on, and images of other identities to evaluate on; labels count from 0 in each.

    ``sets`` are what to evaluate on, by name, where that is more than the held-out identities, which are one of them.
    """

    train: IdentityDataset
    held_out: IdentityDataset
    sets: Mapping[str, IdentityDataset] = field(default_factory=dict)


Data = TypeVar("Data", bound=IdentityDataset)


def split_identities(data: Data, held_out: float, seed: int) -> tuple[Data, Data]:
    """Split a data set by identity, at random: (the rest, the held-out part), sharing its images.

    An identity's name decides, and the seed: each has a place in [0, 1), the 8-byte BLAKE2b of the name keyed with the
    seed, and those below a fraction are held out, about so many. Whoever else is in the data set moves nobody. Of a
    whole number, those of the lowest places are held out: one identity more can move one. In either case no identity
    that comes makes one that was trained on a held-out one.

    Either part can be split again, by fresh places: the training identities into those to train on and those to
    validate with, or, with a whole number, to take so many identities of a large set.

    Args:
        data: what to split.
        held_out: fraction of the identities in (0, 1), or how many, a whole number from 2.
        seed: decides which.

    Each part gets 2 identities at least, whatever their places. Raises ValueError where the fraction or the number
    leaves fewer than 2 to a part.
    """
    check_held_out(held_out)
    m = data.num_identities
    number = held_out if isinstance(held_out, int) else round(held_out * m)
    if not 2 <= number <= m - 2:
        raise InputError(f"held_out is {held_out}, {number} of {m} identities; both parts need at least 2")
    places = _places(data, seed)
    order = torch.from_numpy(places.argsort(kind="stable"))
    if not isinstance(held_out, int):
        number = min(max(int((places < held_out * 2.0 ** (8 * DIGEST_BYTES)).sum()), 2), m - 2)
    rest, held = data.of_identities(order[number:]), data.of_identities(order[:number])
    rest.splits = held.splits = data.splits + 1
    return rest, held


def some_identities(data: Data, number: int, seed: int = 0) -> Data:
    """So many of a data set's identities, those of the lowest places as in `split_identities`."""
    order = torch.from_numpy(_places(data, seed).argsort(kind="stable"))
    return data.of_identities(order[:number])


def _places(data: IdentityDataset, seed: int) -> np.ndarray:
    """Where each identity lies in [0, 2^64), (m,) uint64: uniform, and a function of its name and the seed.

    After each split the places are fresh ones, or those of a part would all lie on one side.
    """
    return data.names.digests(f"{seed} {data.splits}").numpy().view(np.uint64)


def normalize_pixels(images: Tensor) -> Tensor:
    """(x / 255 - 0.5) / 0.5 of uint8 images: float32 in [-1, 1], the range that every backbone takes."""
    return images.float().div_(127.5).sub_(1)


def digest_images(count: int, read: Callable[[int], bytes]) -> str:
    """16 hexadecimal digits that follow from images as they are stored, ``read(index)`` for an index in [0, count).

    They follow from all of 8,192 at most, and of more from so many at equal distances: a data set that was replaced is
    noticed, one image of a million need not be.
    """
    digest = hashlib.sha256()
    for index in evenly_spaced(count, _SAMPLE):
        stored = read(index)
        digest.update(len(stored).to_bytes(8, "little") + stored)
    return digest.hexdigest()[:16]


def check_held_out(held_out: float) -> None:
    """Raise ValueError unless ``held_out`` is a fraction in (0, 1) or a whole number from 2."""
    if not (held_out >= 2 if isinstance(held_out, int) else 0 < held_out < 1):
        raise InputError(
            f"held_out is {held_out}; give a fraction of the identities between 0 and 1, such as 0.2, or how many"
        )


def _whole_numbers(what: str, values: Tensor, end: int, advice: str) -> Tensor:
    """Check that ``values`` are integers, of any dtype, in [0, end), and return them as int64."""
    if values.dtype not in checks.INTEGER:
        raise TypeError(f"{what} must be an integer tensor, got {values.dtype}; convert it")
    values = values.long()
    checks.within(what, values, end, advice)
    return values
