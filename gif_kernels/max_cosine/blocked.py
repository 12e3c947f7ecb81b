"""Largest cosine by tiles of products: a running best a row, never n x m similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.precision import compute_dtype, product
from gif_kernels.sphere import inverse_norm

ROWS, COLUMNS = 1024, 4096


def max_cosine(vectors: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine (m,) and index (m,) int64 of the nearest row of ``others``, or of the nearest other row of ``vectors``."""
    dtype = compute_dtype(vectors, others)
    columns = vectors if others is None else others
    cosine = vectors.new_full((len(vectors),), -torch.inf, dtype=dtype)
    index = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for j in range(0, len(columns), COLUMNS):
        right = columns[j : j + COLUMNS].to(dtype)
        right = (right * inverse_norm(right)).T
        for i in range(0, len(vectors), ROWS):
            left = vectors[i : i + ROWS].to(dtype)
            tile = product(left, right, dtype).mul_(inverse_norm(left))
            if others is None and i < j + COLUMNS and j < i + ROWS:  # the tile meets the diagonal
                tile.diagonal(i - j).fill_(-torch.inf)
            best, where = tile.max(1)
            better = best > cosine[i : i + ROWS]  # strictly: of equals the first stays
            cosine[i : i + ROWS] = torch.where(better, best, cosine[i : i + ROWS])
            index[i : i + ROWS] = torch.where(better, where + j, index[i : i + ROWS])
    return cosine, index
