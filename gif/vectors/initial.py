"""Code vectors before spreading: each identity's mean feature under a frozen encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gif.data.encoded import EncodedImages, check_identities, left_out
from gif.data.images import IdentityDataset
from gif.data.shared_memory import check_workers
from gif.data.workers import batches_of, leave_signals_to_the_command
from gif.distributed import gather_rows, rank, world_size
from gif.encoders.base import Encoder
from gif.errors import InputError
from gif.progress import progress, say
from gif.resume import UnfinishedWork, own_file
from gif.vectors.store import CodeVectors
from gif_kernels import checks

_LABELS = "number the identities from 0, and give their number"
CHECKPOINT_FORMAT = "gif.initial_checkpoint/1"
_NAMED_IDENTITIES = 5  # in an error message
_GATHERED_ROWS = 1 << 16  # of each process at a time


def initial_code_vectors(
    dataset: Dataset[tuple[Tensor, Any]],
    encoder: Encoder,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    num_identities: int | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    device: str | torch.device = "cpu",
) -> CodeVectors:
    """Code vectors h_y = normalise(finish(mean over y's images of E(image))), in one pass over ``dataset``.

    Features are summed an identity in float64, whose rounding is far below that of the float32 features: the order
    of the images does not matter, nor how many an identity has. Images are never kept; the sums take m * e * 8 bytes
    (e: width of the encoder's features) on the CPU, and the means half as much again at the end.

    In a `torch.distributed` process group, all processes call this with the same arguments and get the same vectors.
    Each encodes the images of a range of identities, and sums only these; the ranges have about as many images.

    Args:
        dataset: of (image (1 or 3, h, w) uint8, label), labels in [0, m), with a length. If it has a ``collate``, as
            every `IdentityDataset` does, batches are made with it. Its broken images are left out, and counted.
        encoder: the frozen E; `PixelEncoder` needs no weights.
        batch_size: images encoded at once, >= 1.
        num_workers: processes that read images, for each process that encodes.
        num_identities: m; None takes ``dataset.num_identities``.
        checkpoint: file kept once a minute and on interruption; a later call with the same arguments continues from it
            to the same result, and removes it when done; with another encoder, other identities or images (see
            `IdentityDataset.summary`) it is refused. Each of several processes keeps its own, named after it
            (`gif.resume.own_file`).
        keep_checkpoint: leave the checkpoint, with all images done: for whoever saves the result before removing it.
        device: what the process group exchanges tensors on: CUDA for nccl.

    Raises ValueError for bad values, a label outside [0, m), an identity without a readable image (of `EncodedImages`
    before the work starts: an image of each is read first), features that are not finite, or a checkpoint of another
    run; with several processes also for a dataset without ``labels``, or fewer identities than processes.
    """
    m = getattr(dataset, "num_identities", None) if num_identities is None else num_identities
    if m is None or m < 1 or batch_size < 1:
        raise InputError(
            f"wanted at least 1 identity and a batch of 1, got num_identities={m}, batch_size={batch_size}; give "
            "num_identities where the dataset has none"
        )
    images = len(dataset)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"encoder": encoder.name, "m": m, "images": images, "batch_size": batch_size}
    bounds: list[int] = [0, m]
    rows: Tensor | range = range(images)
    counts = _image_counts(dataset, m)
    if counts is not None:  # known before the work starts
        _check_counts(counts)
        if not isinstance(dataset, IdentityDataset):
            settings["labels"] = hashlib.sha256(dataset.labels.numpy().tobytes()).hexdigest()[:16]  # type: ignore[attr-defined]
        elif checkpoint is not None:
            settings["data"] = dataset.summary()
        bounds = _shares(counts)
        rows = _images_between(dataset, bounds[rank()], bounds[rank() + 1])
    elif world_size() > 1:
        raise InputError(f"{world_size()} processes share the identities; give a dataset with `labels`")
    begin, end = bounds[rank()], bounds[rank() + 1]

    work = UnfinishedWork(None if checkpoint is None else own_file(checkpoint), CHECKPOINT_FORMAT, settings)
    sums = _FeatureSums(begin, end, work.load())
    if isinstance(dataset, IdentityDataset):
        check_workers(num_workers, batch_size, dataset.image_shape)
    if isinstance(dataset, EncodedImages) and sums.images == 0:
        check_identities(dataset, torch.as_tensor(rows), num_workers)
    begun = sums.images
    loader = DataLoader(
        dataset,
        batch_sampler=(batch.tolist() for batch in _batches(rows, begun, batch_size)),
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collate", None),
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=leave_signals_to_the_command,
    )
    with progress("encoding images", len(rows) - sums.images, "images") as advance:
        try:
            for places, (batch, batch_labels) in zip(
                _batches(rows, begun, batch_size), batches_of(loader), strict=True
            ):
                read, done = len(places), sums.images + len(places)
                if isinstance(dataset, IdentityDataset):
                    places = places[~dataset.broken(places)]
                if len(places):
                    sums.add(encoder(batch).cpu(), batch_labels, places, done)
                sums.images = done
                advance(read)
                if work.due and sums.whole:
                    work.save(sums.state())
        except BaseException:
            if sums.whole:
                work.save(sums.state())
            raise
    if isinstance(dataset, IdentityDataset) and (report := left_out(dataset)):
        say(report)
    if keep_checkpoint and begun < len(rows):
        work.save(sums.state())
    who = dataset.identities if isinstance(dataset, IdentityDataset) and dataset.num_identities == m else None
    vectors = CodeVectors(encoder.finish(_gather(sums.means(), bounds, device)), identities=who)
    if not keep_checkpoint:
        work.remove()
    return vectors


def _image_counts(dataset: Dataset[tuple[Tensor, Any]], m: int) -> Tensor | None:
    """How many images each of ``m`` identities has, (m,) int64; None where the data set has no labels."""
    if isinstance(dataset, IdentityDataset) and dataset.num_identities == m:
        return dataset.image_counts()
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, Tensor):
        return None
    checks.within("labels", labels, m, _LABELS)
    return labels.bincount(minlength=m)


def _images_between(dataset: Dataset[tuple[Tensor, Any]], begin: int, end: int) -> Tensor | range:
    """Which images show the identities in [begin, end)."""
    if isinstance(dataset, IdentityDataset):
        return dataset.images_between(begin, end)
    labels: Tensor = dataset.labels  # type: ignore[attr-defined]  # it has some
    return ((labels >= begin) & (labels < end)).nonzero().flatten()


def _batches(rows: Tensor | range, done: int, size: int) -> Iterator[Tensor]:
    """The rows from ``done`` on, ``size`` at a time."""
    return (torch.as_tensor(rows[begin : begin + size]) for begin in range(done, len(rows), size))


def _shares(counts: Tensor) -> list[int]:
    """Where each process's range of identities begins, and the end: ranges with about as many images, none empty."""
    m, processes = len(counts), world_size()
    if m < processes:
        raise InputError(f"{processes} processes share {m} identities; start at most one process an identity")
    images = counts.cumsum(0)
    wanted = torch.arange(1, processes) * int(images[-1]) / processes
    bounds = [0, *(torch.searchsorted(images, wanted.long()) + 1).tolist(), m]
    for process in range(1, processes):
        bounds[process] = min(max(bounds[process], bounds[process - 1] + 1), m - (processes - process))
    return bounds


def _gather(means: Tensor, bounds: list[int], device: str | torch.device) -> Tensor:
    """The rows of all processes, (m, e), from each one's own range; on the CPU."""
    if world_size() == 1:
        return means
    table = means.new_empty(bounds[-1], means.shape[1])
    ranges = [torch.arange(begin, end) for begin, end in pairwise(bounds)]
    for done in range(0, max(map(len, ranges)), _GATHERED_ROWS):
        some = slice(done, done + _GATHERED_ROWS)
        table[torch.cat([identities[some] for identities in ranges])] = gather_rows(means[some].to(device)).cpu()
    return table


def _check_counts(counts: Tensor, begin: int = 0) -> None:
    missing = (counts == 0).nonzero().flatten() + begin
    if len(missing):
        first = ", ".join(str(label) for label in missing[:_NAMED_IDENTITIES].tolist())
        raise InputError(
            f"{len(missing)} of {len(counts)} identities have no image (first: {first}); number the identities "
            "without gaps, or add their images"
        )


class _FeatureSums:
    """Sums and counts of the features of identities [begin, end) over the first ``images`` images.

    ``whole`` says that there is something, and nothing half added.
    """

    def __init__(self, begin: int, end: int, saved: dict[str, Tensor] | None) -> None:
        self.images = 0
        self.whole = False
        self._begin, self._end = begin, end
        self._counts = torch.zeros(end - begin, dtype=torch.int64)
        self._sums: Tensor | None = None  # its width is known with the first features
        if saved is not None:
            self._sums, self._counts, self.images = saved["sums"], saved["counts"], int(saved["images"])

    def add(self, features: Tensor, labels: Tensor, rows: Tensor, done: int) -> None:
        """Add features (n, e) of the images ``rows`` (n,) of the data set, which show identities ``labels`` (n,).

        ``done`` images, some of which may be broken, are behind us then.
        """
        if features.ndim != 2 or len(features) != len(labels):
            raise InputError(f"the encoder must give ({len(labels)}, e) features, got {tuple(features.shape)}")
        checks.within("labels", labels, self._end, _LABELS)
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise InputError(
                f"features of images {int(rows[0])} to {int(rows[-1])} hold NaN or infinity, first in image "
                f"{int(rows[bad[0]])}; check that image and the encoder's weights"
            )
        if self._sums is None:
            self._sums = torch.zeros(len(self._counts), features.shape[1], dtype=torch.float64)
        labels = labels.long() - self._begin
        self.whole = False
        self._sums.index_add_(0, labels, features.double())
        self._counts.index_add_(0, labels, torch.ones_like(labels))
        self.images = done
        self.whole = True

    def means(self) -> Tensor:
        """The mean feature of each identity, (m, e) float32; the sums are used up."""
        _check_counts(self._counts, self._begin)
        assert self._sums is not None  # every identity has an image
        sums, self._sums = self._sums, None
        return sums.div_(self._counts[:, None]).float()

    def state(self) -> dict[str, Tensor]:
        """What continues from here."""
        assert self._sums is not None  # there is something
        return {"sums": self._sums, "counts": self._counts, "images": torch.tensor(self.images)}
