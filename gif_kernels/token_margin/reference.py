"""Token-margin loss, specification: the plainest PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels.code_regression import reference as code_regression
from gif_kernels.margins import AngularMargin
from gif_kernels.precision import rounded
from gif_kernels.reduction import Reduction, reduce_rows
from gif_kernels.sphere import compute_dtype, unit


def token_margin(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    pull: float,
    margin: AngularMargin,
    scale: float,
    reduction: Reduction,
    operand: torch.dtype,
) -> Tensor:
    """sum_j lambda_j CE(logit_j, c_j) of each row, and pull / 2 (zhat . hhat - 1)^2 where there are targets, reduced.

    ``operand`` is the dtype that the products' operands are rounded to.
    """
    dtype = compute_dtype(embeddings, centers, projections)
    z = rounded(unit(embeddings.to(dtype)), operand)  # (B, d)
    w = rounded(unit(centers.to(dtype)), operand)  # (l, v, d')
    losses = z.new_zeros(len(z))
    for j in range(len(w)):
        u = z if projections is None else _projected(z, projections[j].to(dtype), operand)  # (B, d')
        cosine = u @ w[j].T  # (B, v)
        index = codes[:, j].clamp(min=0)
        own = F.one_hot(index, w.shape[1]).bool()
        logits = scale * torch.where(own, margin(cosine), cosine)
        weight = 1 / len(w) if token_weights is None else token_weights[j].to(dtype)
        losses = losses + weight * F.cross_entropy(logits, index, reduction="none")
    if targets is not None:
        losses = losses + pull * code_regression.rows(embeddings, targets, target_rows)
    return reduce_rows(losses, codes[:, 0] >= 0, reduction)


def _projected(z: Tensor, projection: Tensor, operand: torch.dtype) -> Tensor:
    return rounded(unit(z @ rounded(projection, operand).T), operand)
