"""Gaussian potential, specification: every pair at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.precision import compute_dtype
from gif_kernels.sphere import unit


def gaussian_potential(vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions) -> Tensor:
    """log mean_{i != j} exp(-t ||h_i - h_j||^2), (); with ``others`` (m, d), the share of rows [offset, offset + n)."""
    h = unit(vectors.to(compute_dtype(vectors)))
    columns = h if others is None else unit(others.detach().to(h.dtype))
    squared_distance = 2 - 2 * h @ columns.T  # (n, m)
    row, column = torch.arange(len(h), device=h.device), torch.arange(len(columns), device=h.device)
    pairs = torch.exp(-options.t * squared_distance).masked_fill(row.unsqueeze(1) + options.offset == column, 0)
    total = pairs.sum()
    if others is not None:  # a pair counts for both of its ends, and others stand still here: the slope twice
        total = 2 * total - total.detach()
    return total.log() - math.log(len(columns) * (len(columns) - 1))
