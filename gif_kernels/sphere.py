"""Rows on the unit sphere: normalisation, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_norm", "tangent", "unit"]


def inverse_norm(rows: Tensor) -> Tensor:
    """1 / ||row|| over the last dimension, kept; 0 for a row of zeros, which has no direction. Not for autograd."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0)


def unit(rows: Tensor) -> Tensor:
    """Rows over their norm, differentiable; a row of zeros stays zero and gets no gradient; NaN stays NaN."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    nonzero = norm != 0
    return torch.where(nonzero, rows / torch.where(nonzero, norm, 1), 0)


def tangent(gradient: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Gradient at rows x of a function of xhat = x / ||x||: (g - (g . xhat) xhat) / ||x||.

    ``rows`` are the unit rows xhat, ``inverse`` 1 / ||x|| (from `inverse_norm`), ``gradient`` g = d/dxhat.
    """
    radial = (gradient * rows).sum(-1, keepdim=True)
    return torch.addcmul(gradient, rows, radial, value=-1) * inverse
