"""Code regression: the public function."""

from __future__ import annotations

from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.code_regression import blocked, reference
from gif_kernels.dispatch import Impl
from gif_kernels.reduction import REDUCTIONS, Reduction, reduce_rows
from gif_kernels.sphere import compute_dtype

OP = "code_regression_loss"
dispatch.register(
    OP,
    reference=reference.code_regression_rows,
    blocked=blocked.code_regression_rows,
    triton="gif_kernels.code_regression.kernels:code_regression_rows",
)


def code_regression_loss(
    embeddings: Tensor, targets: Tensor, *, reduction: Reduction = "mean", impl: Impl = "auto"
) -> Tensor:
    """Pull of each embedding towards its code vector (the paper's L_AR): 1/2 (zhat . hhat - 1)^2.

    Args:
        embeddings: z, (B, d). Rows are normalised inside.
        targets: h, (B, d): the code vector of each row's identity. Normalised inside.
        reduction: "mean", "sum" or "none".
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () for "mean" and "sum", (B,) for "none"; float64 if an input is, else float32. Differentiable
        once, with respect to both.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN.
    """
    checks.floating("embeddings", embeddings, ("B", "d"))
    checks.floating("targets", targets, tuple(embeddings.shape))
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.same_device(embeddings=embeddings, targets=targets)
    rows = dispatch.select(OP, impl, embeddings.device, compute_dtype(embeddings, targets))
    with dispatch.full_precision(embeddings.device):
        return reduce_rows(rows(embeddings, targets), None, reduction)
