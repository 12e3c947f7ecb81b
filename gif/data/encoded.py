"""Encoded images that lie on disk, as a data set: decoded when they are looked at, broken ones counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gif.data.decoding import BrokenImageError, ImageDecoder
from gif.data.identities import Names
from gif.data.images import IdentityDataset, ImageTable
from gif.data.listing import Tally
from gif.data.shared_memory import check_workers, shared_flags
from gif.data.workers import batches_of, leave_signals_to_the_command
from gif.errors import InputError
from gif.progress import progress
from gif.spacing import evenly_spaced
from gif_kernels import checks

BrokenPolicy = Literal["skip", "raise"]
BLOCK = 1 << 20  # images that are asked about at once
ALL_BROKEN = 8  # images, none of which can be read: then it is not the images
_BATCH = ALL_BROKEN - 1  # of more, being all broken is an error


class EncodedSource(Protocol):
    """N encoded images (JPEG, PNG, WebP), read by any number of processes, forked or spawned."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """Image ``row`` in [0, N) as it is stored. Raises ValueError or OSError where that is damaged."""
        ...

    def place(self, row: int) -> str:
        """Where image ``row`` lies, for messages."""
        ...

    def fingerprint(self) -> str:
        """Digits that follow from which images these are."""
        ...


@dataclass(frozen=True)
class Labelled:
    """A source with the identity of each of its images: labels (N,) int64 into names.

    ``passed_over`` has a line for each kind of thing that its reader left out, with their number and the first names.
    """

    source: EncodedSource
    labels: Tensor
    names: Sequence[str]
    passed_over: tuple[str, ...] = ()


class EncodedImages(ImageTable):
    """Images of identities that are decoded when they are looked at.

    Args:
        source: where they lie.
        labels: as in `ImageTable`.
        names: as in `ImageTable`.
        rows: as in `ImageTable`.
        decoder: what size and colours they get.
        on_broken: "skip" leaves an image that cannot be decoded out of its batch, and notes it (see `broken`); "raise"
            raises BrokenImageError, as "skip" does where all of a batch (of at least 8) are broken.
        notes: (N,) bool in shared memory, the broken images found so far, by whichever process; fresh if not given.
        passed_over: what the reader left out, a line for each kind.

    A single index raises BrokenImageError for a broken image under either policy. Raises ValueError as
    `ImageTable` does, and for an unknown policy.
    """

    def __init__(
        self,
        source: EncodedSource,
        labels: Tensor,
        names: Sequence[str],
        rows: Tensor | None = None,
        *,
        decoder: ImageDecoder = ImageDecoder(),  # noqa: B008 (frozen)
        on_broken: BrokenPolicy = "skip",
        notes: Tensor | None = None,
        passed_over: Sequence[str] = (),
    ) -> None:
        super().__init__(labels, names, rows, len(source))
        checks.choice("on_broken", on_broken, get_args(BrokenPolicy))
        self.source, self.decoder, self.on_broken = source, decoder, on_broken
        self.passed_over = tuple(passed_over)
        # A flag an image needs no lock: whoever finds it broken writes the same byte.
        self._notes = shared_flags(len(source)) if notes is None else notes
        self._kept: Tensor | None = None
        self._is_kept = torch.empty(0, dtype=torch.bool)

    def keep(self, most: int) -> bool:
        """Keep each image once it is decoded, in this process's memory, where all take ``most`` bytes together at most.

        For who reads them again and again. Returns whether they are kept.
        """
        if len(self) * math.prod(self.image_shape) > most:
            return False
        self._kept = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        self._is_kept = torch.zeros(len(self), dtype=torch.bool)
        return True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.decoder.channels, self.decoder.size, self.decoder.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = int(self._rows[index])
        if self._kept is not None and self._is_kept[index]:
            return self._kept[index], self.labels[index]
        try:
            image = self.decoder(self.source.read(row))
        except (ValueError, OSError) as error:
            self._notes[row] = True
            raise BrokenImageError(
                f"{self.source.place(row)} is a broken image: {error}; remove or replace it"
            ) from error
        self._notes[row] = False
        if self._kept is not None:
            self._kept[index], self._is_kept[index] = image, True
        return image, self.labels[index]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, kept, failed = [], [], 0
        for index in indices:
            try:
                images.append(self[index][0])
                kept.append(index)
            except BrokenImageError:
                failed += 1
                if self.on_broken == "raise" or failed == len(indices) >= ALL_BROKEN:
                    raise
        empty = torch.empty(0, *self.image_shape, dtype=torch.uint8)
        return torch.stack(images) if images else empty, self.labels[kept]

    def broken(self, indices: Tensor) -> Tensor:
        return self._notes[self._rows[indices]]

    def encoded(self, index: int) -> bytes:
        """Image ``index`` as it is stored. Raises ValueError or OSError where that is damaged."""
        return self.source.read(int(self._rows[index]))

    def place(self, index: int) -> str:
        """Where image ``index`` lies."""
        return self.source.place(int(self._rows[index]))

    @property
    def image_settings(self) -> dict[str, Any]:
        settings = {"channels": self.decoder.channels, "size": self.decoder.size, "fit": self.decoder.fit}
        return settings if self.decoder.align is None else settings | {"align": self.decoder.align.__qualname__}

    def _stored(self, index: int) -> bytes:
        return stored(self.source, int(self._rows[index]))

    def _part(self, labels: Tensor, names: Names, rows: Tensor) -> Self:
        return type(self)(
            self.source,
            labels,
            names,
            rows,
            decoder=self.decoder,
            on_broken=self.on_broken,
            notes=self._notes,
            passed_over=self.passed_over,
        )

    def check_readable(self) -> None:
        """Raise ValueError if of a few images, evenly spaced, none can be decoded: then something is wrong with all."""
        reason = None
        for index in evenly_spaced(len(self), ALL_BROKEN):
            try:
                self[index]
                return
            except BrokenImageError as error:
                reason = error
        if reason:
            raise InputError(f"none of {min(ALL_BROKEN, len(self))} images that were tried can be decoded; {reason}")


def stored(source: EncodedSource, row: int) -> bytes:
    """An image as it is stored; nothing where it cannot be read: whoever needs it says so."""
    try:
        return source.read(row)
    except (ValueError, OSError):
        return b""


def check_identities(data: EncodedImages, indices: Tensor, workers: int = 0) -> None:
    """Raise ValueError, with their names, if of identities that some images (k,) show there are any without a readable
    one: work that needs each would fail at its end. Of most identities one image is read."""
    nobody, why = Tally(), ""
    left = indices
    while len(left):
        labels, of_label = data.labels[left].unique(return_inverse=True)
        places = torch.full(labels.shape, len(left))
        first = left[places.scatter_reduce_(0, of_label, torch.arange(len(left)), "amin")]
        read_all(data, first, workers, "looking at an image of each identity")
        unread = data.broken(first)
        left = left[torch.isin(data.labels[left], labels[unread]) & ~torch.isin(left, first)]
        for label in labels[unread & ~torch.isin(labels, data.labels[left])].tolist():
            why = why or _why_broken(data, int(indices[data.labels[indices] == label][0]))
            nobody.add(data.names[label])
    if nobody.number:
        raise InputError(
            f"identities without an image that can be read: {nobody}; replace their images, or remove the identities "
            f"({why})"
        )


def _why_broken(data: EncodedImages, index: int) -> str:
    """Where a broken image lies, and what is wrong with it."""
    try:
        data.decoder(data.encoded(index))
    except (ValueError, OSError) as error:
        return f"{data.place(index)}: {error}"
    return data.place(index)


def read_all(data: EncodedImages, indices: Tensor, workers: int, description: str) -> None:
    """Decode some images (k,), so that `EncodedImages.broken` knows of each."""
    check_workers(workers, _BATCH, data.image_shape)
    batches = indices.split(_BATCH)
    loader = DataLoader(
        data,
        batch_sampler=(batch.tolist() for batch in batches),
        num_workers=workers,
        collate_fn=data.collate,
        worker_init_fn=leave_signals_to_the_command,
        generator=torch.Generator(),
    )
    with progress(description, len(indices), "images") as advance:
        for batch, _ in zip(batches, batches_of(loader), strict=True):
            advance(len(batch))


def broken_report(data: IdentityDataset) -> str | None:
    """The images of a data set that were found broken so far, in a line; in another the identities of which all are.

    None where there are none.
    """
    found = torch.cat([data.broken(block) for block in _indices(len(data))] or [torch.zeros(0, dtype=torch.bool)])
    if not found.any():
        return None
    places = Tally.of(
        data.place(index) if isinstance(data, EncodedImages) else str(index)
        for index in found.nonzero().flatten().tolist()
    )
    report = f"{places.number:,} of {len(data):,} images are broken and were left out: {places.names}"
    counts = data.labels.bincount(minlength=data.num_identities)
    gone = (counts > 0) & (data.labels[found].bincount(minlength=data.num_identities) == counts)
    if gone.any():
        nobody = Tally.of(data.names[label] for label in gone.nonzero().flatten().tolist())
        report += f"\n{nobody.number:,} identities have no image that can be read: {nobody.names}"
    return report


def _indices(count: int) -> Iterator[Tensor]:
    """0 to ``count``, some at a time: all of 200 million would be 1.6 GB."""
    return (torch.arange(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK))


def left_out(data: IdentityDataset) -> str | None:
    """All that is not in a data set and might be meant to: `broken_report`, and what its reader passed over.

    None where there is nothing.
    """
    passed_over = data.passed_over if isinstance(data, EncodedImages) else ()
    return "\n".join(line for line in (broken_report(data), *passed_over) if line) or None
