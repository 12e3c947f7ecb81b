"""Code contrast, specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gif_kernels.margins import AngularMargin
from gif_kernels.precision import rounded
from gif_kernels.reduction import Reduction, reduce_rows
from gif_kernels.sphere import compute_dtype, unit


def code_contrast(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    margin: AngularMargin,
    scale: float,
    reduction: Reduction,
    operand: torch.dtype,
) -> Tensor:
    """Cross entropy of each row over the vectors that compete (all, if None), reduced over targets >= 0.

    ``operand`` is the dtype that the product's operands are rounded to.
    """
    dtype = compute_dtype(embeddings, vectors)
    z, h = (rounded(unit(x.to(dtype)), operand) for x in (embeddings, vectors))
    cosine = z @ h.T  # (B, C)
    index = targets.clamp(min=0)
    own = F.one_hot(index, len(vectors)).bool()
    logits = scale * torch.where(own, margin(cosine), cosine)
    if competes is not None:
        logits = logits.masked_fill(~competes, -torch.inf)
    return reduce_rows(F.cross_entropy(logits, index, reduction="none"), targets >= 0, reduction)
