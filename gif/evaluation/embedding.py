"""Images to embeddings: of a data set, or as verification protocols ask for them, the image and its mirror together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gif.data.augment import normalize_pixels
from gif.data.images import IdentityDataset
from gif.progress import progress


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
    """Embeddings (n, d) float32 of a data set's images, on the CPU, not normalised, not mirrored."""

    def batches() -> Iterator[Tensor]:
        with progress("embedding", len(data), "images") as advance:
            for batch in data.image_batches(batch_size):
                yield batch
                advance(len(batch))

    return embed_images(backbone, batches(), flip=False, device=device)


def embed_batch(backbone: nn.Module, images: Tensor, *, flip: bool) -> Tensor:
    """f(x), or f(x) + f(flip x), float32 (B, d), of images (B, c, h, w) uint8 on the backbone's device."""
    pixels = normalize_pixels(images)
    embeddings: Tensor = backbone(pixels).float()
    return embeddings + backbone(pixels.flip(3)).float() if flip else embeddings
