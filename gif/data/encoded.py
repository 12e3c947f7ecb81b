"""Encoded images that lie on disk, as a data set: decoded when they are looked at, broken ones counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from gif.data.decoding import BrokenImageError, ImageDecoder
from gif.data.identities import Names
from gif.data.images import IdentityDataset
from gif.errors import InputError

BrokenPolicy = Literal["skip", "raise"]
ALL_BROKEN = 8  # images, none of which can be read: then it is not the images
_NAMED = 3  # broken images in a message


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
    """A source with the identity of each of its images: labels (N,) int64 into names."""

    source: EncodedSource
    labels: Tensor
    names: Sequence[str]


class EncodedImages(IdentityDataset):
    """Images of identities that are decoded when they are looked at.

    Args:
        source: where they lie.
        labels, names, rows: as in `IdentityDataset`.
        decoder: what size and colours they get.
        on_broken: "skip" leaves an image that cannot be decoded out of its batch, and notes it (see `broken`); "raise"
            raises BrokenImageError, as "skip" does where all of a batch (of at least 8) are broken.
        notes: (N,) bool in shared memory, the broken images found so far, by whichever process; fresh if not given.

    A single index raises BrokenImageError for a broken image under either policy. Raises ValueError as
    `IdentityDataset` does, and for an unknown policy.
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
    ) -> None:
        super().__init__(labels, names, rows, len(source))
        if on_broken not in ("skip", "raise"):
            raise InputError(f"on_broken must be 'skip' or 'raise', got {on_broken!r}")
        self.source, self.decoder, self.on_broken = source, decoder, on_broken
        # A flag an image needs no lock: whoever finds it broken writes the same byte.
        self._notes = torch.zeros(len(source), dtype=torch.bool).share_memory_() if notes is None else notes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.decoder.channels, self.decoder.size, self.decoder.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = int(self._rows[index])
        try:
            image = self.decoder(self.source.read(row))
        except (ValueError, OSError) as error:
            self._notes[row] = True
            raise BrokenImageError(
                f"{self.source.place(row)} is a broken image: {error}; remove or replace it"
            ) from error
        self._notes[row] = False
        return image, self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
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

    def place(self, index: int) -> str:
        """Where image ``index`` lies."""
        return self.source.place(int(self._rows[index]))

    @property
    def image_settings(self) -> dict[str, Any]:
        return {"channels": self.decoder.channels, "size": self.decoder.size, "fit": self.decoder.fit}

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
        )

    def check_readable(self) -> None:
        """Raise ValueError if of a few images, evenly spaced, none can be decoded: then something is wrong with all."""
        reason = None
        for index in torch.linspace(0, len(self) - 1, min(ALL_BROKEN, len(self))).long().tolist():
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


def broken_report(data: IdentityDataset) -> str | None:
    """One line on the images of a data set that were found broken so far; None where there are none."""
    found = data.broken(torch.arange(len(data))).nonzero().flatten().tolist()
    if not found:
        return None
    places = [data.place(index) if isinstance(data, EncodedImages) else str(index) for index in found[:_NAMED]]
    more = ", ..." if len(found) > _NAMED else ""
    return f"{len(found):,} of {len(data):,} images are broken and were left out: {', '.join(places)}{more}"
