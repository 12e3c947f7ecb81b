"""Token-margin loss: what its implementations are told beside tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gif_kernels.margins import AngularMargin
from gif_kernels.reduction import Reduction


@dataclass(frozen=True)
class TokenMarginOptions:
    """The arguments of `token_margin_loss` that are no tensors, checked.

    Args:
        margin: psi.
        scale: s, what a cosine is multiplied by to be a logit.
        pull: the weight of the regression, where there are targets.
        reduction: "mean", "sum" or "none".
        operand: the dtype that the products' operands are rounded to.
    """

    margin: AngularMargin
    scale: float
    pull: float
    reduction: Reduction
    operand: torch.dtype
