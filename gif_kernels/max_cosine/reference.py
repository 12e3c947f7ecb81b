"""Largest cosine, specification: every pair at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.precision import compute_dtype
from gif_kernels.sphere import unit


def max_cosine(vectors: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine (m,) and index (m,) int64 of the nearest row of ``others``, or of the nearest other row of ``vectors``."""
    dtype = compute_dtype(vectors, others)
    h = unit(vectors.to(dtype))
    if len(h) == 0:
        return h.new_empty(0), torch.empty(0, dtype=torch.int64, device=h.device)
    similarity = h @ (h if others is None else unit(others.to(dtype))).T
    if others is None:
        similarity.fill_diagonal_(-torch.inf)
    cosine, index = similarity.max(1)
    return cosine, index
