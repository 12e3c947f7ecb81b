"""Token-margin loss, specification: the plainest PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels.code_regression import reference as code_regression
from gif_kernels.precision import compute_dtype, rounded
from gif_kernels.reduction import reduce_rows
from gif_kernels.sphere import unit
from gif_kernels.token_margin.options import TokenMarginOptions


def token_margin(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    options: TokenMarginOptions,
) -> Tensor:
    """sum_j lambda_j CE(logit_j, c_j) a row, and pull / 2 (zhat . hhat - 1)^2 where there are targets, reduced."""
    operand = options.operand
    dtype = compute_dtype(embeddings, centers, projections)
    z = rounded(unit(embeddings.to(dtype)), operand)  # (B, d)
    w = rounded(unit(centers.to(dtype)), operand)  # (l, v, d')
    losses = z.new_zeros(len(z))
    for j in range(len(w)):
        u = z if projections is None else _projected(z, projections[j].to(dtype), operand)  # (B, d')
        cosine = u @ w[j].T  # (B, v)
        index = codes[:, j].clamp(min=0)
        own = F.one_hot(index, w.shape[1]).bool()
        logits = options.scale * torch.where(own, options.margin(cosine), cosine)
        weight = 1 / len(w) if token_weights is None else token_weights[j].to(dtype)
        losses = losses + weight * F.cross_entropy(logits, index, reduction="none")
    if targets is not None:
        losses = losses + options.pull * code_regression.rows(embeddings, targets, target_rows)
    return reduce_rows(losses, codes[:, 0] >= 0, options.reduction)


def _projected(z: Tensor, projection: Tensor, operand: torch.dtype) -> Tensor:
    return rounded(unit(z @ rounded(projection, operand).T), operand)
