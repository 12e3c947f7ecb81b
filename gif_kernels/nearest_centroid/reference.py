"""Nearest centroid, specification: a loop over segments."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from gif_kernels.precision import compute_dtype
from gif_kernels.sphere import unit


def nearest_centroid(vectors: Tensor, centroids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) int64 and cosine (n,) among centroids (g, k, d): rows offsets[i]:offsets[i+1] use centroids[i]."""
    dtype = compute_dtype(vectors, centroids)
    index = offsets.new_empty(len(vectors))
    cosine = vectors.new_empty(len(vectors), dtype=dtype)
    bounds = offsets.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            similarity = unit(vectors[start:end].to(dtype)) @ unit(centroids[i].to(dtype)).T
            cosine[start:end], index[start:end] = similarity.max(1)
    return index, cosine
