"""Code regression, specification."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.precision import compute_dtype
from gif_kernels.reduction import Reduction, reduce_rows
from gif_kernels.sphere import unit


def code_regression(embeddings: Tensor, targets: Tensor, target_rows: Tensor | None, reduction: Reduction) -> Tensor:
    """1/2 (zhat . hhat - 1)^2 of each row, reduced over those that have a target."""
    return reduce_rows(rows(embeddings, targets, target_rows), has_target(embeddings, target_rows), reduction)


def rows(embeddings: Tensor, targets: Tensor, target_rows: Tensor | None) -> Tensor:
    """1/2 (zhat . hhat - 1)^2, (B,), with h = targets[target_rows]; 0 where that is -1."""
    dtype = compute_dtype(embeddings, targets)
    h = targets if target_rows is None else targets[target_rows.clamp(min=0)]
    cosine = (unit(embeddings.to(dtype)) * unit(h.to(dtype))).sum(-1)
    losses = (cosine - 1).square() / 2
    return losses if target_rows is None else torch.where(target_rows >= 0, losses, 0)


def has_target(embeddings: Tensor, target_rows: Tensor | None) -> Tensor:
    """Which rows count, (B,) bool."""
    if target_rows is None:
        return torch.ones(len(embeddings), dtype=torch.bool, device=embeddings.device)
    return target_rows >= 0
