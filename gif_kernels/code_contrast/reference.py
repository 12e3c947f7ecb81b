"""Code contrast, specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels.margins import AngularMargin
from gif_kernels.sphere import compute_dtype, unit


def code_contrast_rows(
    embeddings: Tensor, vectors: Tensor, targets: Tensor, competes: Tensor, margin: AngularMargin, scale: float
) -> Tensor:
    """Cross entropy of each row over the vectors that compete, (B,); 0 where the target is -1."""
    dtype = compute_dtype(embeddings, vectors)
    cosine = unit(embeddings.to(dtype)) @ unit(vectors.to(dtype)).T  # (B, C)
    index = targets.clamp(min=0)
    own = F.one_hot(index, len(vectors)).bool()
    logits = scale * torch.where(own, margin(cosine), cosine)
    logits = logits.masked_fill(~competes, -torch.inf)
    return torch.where(targets >= 0, F.cross_entropy(logits, index, reduction="none"), 0)
