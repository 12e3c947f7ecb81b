"""Code vectors before spreading: each identity's mean feature under a frozen encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gif.data.encoded import EncodedImages, check_identities, left_out
from gif.data.images import IdentityDataset
from gif.data.shared_memory import check_workers
from gif.distributed import first_decides, gather_objects, gather_rows, world_size
from gif.encoders.base import AffineMap, Encoder
from gif.errors import InputError
from gif.progress import say
from gif.resume import UnfinishedWork, own_file
from gif.vectors.mean_features import PART, ImageOrder, Reader
from gif.vectors.store import CodeVectors

CHECKPOINT_FORMAT = "gif.initial_checkpoint/2"
FITTED = 1 << 16  # identities, at most, to whose means an encoder is fitted

_GATHERED_ROWS = 1 << 16  # of each process at a time


def initial_code_vectors(dataset: Dataset[tuple[Tensor, Any]], encoder: Encoder, **options: Any) -> CodeVectors:
    """The code vectors of `fitted_code_vectors`, which has the arguments, without what its encoder was fitted to."""
    return fitted_code_vectors(dataset, encoder, **options)[0]


def fitted_code_vectors(
    dataset: Dataset[tuple[Tensor, Any]],
    encoder: Encoder,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    num_identities: int | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[CodeVectors, AffineMap | None]:
    """Code vectors h_y = normalise(f(mean over y's images of E(image))), and f: what ``encoder.fit`` finds, if it does.

    Features are summed an identity in float64, whose rounding is far below that of the float32 features: the order
    of the images does not matter, nor how many an identity has. Images are never kept.

    An `IdentityDataset` is read in the order of its identities, `PART` of them at a time, whose sums alone are held:
    beside the vectors (m d 4 bytes) `PART` e 12 bytes, on the CPU (e: width of the encoder's features). f is fitted to
    the means of all up to `FITTED` identities, which are held then (4 e bytes each), and of more to those of so many at
    equal distances, whose images are read beforehand. Of another dataset the sums of all are held: m e 12 bytes.

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
    order = ImageOrder.of(dataset, m)
    settings: dict[str, Any] = {
        "encoder": encoder.name,
        "m": m,
        "images": len(dataset),  # type: ignore[arg-type]
        "batch_size": batch_size,
        "fitted": FITTED,
        "part": PART,
        **_summary(dataset, kept=checkpoint is not None),
    }
    work = UnfinishedWork(None if checkpoint is None else own_file(checkpoint), CHECKPOINT_FORMAT, settings)
    saved = work.load() or {}
    if isinstance(dataset, IdentityDataset):
        check_workers(num_workers, batch_size, dataset.image_shape)
    if isinstance(dataset, EncodedImages) and not saved:
        check_identities(dataset, torch.as_tensor(order.places), num_workers)
    reader = Reader(encoder, batch_size, num_workers, torch.device(device).type == "cuda", work)
    finish = None
    if encoder.fit is not None and m > FITTED and isinstance(dataset, IdentityDataset):
        finish = _fitted_beforehand(reader, dataset, saved, device)
        saved = saved if "matrix" in saved else {}
    table = reader.mean_features(order, saved, finish, description="encoding images", keep=keep_checkpoint)
    if isinstance(dataset, IdentityDataset) and (report := left_out(dataset)):
        say(report)
    table = _gather(table, order.bounds, device)
    if encoder.fit is not None and finish is None:
        finish = _fit(encoder, table)
        table = finish(table)
    who = dataset.identities if isinstance(dataset, IdentityDataset) and dataset.num_identities == m else None
    vectors = CodeVectors(table, identities=who)
    if not keep_checkpoint:
        work.remove()
    return vectors, finish


def _summary(dataset: Dataset[tuple[Tensor, Any]], *, kept: bool) -> dict[str, Any]:
    """What tells this data set from another, where that is ``kept``."""
    if isinstance(dataset, IdentityDataset):
        return {"data": dataset.summary()} if kept else {}
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, Tensor):
        return {}
    return {"labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]}


def _fitted_beforehand(
    reader: Reader, dataset: IdentityDataset, saved: dict[str, Tensor], device: str | torch.device
) -> AffineMap:
    """What the encoder finds from `FITTED` identities at equal distances, of which all images are read.

    It is kept as soon as it is known, and what one of several processes has kept is not found again.
    """
    known = AffineMap(saved["center"], saved["matrix"]) if "matrix" in saved else None
    finish = next((each for each in gather_objects(known) if each is not None), None)
    if finish is None:
        part = dataset.of_identities(_some(dataset.num_identities))
        order = ImageOrder.of(part, part.num_identities)
        means = reader.mean_features(order, saved, description="encoding images to fit to", keep=True)
        finish = _fit(reader.encoder, _gather(means, order.bounds, device))
    if known is None:
        reader.work.save(finish.tensors())
    return finish


def _fit(encoder: Encoder, means: Tensor) -> AffineMap:
    """What the encoder finds from the means (m, e): of all, or of `FITTED` at equal distances. The first process's."""
    assert encoder.fit is not None  # or there is nothing to find
    fit, some = encoder.fit, means if len(means) <= FITTED else means[_some(len(means))]
    found = first_decides(lambda: fit(some))
    assert found is not None  # it is on each
    return AffineMap(found.center, found.matrix.contiguous())  # as a file has it: by its layout a product is rounded


def _some(m: int) -> Tensor:
    """`FITTED` of m identities, at equal distances."""
    return torch.arange(FITTED) * m // FITTED


def _gather(means: Tensor, bounds: Sequence[int], device: str | torch.device) -> Tensor:
    """The rows of all processes, (m, e), from each one's own range; on the CPU."""
    if world_size() == 1:
        return means
    table = means.new_empty(bounds[-1], means.shape[1])
    ranges = [torch.arange(begin, end) for begin, end in pairwise(bounds)]
    for done in range(0, max(map(len, ranges)), _GATHERED_ROWS):
        some = slice(done, done + _GATHERED_ROWS)
        table[torch.cat([identities[some] for identities in ranges])] = gather_rows(means[some].to(device)).cpu()
    return table
