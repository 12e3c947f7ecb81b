"""Images to embeddings: of a data set, or as verification protocols ask for them, the image and its mirror together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gif.data.images import IdentityDataset, normalize_pixels
from gif.data.shared_memory import check_workers
from gif.data.workers import batches_of, leave_signals_to_the_command
from gif.distributed import gather_rows, rank, world_size
from gif.errors import InputError
from gif.progress import progress


class NumberedImages(Protocol):
    """A map-style data set of images (c, h, w) uint8, each with its number."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


@dataclass(frozen=True)
class Embedder:
    """How images become embeddings: float32, not normalised. The processes of a group share the images.

    Args:
        flip: add the embedding of the mirrored image: f(x) + f(flip x), as verification protocols do.
        batch_size: images embedded at once.
        workers: processes that read images, for each process that embeds.
        device: where to compute.

    Raises ValueError for a number out of its range.
    """

    flip: bool = True
    batch_size: int = 256
    workers: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"wanted {name} >= {least}, got {name}={getattr(self, name)}")

    @torch.inference_mode()
    def own_share(
        self, backbone: nn.Module, images: NumberedImages, description: str, *, done: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share, batch by batch: numbers (b,) on the CPU, and embeddings (b, d) on the device.

        ``done``: so many of the share's images, the first ones, are left out: they have been embedded before.

        ``backbone`` takes images (B, c, h, w) in [-1, 1]. torch's default generator is left as it is.

        Raises ValueError where there are fewer images than processes, none of a share can be read, or the shared memory
        is too small for workers.
        """
        check_workers(self.workers, self.batch_size, images.image_shape)
        if len(images) < world_size():
            raise InputError(f"{description}: {len(images)} images for {world_size()} processes; start fewer")
        own, read = range(rank(), len(images), world_size())[done:], 0
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            images,  # type: ignore[arg-type]  # a Dataset in all but name
            self.batch_size,
            sampler=own,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=leave_signals_to_the_command,
            generator=torch.Generator(),
        )
        with (
            evaluating(backbone, self.device) as network,
            progress(description, done + len(own), "images", done=done) as advance,
        ):
            for begin, (batch, numbers) in zip(range(0, len(own), self.batch_size), batches_of(loader), strict=True):
                if len(numbers):
                    yield numbers, embed_batch(network, batch.to(self.device), flip=self.flip)
                    read += len(numbers)
                advance(min(self.batch_size, len(own) - begin))  # those that cannot be read are done too
        if not read and not done:
            raise InputError(f"{description}: none of {len(own):,} images can be read; replace them")

    def all_shares(self, backbone: nn.Module, images: NumberedImages, description: str) -> tuple[Tensor, Tensor]:
        """What all processes embedded, on the CPU of each: numbers (n,), ascending, and embeddings (n, d).

        Errors are those of `own_share`.
        """
        shares = list(self.own_share(backbone, images, description))
        numbers = gather_rows(torch.cat([numbers for numbers, _ in shares]).to(self.device)).cpu()
        embeddings = gather_rows(torch.cat([embeddings for _, embeddings in shares])).cpu()
        numbers, order = numbers.sort()
        return numbers, embeddings[order]


class ReadableImages:
    """The images of a data set, numbered from 0; of a batch, those that can be read."""

    def __init__(self, data: IdentityDataset) -> None:
        self._data = data

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._data.image_shape

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._data[index][0], index

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        images, _ = self._data.batch(indices)
        readable = torch.tensor(indices)[~self._data.broken(torch.tensor(indices))]
        return list(zip(images, readable.tolist(), strict=True))


def _collate(batch: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images = [image for image, _ in batch]
    numbers = torch.tensor([number for _, number in batch], dtype=torch.int64)
    return torch.stack(images) if images else torch.empty(0, dtype=torch.uint8), numbers


@contextmanager
def evaluating(backbone: nn.Module, device: str | torch.device) -> Iterator[nn.Module]:
    """The backbone on ``device`` and in eval mode; afterwards in the mode it was in."""
    was_training = backbone.training
    try:
        yield backbone.to(device).eval()
    finally:
        backbone.train(was_training)


@torch.inference_mode()
def embed_images(
    backbone: nn.Module, batches: Iterable[Tensor], *, flip: bool = True, device: str | torch.device = "cpu"
) -> Tensor:
    """Embeddings (n, d) float32 of images, on the CPU, not normalised.

    Args:
        backbone: takes images (B, c, h, w) in [-1, 1].
        batches: of images (B, c, h, w) uint8, in order; ``images.split(256)`` makes them of one tensor.
        flip: add the embedding of the mirrored image: f(x) + f(flip x), as verification protocols do.
        device: where to compute.
    """
    with evaluating(backbone, device) as network:
        return torch.cat([embed_batch(network, batch.to(device), flip=flip).cpu() for batch in batches])


def embed(
    backbone: nn.Module, data: IdentityDataset, *, batch_size: int = 512, device: str | torch.device = "cpu"
) -> Tensor:
    """Embeddings (n, d) float32 of a data set's readable images, on the CPU, not normalised, not mirrored."""
    embedder = Embedder(flip=False, batch_size=batch_size, device=device)
    return embedder.all_shares(backbone, ReadableImages(data), "embedding")[1]


def embed_batch(backbone: nn.Module, images: Tensor, *, flip: bool) -> Tensor:
    """f(x), or f(x) + f(flip x), float32 (B, d), of images (B, c, h, w) uint8 on the backbone's device."""
    pixels = normalize_pixels(images)
    embeddings: Tensor = backbone(pixels).float()
    return embeddings + backbone(pixels.flip(3)).float() if flip else embeddings
