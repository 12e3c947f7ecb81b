"""Code regression: the public function."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gif_kernels import checks, dispatch
from gif_kernels.code_regression import blocked, reference
from gif_kernels.dispatch import Impl
from gif_kernels.errors import InputError
from gif_kernels.precision import compute_dtype
from gif_kernels.reduction import REDUCTIONS, Reduction

OP = "code_regression_loss"


def _triton() -> dispatch.Implementation:
    from gif_kernels.code_regression.function import code_regression

    return code_regression


dispatch.register(
    OP,
    reference=reference.code_regression,
    blocked=blocked.code_regression,
    triton=_triton,
)


class CodeRegression(NamedTuple):
    """The pull towards code vectors as a term of `token_margin_loss`: weight / 2 (zhat . hhat - 1)^2 a row.

    Attributes:
        targets: h, (B, d), or a table of them, (m, d), with ``rows``. A constant. Normalised inside.
        rows: (B,) integer: row i of the embeddings is pulled towards targets[rows[i]]; -1 is not pulled.
        weight: of the term, > 0.
    """

    targets: Tensor
    rows: Tensor | None = None
    weight: float = 1.0


def code_regression_loss(
    embeddings: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Pull of each embedding towards its code vector (the paper's L_AR): 1/2 (zhat . hhat - 1)^2.

    Args:
        embeddings: z, (B, d). Rows are normalised inside.
        targets: h, (B, d): the code vector of each row's identity. Normalised inside. With ``rows``: a table (m, d),
            of which nothing but those rows is read.
        rows: (B,) integer in [0, m), the row of ``targets`` for each embedding; -1 is ignored (the mean is over the
            others).
        reduction: "mean", "sum" or "none".
        impl: "auto", "triton", "blocked" or "reference".

    Returns:
        () for "mean" and "sum", (B,) for "none"; float64 if an input is, else float32. Differentiable
        once, with respect to both; with ``rows`` the targets are constants.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; on CPU also NaN, or a row out of range (on an
            accelerator its loss is NaN).
    """
    checks.floating("embeddings", embeddings, ("B", "d"), finite=False)
    dtype = compute_dtype(embeddings, targets) if isinstance(targets, Tensor) else embeddings.dtype
    name = dispatch.resolve(OP, impl, embeddings.device, dtype)
    rows = check_targets(embeddings, targets, rows, asserted=name != "triton")
    checks.choice("reduction", reduction, REDUCTIONS)
    with dispatch.full_precision(embeddings.device):
        loss: Tensor = dispatch.implementation(OP, name)(embeddings, targets, rows, reduction)
    if checks.seen_not_finite(loss):
        checks.refuse_not_finite(embeddings=embeddings, targets=looked_up(targets, rows))
    return loss


def looked_up(targets: Tensor, rows: Tensor | None) -> Tensor:
    """The targets that are read: (B, d)."""
    return targets if rows is None else targets[rows.clamp(min=0)]


def check_targets(embeddings: Tensor, targets: Tensor, rows: Tensor | None, *, asserted: bool) -> Tensor | None:
    """``rows`` as int64, if there are any. Raises as `code_regression_loss` does."""
    batch, width = embeddings.shape
    if rows is None:
        checks.floating("targets", targets, (batch, width), finite=False)
    else:
        checks.floating("targets", targets, ("m" if batch else "B", width), finite=False)  # an empty batch reads none
        rows = checks.labels("rows", rows, batch, high=len(targets), asserted=asserted)
        if targets.requires_grad:
            raise InputError("targets are constants where rows are given; detach them, or give targets[rows]")
    checks.same_device(embeddings=embeddings, targets=targets, rows=rows)
    return rows
