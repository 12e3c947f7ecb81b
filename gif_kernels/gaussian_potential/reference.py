"""Gaussian potential, specification: every pair at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gif_kernels.sphere import compute_dtype, unit


def gaussian_potential(vectors: Tensor, t: float) -> Tensor:
    """log mean_{i != j} exp(-t ||h_i - h_j||^2), ()."""
    h = unit(vectors.to(compute_dtype(vectors)))
    squared_distance = 2 - 2 * h @ h.T  # (m, m)
    pairs = torch.exp(-t * squared_distance).masked_fill(torch.eye(len(h), dtype=torch.bool, device=h.device), 0)
    return pairs.sum().log() - math.log(len(h) * (len(h) - 1))
