"""Gaussian potential: the public function."""

from __future__ import annotations

from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.gaussian_potential import blocked, reference

OP = "gaussian_potential"
dispatch.register(OP, reference=reference.gaussian_potential, blocked=blocked.gaussian_potential)


def gaussian_potential(vectors: Tensor, *, t: float = 2.0, impl: Impl = "auto") -> Tensor:
    """How unevenly rows cover the unit sphere (the paper's Eq. 6, over distinct pairs).

    L = log( 1 / (m (m - 1)) sum_{i != j} exp(-t ||h_i - h_j||^2) ), over rows normalised inside. The paper's own form,
    which counts i = j too, is log((m - 1) exp(L) + 1).

    Args:
        vectors: h, (m, d), m >= 2.
        t: how far a pair is felt, > 0.
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        (), float64 if ``vectors`` is, else float32. Differentiable once. "blocked" never holds m x m pairs.

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape; on CPU also NaN.
    """
    checks.floating("vectors", vectors, ("m", "d"))
    if len(vectors) < 2:
        raise ValueError(f"vectors must have at least 2 rows to form a pair, got {len(vectors)}")
    checks.positive("t", t)
    implementation = dispatch.select(OP, impl, vectors.device)
    with dispatch.full_precision(vectors.device):
        loss: Tensor = implementation(vectors, float(t))
    return loss
