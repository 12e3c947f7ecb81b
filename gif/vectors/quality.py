"""How well code vectors cover the sphere, and how much of the encoder's order they keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gif_kernels import gaussian_potential, max_cosine

SAMPLE = 20_000
TRIPLETS = 200_000


def uniform_optimum(width: int, t: float = 2.0) -> float:
    """log E exp(-t ||x - y||^2) for x, y uniform on the unit sphere of R^width: the potential's optimum.

    It is -2t + log 0F1(; d/2; t^2), summed as the series sum_k t^(2k) / (k! (d/2)_k).
    """
    term = total = 1.0
    k = 0
    while term > total * 1e-17:
        term *= t * t / ((k + 1) * (width / 2 + k))
        total += term
        k += 1
    return -2 * t + math.log(total)


@dataclass(frozen=True)
class VectorQuality:
    """What `judge_vectors` found; on a sample of the rows where there are many.

    ``gap`` is the potential minus the uniform measure's; ``nearest`` (n,) the nearest-neighbour cosines; ``mean_norm``
    the length of the mean vector. Against a reference: ``order_kept`` is the share of triplets whose similarities have
    the same order (chance is 0.5), ``neighbors_kept`` the share of rows whose nearest neighbour is the same; both are
    NaN without one.
    """

    gap: float
    nearest: Tensor
    mean_norm: float
    order_kept: float = math.nan
    neighbors_kept: float = math.nan

    def __str__(self) -> str:
        text = (
            f"optimality gap {self.gap:.4f}, nearest-neighbour cosine mean {float(self.nearest.mean()):.3f} "
            f"max {float(self.nearest.max()):.3f}, |mean| {self.mean_norm:.3f}"
        )
        if not math.isnan(self.order_kept):
            text += f", triplet order kept {self.order_kept:.3f}, nearest neighbours kept {self.neighbors_kept:.3f}"
        return text


def sample_rows(m: int, seed: int = 0) -> Tensor:
    """At most 20,000 of m rows, at random, in order: (n,) int64."""
    return torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:SAMPLE].sort().values


def judge_vectors(table: Tensor, reference: Tensor | None = None, *, t: float = 2.0, seed: int = 0) -> VectorQuality:
    """Judge code vectors (m, d), m >= 2, against the uniform measure and a reference (m, e) of the same rows, if given.

    Above 20,000 rows a sample of that many is judged (`sample_rows`), of both tables alike.

    Raises ValueError if the reference has another number of rows.
    """
    if reference is not None and len(reference) != len(table):
        raise ValueError(f"reference must have {len(table)} rows, one a code vector, got {len(reference)}")
    rows = sample_rows(len(table), seed).to(table.device)
    vectors = torch.nn.functional.normalize(table[rows].float(), dim=1)
    nearest, neighbor = max_cosine(vectors)
    gap = float(gaussian_potential(vectors, t=t)) - uniform_optimum(table.shape[1], t)
    mean_norm = float(vectors.mean(0).norm())
    if reference is None:
        return VectorQuality(gap, nearest, mean_norm)
    others = torch.nn.functional.normalize(reference[rows].float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    anchor, left, right = torch.randint(len(rows), (3, TRIPLETS), generator=generator).to(table.device)
    distinct = (anchor != left) & (anchor != right) & (left != right)
    anchor, left, right = anchor[distinct], left[distinct], right[distinct]

    def prefers_left(points: Tensor) -> Tensor:
        return (points[anchor] * (points[left] - points[right])).sum(1) > 0

    order_kept = float((prefers_left(vectors) == prefers_left(others)).float().mean())
    neighbors_kept = float((neighbor == max_cosine(others)[1]).float().mean())
    return VectorQuality(gap, nearest, mean_norm, order_kept, neighbors_kept)
