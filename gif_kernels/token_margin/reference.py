"""Token-margin loss, specification: the plainest PyTorch, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels.margins import AngularMargin
from gif_kernels.sphere import compute_dtype, unit


def token_margin_rows(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    weights: Tensor,
    margin: AngularMargin,
    scale: float,
) -> Tensor:
    """Loss of each row, (B,): sum_j lambda_j CE(logit_j, c_j); 0 where the code is -1."""
    dtype = compute_dtype(embeddings, centers, projections)
    z = unit(embeddings.to(dtype))  # (B, d)
    w = unit(centers.to(dtype))  # (l, v, d')
    losses = z.new_zeros(len(z))
    counted = codes[:, 0] >= 0
    for j in range(len(w)):
        u = z if projections is None else unit(z @ projections[j].to(dtype).T)  # (B, d')
        cosine = u @ w[j].T  # (B, v)
        own = F.one_hot(codes[:, j].clamp(min=0), w.shape[1]).bool()
        logits = scale * torch.where(own, margin(cosine), cosine)
        loss = F.cross_entropy(logits, codes[:, j].clamp(min=0), reduction="none")
        losses = losses + weights[j].to(dtype) * loss
    return torch.where(counted, losses, 0)
