"""Code regression, specification."""

from __future__ import annotations

from torch import Tensor

from gif_kernels.sphere import compute_dtype, unit


def code_regression_rows(embeddings: Tensor, targets: Tensor) -> Tensor:
    """1/2 (zhat . hhat - 1)^2 of each row, (B,)."""
    dtype = compute_dtype(embeddings, targets)
    cosine = (unit(embeddings.to(dtype)) * unit(targets.to(dtype))).sum(-1)
    return (cosine - 1).square() / 2
