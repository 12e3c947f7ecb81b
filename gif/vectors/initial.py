"""Code vectors before spreading: each identity's mean feature under a frozen encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gif.encoders.base import Encoder
from gif.progress import progress
from gif.resume import UnfinishedWork
from gif.vectors.store import CodeVectors

CHECKPOINT_FORMAT = "gif.initial_checkpoint/1"
_NAMED_IDENTITIES = 5  # in an error message


def initial_code_vectors(
    dataset: Dataset[tuple[Tensor, Any]],
    encoder: Encoder,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    num_identities: int | None = None,
    checkpoint: str | Path | None = None,
) -> CodeVectors:
    """Code vectors h_y = normalise(finish(mean over y's images of E(image))), in one pass over ``dataset``.

    Features are summed an identity in float64, whose rounding is far below that of the float32 features: the order
    of the images does not matter, nor how many an identity has. Images are never kept; the sums take m * e * 8 bytes
    (e: width of the encoder's features) on the CPU, and the means half as much again at the end.

    Args:
        dataset: of (image (1 or 3, h, w) uint8, label), labels in [0, m), with a length. If it has a ``collate``, as
            `IdentityImages` does, batches are made with it.
        encoder: the frozen E; `PixelEncoder` needs no weights.
        batch_size: images encoded at once, >= 1.
        num_workers: processes that read images.
        num_identities: m; None takes ``dataset.num_identities``.
        checkpoint: file kept once a minute and on interruption; a later call with the same arguments continues from it
            to the same result, and removes it when done.

    Raises ValueError for bad values, a label outside [0, m), an identity without an image, features that are not
    finite, or a checkpoint of another run.
    """
    m = getattr(dataset, "num_identities", None) if num_identities is None else num_identities
    if m is None or m < 1 or batch_size < 1:
        raise ValueError(
            f"wanted at least 1 identity and a batch of 1, got num_identities={m}, batch_size={batch_size}; give "
            "num_identities where the dataset has none"
        )
    labels = getattr(dataset, "labels", None)
    if isinstance(labels, Tensor):  # known before the work starts
        _check_labels(labels, m)
        _check_counts(torch.bincount(labels, minlength=m))
    images = len(dataset)  # type: ignore[arg-type]
    settings = f"{encoder.name} m={m} images={images} batch_size={batch_size}"
    work = UnfinishedWork(checkpoint, CHECKPOINT_FORMAT, settings)
    sums = _FeatureSums(m, work.load())
    loader = DataLoader(
        Subset(dataset, range(sums.images, images)),
        batch_size,
        num_workers=num_workers,
        collate_fn=getattr(dataset, "collate", None),
    )
    with progress("encoding images", images - sums.images, "images") as advance:
        try:
            for batch, batch_labels in loader:
                sums.add(encoder(batch).cpu(), batch_labels)
                if work.due:
                    work.save(sums.state())
                advance(len(batch))
        except BaseException:
            if sums.whole:
                work.save(sums.state())
            raise
    vectors = CodeVectors(encoder.finish(sums.means()))
    work.remove()
    return vectors


def _check_labels(labels: Tensor, m: int) -> None:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < m):
        raise ValueError(
            f"labels must lie in [0, {m}), got [{int(labels.min())}, {int(labels.max())}]; number the identities from "
            "0, and give their number"
        )


def _check_counts(counts: Tensor) -> None:
    missing = (counts == 0).nonzero().flatten()
    if len(missing):
        first = ", ".join(str(label) for label in missing[:_NAMED_IDENTITIES].tolist())
        raise ValueError(
            f"{len(missing)} of {len(counts)} identities have no image (first: {first}); number the identities "
            "without gaps, or add their images"
        )


class _FeatureSums:
    """Sums and counts of the features of each identity over the first ``images`` images.

    ``whole`` says that there is something, and nothing half added.
    """

    def __init__(self, m: int, saved: dict[str, Tensor] | None) -> None:
        self.images = 0
        self.whole = False
        self._counts = torch.zeros(m, dtype=torch.int64)
        self._sums: Tensor | None = None  # its width is known with the first features
        if saved is not None:
            self._sums, self._counts, self.images = saved["sums"], saved["counts"], int(saved["images"])

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add features (n, e) of the next n images, which show identities ``labels`` (n,)."""
        last = self.images + len(labels) - 1
        if features.ndim != 2 or len(features) != len(labels):
            raise ValueError(f"the encoder must give ({len(labels)}, e) features, got {tuple(features.shape)}")
        _check_labels(labels, len(self._counts))
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"features of images {self.images} to {last} hold NaN or infinity, first in image "
                f"{self.images + int(bad[0])}; check that image and the encoder's weights"
            )
        if self._sums is None:
            self._sums = torch.zeros(len(self._counts), features.shape[1], dtype=torch.float64)
        labels = labels.long()
        self.whole = False
        self._sums.index_add_(0, labels, features.double())
        self._counts.index_add_(0, labels, torch.ones_like(labels))
        self.images = last + 1
        self.whole = True

    def means(self) -> Tensor:
        """The mean feature of each identity, (m, e) float32; the sums are used up."""
        _check_counts(self._counts)
        assert self._sums is not None  # every identity has an image
        sums, self._sums = self._sums, None
        return sums.div_(self._counts[:, None]).float()

    def state(self) -> dict[str, Tensor]:
        """What continues from here."""
        assert self._sums is not None  # there is something
        return {"sums": self._sums, "counts": self._counts, "images": torch.tensor(self.images)}
