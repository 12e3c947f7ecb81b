"""How well code vectors cover the sphere, and how much of the encoder's order they keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gif.errors import InputError
from gif.packages import needs
from gif_kernels import gaussian_potential, max_cosine

SAMPLE = 20_000
QUERIES = 2_000  # whose ten nearest neighbours are compared
FEW = 10
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


def largest_uniform_cosine(m: int, width: int) -> float:
    """The median largest cosine of m >= 2 points that are uniform on the unit sphere of R^width.

    Two such points have a cosine above x >= 0 with probability I_{1 - x^2}((d - 1) / 2, 1 / 2) / 2; where C(m, 2) of
    that is ln 2, no pair has with probability 1 / 2. Of two points alone it is 0.
    """
    with needs("scipy", "judging code vectors"):
        from scipy.optimize import brentq
        from scipy.special import betainc
    pairs = m * (m - 1) / 2

    def surplus(x: float) -> float:
        return float(pairs / 2 * betainc((width - 1) / 2, 0.5, 1 - x * x)) - math.log(2)

    return float(brentq(surplus, 0.0, 1.0)) if surplus(0.0) > 0 else 0.0


@dataclass(frozen=True)
class VectorQuality:
    """What `judge_vectors` found; on a sample of the rows where there are many.

    ``gap`` is the potential minus the uniform measure's; ``nearest`` (n,) the nearest-neighbour cosines;
    ``largest_uniform`` the largest cosine that n uniform points would have; ``mean_norm`` the length of the mean
    vector. Against a reference: ``order_kept`` is the share of triplets whose similarities have the same order (chance
    is 0.5), ``neighbors_kept`` the share of rows whose nearest neighbour is the same, ``ten_neighbors_kept`` the share
    of the ten nearest that still are; NaN without one.
    """

    gap: float
    nearest: Tensor
    mean_norm: float
    largest_uniform: float
    order_kept: float = math.nan
    neighbors_kept: float = math.nan
    ten_neighbors_kept: float = math.nan

    def __str__(self) -> str:
        text = (
            f"optimality gap {self.gap:.4f}, nearest-neighbour cosine min {float(self.nearest.min()):.3f} "
            f"mean {float(self.nearest.mean()):.3f} max {float(self.nearest.max()):.3f} (uniform points: "
            f"{self.largest_uniform:.3f}), |mean| {self.mean_norm:.3f}"
        )
        if not math.isnan(self.order_kept):
            text += (
                f", triplet order kept {self.order_kept:.3f}, nearest neighbours kept {self.neighbors_kept:.3f} "
                f"(of ten: {self.ten_neighbors_kept:.3f})"
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single cosines, fit for JSON: None stands for NaN."""
        nearest = {"min": self.nearest.min(), "mean": self.nearest.mean(), "max": self.nearest.max()}
        numbers: dict[str, float] = {
            "gap": self.gap,
            "mean_norm": self.mean_norm,
            "largest_uniform": self.largest_uniform,
            "order_kept": self.order_kept,
            "neighbors_kept": self.neighbors_kept,
            "ten_neighbors_kept": self.ten_neighbors_kept,
        }
        return {
            "nearest": {name: float(value) for name, value in nearest.items()},
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
        }


def sample_rows(m: int, seed: int = 0) -> Tensor:
    """At most 20,000 of m rows, at random, in order: (n,) int64."""
    return torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:SAMPLE].sort().values


def judge_vectors(table: Tensor, reference: Tensor | None = None, *, t: float = 2.0, seed: int = 0) -> VectorQuality:
    """Judge code vectors (m, d), m >= 2, against the uniform measure and a reference (m, e) of the same rows, if given.

    Above 20,000 rows a sample of that many is judged (`sample_rows`), of both tables alike.

    Raises ValueError if the reference has another number of rows.
    """
    if reference is not None and len(reference) != len(table):
        raise InputError(f"reference must have {len(table)} rows, one a code vector, got {len(reference)}")
    rows = sample_rows(len(table), seed).to(table.device)
    vectors = torch.nn.functional.normalize(table[rows].float(), dim=1)
    nearest, neighbor = max_cosine(vectors)
    gap = float(gaussian_potential(vectors, t=t)) - uniform_optimum(table.shape[1], t)
    mean_norm = float(vectors.mean(0).norm())
    uniform = largest_uniform_cosine(len(vectors), table.shape[1])
    if reference is None:
        return VectorQuality(gap, nearest, mean_norm, uniform)
    others = torch.nn.functional.normalize(reference[rows].float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    anchor, left, right = torch.randint(len(rows), (3, TRIPLETS), generator=generator).to(table.device)
    distinct = (anchor != left) & (anchor != right) & (left != right)
    anchor, left, right = anchor[distinct], left[distinct], right[distinct]

    def prefers_left(points: Tensor) -> Tensor:
        triplets = zip(*(rows.split(TRIPLETS // 20) for rows in (anchor, left, right)), strict=True)
        return torch.cat([(points[a] * (points[b] - points[c])).sum(1) > 0 for a, b, c in triplets])

    order_kept = float((prefers_left(vectors) == prefers_left(others)).float().mean())
    neighbors_kept = float((neighbor == max_cosine(others)[1]).float().mean())
    before, after = _few_nearest(others), _few_nearest(vectors)
    ten_kept = float((before[:, :, None] == after[:, None]).any(2).float().mean())
    return VectorQuality(gap, nearest, mean_norm, uniform, order_kept, neighbors_kept, ten_kept)


def _few_nearest(points: Tensor) -> Tensor:
    """The ten nearest (q, 10), fewer where there are fewer, of 2,000 of the unit ``points`` (n, d) at most."""
    queries = torch.linspace(0, len(points) - 1, min(len(points), QUERIES), dtype=torch.float64).round().long()
    queries = queries.to(points.device)
    nearest = []
    for chunk in queries.split(QUERIES // 10):
        cosine = points[chunk] @ points.T
        cosine.scatter_(1, chunk[:, None], -torch.inf)
        nearest.append(cosine.topk(min(FEW, len(points) - 1)).indices)
    return torch.cat(nearest)
