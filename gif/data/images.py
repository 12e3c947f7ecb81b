"""Images of identities, held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class IdentityImages(Dataset[tuple[Tensor, Tensor]]):
    """Images with the identity each shows.

    Args:
        images: (n, channels, height, width) uint8.
        labels: (n,) integer, the identity of each image, in [0, len(names)).
        names: what each identity is called, for people and pictures.

    Indexing gives ``(image uint8 (channels, height, width), label int64 ())``. A whole batch is read at once with
    ``__getitems__``, which a DataLoader uses when it is given ``collate_fn=IdentityImages.collate``.

    Raises ValueError where shapes disagree or a label is outside [0, len(names)).
    """

    def __init__(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(f"images must be (n, c, h, w) uint8, got {tuple(images.shape)} {images.dtype}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be ({len(images)},), one an image, got {tuple(labels.shape)}")
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(names)):
            raise ValueError(
                f"labels must lie in [0, {len(names)}), got [{int(labels.min())}, {int(labels.max())}]; "
                "number the identities from 0"
            )
        self.images = images
        self.labels = labels.long()
        self.names = list(names)

    @property
    def num_identities(self) -> int:
        return len(self.names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    @staticmethod
    def collate(batch: Any) -> tuple[Tensor, Tensor]:
        """Pass a batch of ``__getitems__`` on as it is: (images, labels)."""
        images, labels = batch
        return images, labels
