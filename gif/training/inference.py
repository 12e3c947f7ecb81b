"""Embeddings of a data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gif.data.augment import normalize_pixels
from gif.data.images import IdentityDataset
from gif.progress import progress


@torch.inference_mode()
def embed(backbone: nn.Module, data: IdentityDataset, *, batch_size: int = 512, device: str = "cpu") -> Tensor:
    """Embeddings (n, d) float32 of a data set's images, on the CPU, not normalised; the backbone in eval mode."""
    backbone = backbone.to(device)
    was_training = backbone.training
    backbone.eval()
    batches = []
    with progress("embedding", len(data), "images") as advance:
        for batch in data.image_batches(batch_size):
            batches.append(backbone(normalize_pixels(batch.to(device))).float().cpu())
            advance(len(batch))
    backbone.train(was_training)
    return torch.cat(batches)
