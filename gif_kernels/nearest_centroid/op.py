"""Nearest centroid: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.nearest_centroid import blocked, reference
from gif_kernels.precision import compute_dtype

OP = "nearest_centroid"


def _triton() -> dispatch.Implementation:
    from gif_kernels.nearest_centroid.kernels import nearest_centroid

    return nearest_centroid


dispatch.register(
    OP,
    reference=reference.nearest_centroid,
    blocked=blocked.nearest_centroid,
    triton=_triton,
)


def nearest_centroid(
    vectors: Tensor, centroids: Tensor, *, offsets: Tensor | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """The centroid of highest cosine for each row, all centroids or those of the row's segment.

    Args:
        vectors: (n, d). Rows need not be normalised.
        centroids: (k, d); or (g, k, d) with ``offsets``: k centroids for each of g segments. Normalised inside.
        offsets: (g + 1,) integer, from 0 to n, not decreasing: rows offsets[i]:offsets[i+1] use centroids[i].
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        index (n,) int64 in [0, k), the lowest where cosines are equal; cosine (n,), float64 if an input is, else
        float32. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN, or offsets that do not fit.
    """
    checks.floating("vectors", vectors, ("n", "d"))
    n, width = vectors.shape
    if offsets is None:
        checks.floating("centroids", centroids, ("k", width))
        centroids = centroids.unsqueeze(0)
        offsets = torch.tensor([0, n], device=vectors.device)
    else:
        checks.floating("centroids", centroids, ("g", "k", width))
        hint = "rows offsets[i]:offsets[i+1] use centroids[i]"
        offsets = checks.integer("offsets", offsets, (len(centroids) + 1,), low=0, high=n + 1, hint=hint)
        checks.require(
            (offsets[0] == 0) & (offsets[-1] == n) & (offsets.diff() >= 0).all(),
            f"offsets must go from 0 to {n}, the number of vectors, and never decrease",
        )
    checks.same_device(vectors=vectors, centroids=centroids, offsets=offsets)
    if checks.is_traced(vectors):
        found: tuple[Tensor, Tensor] = torch.ops.gif_kernels.nearest_centroid(vectors, centroids, offsets, impl)
        return found
    return _nearest(vectors, centroids, offsets, impl)


@torch.no_grad()
def _nearest(vectors: Tensor, centroids: Tensor, offsets: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
    implementation = dispatch.select(OP, impl, vectors.device, compute_dtype(vectors, centroids))
    with dispatch.full_precision(vectors.device):
        found: tuple[Tensor, Tensor] = implementation(vectors, centroids, offsets)
    return found


@torch.library.custom_op("gif_kernels::nearest_centroid", mutates_args=())
def _nearest_op(vectors: Tensor, centroids: Tensor, offsets: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """The search as one node of a compiled graph: its loop depends on the segments' sizes."""
    return _nearest(vectors, centroids, offsets, impl)  # type: ignore[arg-type]


@_nearest_op.register_fake
def _(vectors: Tensor, centroids: Tensor, offsets: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    n = len(vectors)
    return offsets.new_empty(n), vectors.new_empty(n, dtype=compute_dtype(vectors, centroids))
