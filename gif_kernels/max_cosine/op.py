"""Largest cosine: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError
from gif_kernels.max_cosine import blocked, reference
from gif_kernels.precision import compute_dtype

OP = "max_cosine"


def _triton() -> dispatch.Implementation:
    from gif_kernels.max_cosine.kernels import max_cosine

    return max_cosine


dispatch.register(
    OP,
    reference=reference.max_cosine,
    blocked=blocked.max_cosine,
    triton=_triton,
)


def max_cosine(vectors: Tensor, others: Tensor | None = None, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Each row's largest cosine to another row, and whose it is.

    Args:
        vectors: (n, d). Rows are normalised inside.
        others: (m, d) to search instead of ``vectors`` itself; no row is left out then.
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        cosine (n,), float64 if an input is, else float32; index (n,) int64, the lowest where cosines are equal. Not
        differentiable. "blocked" never holds n x m similarities.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, no other row to compare with; on CPU also NaN.
    """
    checks.floating("vectors", vectors, ("n", "d"))
    if others is not None:
        checks.floating("others", others, ("m", vectors.shape[1]))
    elif len(vectors) == 1:
        raise InputError("vectors must have at least 2 rows, got 1; a row is not compared with itself")
    checks.same_device(vectors=vectors, others=others)
    if checks.is_traced(vectors):
        found: tuple[Tensor, Tensor] = torch.ops.gif_kernels.max_cosine(vectors, others, impl)
        return found
    return _max_cosine(vectors, others, impl)


@torch.no_grad()
def _max_cosine(vectors: Tensor, others: Tensor | None, impl: Impl) -> tuple[Tensor, Tensor]:
    implementation = dispatch.select(OP, impl, vectors.device, compute_dtype(vectors, others))
    with dispatch.full_precision(vectors.device):
        found: tuple[Tensor, Tensor] = implementation(vectors, others)
    return found


@torch.library.custom_op("gif_kernels::max_cosine", mutates_args=())
def _max_cosine_op(vectors: Tensor, others: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """The search as one node of a compiled graph: its loop over tiles must not be unrolled into it."""
    return _max_cosine(vectors, others, impl)  # type: ignore[arg-type]


@_max_cosine_op.register_fake
def _(vectors: Tensor, others: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    n = len(vectors)
    return vectors.new_empty(n, dtype=compute_dtype(vectors, others)), vectors.new_empty(n, dtype=torch.int64)
