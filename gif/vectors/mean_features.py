"""Each identity's mean feature: images read part by part of the identities, so that only a part's sums are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gif.data.images import IdentityDataset
from gif.data.workers import batches_of, leave_signals_to_the_command
from gif.distributed import rank, world_size
from gif.encoders.base import AffineMap, Encoder
from gif.errors import InputError
from gif.progress import progress, say_resumed
from gif.resume import UnfinishedWork
from gif_kernels import checks

PART = 1 << 12  # identities whose features are summed at a time

_LABELS = "number the identities from 0, and give their number"
_NAMED_IDENTITIES = 5  # in an error message


@dataclass(frozen=True)
class ImageOrder:
    """Which images this process reads: those of a range of identities, part by part.

    Args:
        dataset: that has them.
        m: its identities.
        bounds: where each process's range of identities begins, and m.
        part: identities of a part.
        places: (n,) int64 or a range, which images, those of one part after another.
        ends: where each part's images end among ``places``.
    """

    dataset: Dataset[tuple[Tensor, Any]]
    m: int
    bounds: Sequence[int]
    part: int
    places: Tensor | range
    ends: Sequence[int]

    @classmethod
    def of(cls, dataset: Dataset[tuple[Tensor, Any]], m: int) -> ImageOrder:
        """The order of ``m`` identities' images; of a dataset that is no `IdentityDataset` all are one part.

        Raises ValueError for an identity without an image, a label outside [0, m), fewer identities than processes, or
        several processes where the dataset has no ``labels``.
        """
        counts = _image_counts(dataset, m)
        if counts is None:
            if world_size() > 1:
                raise InputError(f"{world_size()} processes share the identities; give a dataset with `labels`")
            images = len(dataset)  # type: ignore[arg-type]
            check_counts(torch.full((m,), images))
            return cls(dataset, m, [0, m], m, range(images), [images])
        check_counts(counts)
        bounds = shares(counts)
        begin, end = bounds[rank()], bounds[rank() + 1]
        part = PART if isinstance(dataset, IdentityDataset) else end - begin
        ends = list(accumulate(int(some.sum()) for some in counts[begin:end].split(part)))
        return cls(dataset, m, bounds, part, _places(dataset, begin, end, part), ends)

    @property
    def identities(self) -> range:
        """Whose images they are."""
        return range(self.bounds[rank()], self.bounds[rank() + 1])

    def batches(self, done: int, size: int) -> Iterator[Tensor]:
        """The places from the ``done``-th on, at most ``size`` at a time, and of one part."""
        for part in pairwise([0, *self.ends]):
            for begin in range(*part, size):
                if begin >= done:
                    some = self.places[begin : min(begin + size, part[1])]
                    yield some if isinstance(some, Tensor) else torch.arange(some.start, some.stop)


def _image_counts(dataset: Dataset[tuple[Tensor, Any]], m: int) -> Tensor | None:
    """How many images each of ``m`` identities has, (m,) int64; None where the data set has no labels."""
    if isinstance(dataset, IdentityDataset) and dataset.num_identities == m:
        return dataset.image_counts()
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, Tensor):
        return None
    checks.within("labels", labels, m, _LABELS)
    return labels.bincount(minlength=m)


def check_counts(counts: Tensor, begin: int = 0) -> None:
    """Raise ValueError if any of the identities from ``begin`` on has no image, by their ``counts`` (k,)."""
    missing = (counts == 0).nonzero().flatten() + begin
    if len(missing):
        first = ", ".join(str(label) for label in missing[:_NAMED_IDENTITIES].tolist())
        raise InputError(
            f"{len(missing)} of {len(counts)} identities have no image (first: {first}); number the identities "
            "without gaps, or add their images"
        )


def shares(counts: Tensor) -> list[int]:
    """Where each process's range of identities begins, and the end: ranges with about as many images, none empty."""
    m, processes = len(counts), world_size()
    if m < processes:
        raise InputError(f"{processes} processes share {m} identities; start at most one process an identity")
    if processes == 1:
        return [0, m]
    images = counts.cumsum(0)
    wanted = torch.arange(1, processes) * int(images[-1]) / processes
    bounds = [0, *(torch.searchsorted(images, wanted.long()) + 1).tolist(), m]
    for process in range(1, processes):
        bounds[process] = min(max(bounds[process], bounds[process - 1] + 1), m - (processes - process))
    return bounds


def _places(dataset: Dataset[tuple[Tensor, Any]], begin: int, end: int, part: int) -> Tensor | range:
    """Which images show the identities in [begin, end), those of each ``part`` of them together."""
    if not isinstance(dataset, IdentityDataset):
        labels: Tensor = dataset.labels  # type: ignore[attr-defined]  # it has some
        return ((labels >= begin) & (labels < end)).nonzero().flatten()
    places = dataset.images_between(begin, end)
    if isinstance(places, range) or end - begin <= part:
        return places
    parts = (dataset.labels[places] - begin).div_(part, rounding_mode="floor").int()
    return places if bool((parts[1:] >= parts[:-1]).all()) else places[parts.argsort(stable=True)]


@dataclass(frozen=True)
class Reader:
    """How images are read and encoded, and where what is done is kept.

    Args:
        encoder: that encodes them.
        batch_size: images encoded at once.
        workers: processes that read them.
        pinned: whether they go to a GPU.
        work: where the state is kept.
    """

    encoder: Encoder
    batch_size: int
    workers: int
    pinned: bool
    work: UnfinishedWork

    def mean_features(
        self,
        order: ImageOrder,
        saved: dict[str, Tensor],
        finish: AffineMap | None = None,
        *,
        description: str,
        keep: bool = False,
    ) -> Tensor:
        """The mean feature of each of this process's identities, as ``finish`` maps it where that is given, float32.

        Args:
            order: of the images.
            saved: what an interrupted call has left; empty where there is nothing. It is used up.
            finish: applied to the means of each part.
            description: of the progress.
            keep: leave the state of the end, too.

        Raises ValueError for a label outside [0, m), an identity without a readable image, or features that are not
        finite.
        """
        rows = _Rows(order, finish, saved)
        begun = rows.images
        say_resumed(description, begun, len(order.places), "image")
        with progress(description, len(order.places), "images", done=begun) as advance:
            try:
                for places, batch in zip(
                    order.batches(begun, self.batch_size), batches_of(self._loader(order, begun)), strict=True
                ):
                    self._take(rows, places, *batch)
                    advance(len(places))
                    if self.work.due:
                        self.work.save(rows.state())
            except BaseException:
                if rows.whole:
                    self.work.save(rows.state())
                raise
        if keep and begun < rows.images:
            self.work.save(rows.state())
        return rows.table

    def _loader(self, order: ImageOrder, done: int) -> DataLoader[Any]:
        return DataLoader(
            order.dataset,
            batch_sampler=(batch.tolist() for batch in order.batches(done, self.batch_size)),
            num_workers=self.workers,
            collate_fn=getattr(order.dataset, "collate", None),
            pin_memory=self.pinned,
            worker_init_fn=leave_signals_to_the_command,
        )

    def _take(self, rows: _Rows, places: Tensor, images: Tensor, labels: Tensor) -> None:
        """Add a batch that was to hold the images at ``places``; those that are broken it does not."""
        done, dataset = rows.images + len(places), rows.order.dataset
        if isinstance(dataset, IdentityDataset):
            places = places[~dataset.broken(places)]
        features = self.encoder(images).cpu() if len(places) else None
        rows.add(features, labels, places, done)


class _Rows:
    """The rows of this process's identities over the first ``images`` images, and the sums of the part in work.

    ``whole`` says that there is something new, and nothing half added.
    """

    def __init__(self, order: ImageOrder, finish: AffineMap | None, saved: dict[str, Tensor]) -> None:
        self.order, self.whole = order, False
        self.images = int(saved.get("images", 0))
        self._finish = finish
        self._table: Tensor | None = None  # its width is known with the first features
        self._filled = 0
        if "rows" in saved:
            self._append(saved.pop("rows"))  # not to be held twice
        self._sums = saved.get("sums")
        self._counts = saved.get("counts", self._no_counts())

    @property
    def table(self) -> Tensor:
        """The rows, (k, d); once all images are read."""
        assert self._table is not None  # every part has images
        return self._table

    def add(self, features: Tensor | None, labels: Tensor, places: Tensor, done: int) -> None:
        """Add features (n, e) of the images at ``places`` (n,), all of one part, which show identities ``labels`` (n,).

        ``done`` images, some of which may be broken, are behind us then. No features where all of a batch are broken.
        """
        if features is not None:
            self._check(features, labels, places)
        self.whole = False
        if features is not None:
            if self._sums is None:
                self._sums = torch.zeros(len(self._counts), features.shape[1], dtype=torch.float64)
            labels = labels.long() - self._first
            self._sums.index_add_(0, labels, features.double())
            self._counts.index_add_(0, labels, torch.ones_like(labels))
        if done == self.order.ends[self._filled // self.order.part]:
            self._close()
        self.images, self.whole = done, True

    def state(self) -> dict[str, Tensor]:
        """What continues from here."""
        state = {} if self._finish is None else self._finish.tensors()
        if self._table is not None:
            state["rows"] = self._table[: self._filled]
        if self._sums is not None:
            state |= {"sums": self._sums, "counts": self._counts}
        return {**state, "images": torch.tensor(self.images)}

    @property
    def _first(self) -> int:
        """The first identity of the part in work."""
        return self.order.identities[0] + self._filled

    def _no_counts(self) -> Tensor:
        return torch.zeros(min(self.order.part, len(self.order.identities) - self._filled), dtype=torch.int64)

    def _check(self, features: Tensor, labels: Tensor, places: Tensor) -> None:
        if features.ndim != 2 or len(features) != len(labels):
            raise InputError(f"the encoder must give ({len(labels)}, e) features, got {tuple(features.shape)}")
        checks.within("labels", labels, self.order.m, _LABELS)
        if bool(features.sum().isfinite()):  # as of nearly all batches, and then all of it is
            return
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise InputError(
                f"features of images {int(places[0])} to {int(places[-1])} hold NaN or infinity, first in image "
                f"{int(places[bad[0]])}; check that image and the encoder's weights"
            )

    def _close(self) -> None:
        """Turn the sums of the part in work into rows."""
        check_counts(self._counts, self._first)
        assert self._sums is not None  # every identity has an image
        means = self._sums.div_(self._counts[:, None]).float()
        self._append(means if self._finish is None else self._finish(means))
        self._counts = self._no_counts()
        self._sums = self._sums.zero_()[: len(self._counts)] if len(self._counts) else None

    def _append(self, rows: Tensor) -> None:
        every = len(self.order.identities)
        if self._table is None:
            self._table = rows if len(rows) == every else rows.new_empty(every, rows.shape[1])
        if rows is not self._table:
            self._table[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)
