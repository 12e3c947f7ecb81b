"""Images of identities: what every data set offers, the one whose pixels are in memory, and parts that share images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gif.errors import InputError


class IdentityDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """Images with the identity each shows, wherever they are: what training, encoding and evaluation read.

    Which identity each image shows is known without reading an image. Indexing gives ``(image uint8 (channels, height,
    width), label int64 ())``. A whole batch is read at once by `batch`, or by a DataLoader; images that cannot be read
    may be missing there, see `broken`. Give a DataLoader ``collate_fn=dataset.collate``: then a batch may be empty.

    Args:
        labels: (n,) integer, the identity of each image, in [0, len(names)).
        names: what each identity is called, for people and pictures.
        rows: (n,) integer, which of ``stored`` images the data set consists of, in its order. Parts of one data set
            share its images through their rows.
        stored: N, how many images there are.

    Raises ValueError where shapes disagree, a label is outside [0, len(names)) or a row outside [0, N).
    """

    def __init__(self, labels: Tensor, names: Sequence[str], rows: Tensor | None, stored: int) -> None:
        rows = torch.arange(stored) if rows is None else rows.long()
        if labels.shape != rows.shape:
            raise InputError(f"labels must be ({len(rows)},), one an image, got {tuple(labels.shape)}")
        _check_range("labels", labels, len(names), "number the identities from 0")
        _check_range("rows", rows, stored, "name images that there are")
        self._rows = rows
        self.labels = labels.long()
        self.names = list(names)

    @property
    def num_identities(self) -> int:
        return len(self.names)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The readable images (k, c, h, w) of some, in their order, and their labels (k,)."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """What a DataLoader asks for: the readable images (c, h, w) of some, each with its label ()."""
        return _Pairs(zip(*self.batch(indices), strict=True))

    @abstractmethod
    def broken(self, indices: Tensor) -> Tensor:
        """Which of the images at ``indices`` (k,) were found to be unreadable so far, (k,) bool; looks at no image."""

    @abstractmethod
    def _part(self, labels: Tensor, names: list[str], rows: Tensor) -> Self:
        """A data set of these images of this one."""

    def image_batches(self, size: int) -> Iterator[Tensor]:
        """All readable images in their order, of ``size`` at a time, no batch empty."""
        batches = (self.batch(indices.tolist())[0] for indices in torch.arange(len(self)).split(size))
        return (images for images in batches if len(images))

    def of_identities(self, identities: Tensor) -> Self:
        """The images of some identities (k,), numbered from 0 in the order they had; no image is copied."""
        identities = identities.sort().values
        numbers = torch.full((self.num_identities,), -1)
        numbers[identities] = torch.arange(len(identities))
        labels = numbers[self.labels]
        keep = labels >= 0
        return self._part(labels[keep], [self.names[i] for i in identities.tolist()], self._rows[keep])

    def collate(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A DataLoader's batch, as `batch` gives it: images (k, c, h, w) and labels (k,); k may be 0."""
        if not len(pairs):
            return torch.empty(0, *self.image_shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        images, labels = zip(*pairs, strict=True)
        return torch.stack(images), torch.stack(labels)


class _Pairs(list[tuple[Tensor, Tensor]]):
    """Images with their labels; where there are none, whoever wants the first is told why."""

    def __getitem__(self, place: Any) -> Any:
        if not len(self):
            raise InputError(
                "none of the images of a batch can be read; give the DataLoader collate_fn=dataset.collate to get an "
                "empty batch, and look at the data set with gif data inspect"
            )
        return super().__getitem__(place)


class IdentityImages(IdentityDataset):
    """Images of identities that are pixels in memory, or memory-mapped.

    Args:
        images: (N, channels, height, width) uint8; may be memory-mapped.
        labels, names, rows: as in `IdentityDataset`; all N images where ``rows`` are not given.

    Raises ValueError as `IdentityDataset` does, and for images of another shape or dtype.
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
        """None: (k,) of False."""
        return torch.zeros(len(indices), dtype=torch.bool)

    def _part(self, labels: Tensor, names: list[str], rows: Tensor) -> Self:
        return type(self)(self._images, labels, names, rows)


@dataclass(frozen=True)
class IdentitySplit:
    """Images to train on, and images of other identities to evaluate on; labels count from 0 in each."""

    train: IdentityDataset
    held_out: IdentityDataset


Data = TypeVar("Data", bound=IdentityDataset)


def split_identities(data: Data, held_out: float, seed: int) -> tuple[Data, Data]:
    """Split a data set by identity, at random: (the rest, the held-out part), sharing its images.

    Either part can be split again: the training identities into those to train on and those to validate with, or, with
    a whole number, to take so many identities of a large set.

    Args:
        data: what to split.
        held_out: fraction of the identities in (0, 1), or how many, a whole number from 2.
        seed: decides which.

    Raises ValueError unless both parts get at least 2 identities.
    """
    check_held_out(held_out)
    number = held_out if isinstance(held_out, int) else round(held_out * data.num_identities)
    if not 2 <= number <= data.num_identities - 2:
        raise InputError(
            f"held_out is {held_out}, {number} of {data.num_identities} identities; both parts need at least 2"
        )
    order = torch.randperm(data.num_identities, generator=torch.Generator().manual_seed(seed))
    return data.of_identities(order[number:]), data.of_identities(order[:number])


def check_held_out(held_out: float) -> None:
    """Raise ValueError unless ``held_out`` is a fraction in (0, 1) or a whole number from 2."""
    if not (held_out >= 2 if isinstance(held_out, int) else 0 < held_out < 1):
        raise InputError(
            f"held_out is {held_out}; give a fraction of the identities between 0 and 1, such as 0.2, or how many"
        )


def _check_range(what: str, values: Tensor, end: int, advice: str) -> None:
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < end):
        raise InputError(f"{what} must lie in [0, {end}), got [{int(values.min())}, {int(values.max())}]; {advice}")
