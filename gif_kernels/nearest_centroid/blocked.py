"""Nearest centroid by batched products over segments of like size, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.precision import compute_dtype
from gif_kernels.sphere import inverse_norm

ROWS = 1 << 14
"""Rows gathered for one batched product, padding included; and centroids, where segments are shorter than k."""


def nearest_centroid(vectors: Tensor, centroids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) int64 and cosine (n,) among centroids (g, k, d): rows offsets[i]:offsets[i+1] use centroids[i]."""
    dtype = compute_dtype(vectors, centroids)
    index = offsets.new_zeros(len(vectors))
    cosine = vectors.new_zeros(len(vectors), dtype=dtype)
    sizes, order = offsets.diff().sort(descending=True, stable=True)
    counts = sizes.tolist()
    first, groups = 0, len(counts)
    while first < groups and counts[first] > 0:
        if counts[first] > ROWS:
            segment = int(order[first])
            start, end = int(offsets[segment]), int(offsets[segment + 1])
            for row in range(start, end, ROWS):
                part = slice(row, min(row + ROWS, end))
                index[part], cosine[part] = _nearest(vectors[part].to(dtype)[None], centroids[segment][None].to(dtype))
            first += 1
            continue
        together = max(ROWS // max(counts[first], centroids.shape[1]), 1)
        last = min(first + together, groups)  # like sizes stand together, so padding is small
        segments = order[first:last]
        place = torch.arange(counts[first], device=offsets.device)
        rows = offsets[segments].unsqueeze(1) + place  # (g, longest)
        inside = place < sizes[first:last].unsqueeze(1)
        batch = vectors[rows.clamp(max=len(vectors) - 1)].to(dtype)
        nearest, similarity = _nearest(batch, centroids[segments].to(dtype))
        index[rows[inside]], cosine[rows[inside]] = nearest[inside], similarity[inside]
        first = last
    return index, cosine


def _nearest(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index (g, n) and cosine (g, n) of rows (g, n, d) among centroids (g, k, d)."""
    similarity, index = torch.bmm(rows, (centroids * inverse_norm(centroids)).transpose(1, 2)).max(2)
    return index, similarity * inverse_norm(rows).squeeze(2)
