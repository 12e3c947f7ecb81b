"""Gaussian potential: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError
from gif_kernels.gaussian_potential import blocked, reference
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.precision import compute_dtype

OP = "gaussian_potential"


def _triton() -> dispatch.Implementation:
    from gif_kernels.gaussian_potential.kernels import gaussian_potential

    return gaussian_potential


dispatch.register(
    OP,
    reference=reference.gaussian_potential,
    blocked=blocked.gaussian_potential,
    triton=_triton,
)


def gaussian_potential(
    vectors: Tensor, others: Tensor | None = None, *, offset: int = 0, t: float = 2.0, impl: Impl = "auto"
) -> Tensor:
    """How unevenly rows cover the unit sphere (the paper's Eq. 6, over distinct pairs).

    L = log( 1 / (m (m - 1)) sum_{i != j} exp(-t ||h_i - h_j||^2) ), over rows normalised inside. The paper's own form,
    which counts i = j too, is log((m - 1) exp(L) + 1).

    Where each of several processes holds some of the rows and ``others``, gathered, are all of them, each computes the
    share of L that its rows have, S_r = log( 1 / (m (m - 1)) sum_{i in r} sum_{j != i} ... ), and L = logsumexp_r S_r.
    Each pair stands in two shares, or twice in one; the gradient counts both: that of L computed so, each process's
    own S_r alone requiring a gradient, is what one process would give these rows.

    Args:
        vectors: h, (n, d); without ``others`` n = m >= 2.
        others: all the rows, (m, d), of the vectors' dtype; those from ``offset`` are the vectors. Constants.
        offset: where the vectors stand in ``others``, in [0, m - n].
        t: how far a pair is felt, > 0.
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        (), float64 if ``vectors`` is, else float32. Differentiable once. Only "reference" holds all the pairs.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, an offset out of range; on CPU also NaN, or vectors
            that do not stand at ``offset``.
    """
    checks.floating("vectors", vectors, ("m", "d"))
    if others is None:
        if len(vectors) < 2:
            raise InputError(f"vectors must have at least 2 rows to form a pair, got {len(vectors)}")
        if offset != 0:
            raise InputError(f"offset says where vectors stand in others, got {offset} without others; give both")
    else:
        _check_share(vectors, others, offset)
    checks.positive("t", t)
    implementation = dispatch.select(OP, impl, vectors.device, compute_dtype(vectors))
    with dispatch.full_precision(vectors.device):
        loss: Tensor = implementation(vectors, others, GaussianPotentialOptions(t=float(t), offset=offset))
    return loss


def _check_share(vectors: Tensor, others: Tensor, offset: int) -> None:
    checks.floating("others", others, ("m", vectors.shape[1]))
    n, m = len(vectors), len(others)
    if others.dtype != vectors.dtype:
        raise TypeError(
            f"others must have the vectors' dtype {vectors.dtype}, got {others.dtype}; gather them as they are"
        )
    if m < 2:
        raise InputError(f"others must have at least 2 rows to form a pair, got {m}")
    if not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}")
    if not 0 <= offset <= m - n:
        raise InputError(f"offset must lie in [0, {m - n}] so that others hold the {n} vectors, got {offset}")
    checks.same_device(vectors=vectors, others=others)
    if checks.looks_at_values(vectors):
        same = torch.equal(vectors, others[offset : offset + n])
        checks.require(
            torch.tensor(same), f"others must hold the vectors from row {offset}; gather them after the step"
        )
