"""Naming children so that a token means the same under every prefix.

Recursive k-means numbers the children of each node arbitrarily: token 2 = 3 says something else under each first
token, and a head that sees only the embedding cannot learn it. Here a level has a codebook of v directions, and the
children of a node are matched to it one to one by their residuals, child minus parent. Token k then means a direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gif.codes.clustering import SEEDING_ROWS, Points, seed_centroids
from gif.codes.nodes import Rows
from gif.codes.splitmix import node_seeds, uniforms
from gif.packages import needs
from gif_kernels.sphere import inverse_norm, unit

Alignment = Literal["residual", "none"]
ALIGNMENTS: tuple[Alignment, ...] = ("none", "residual")
CODEBOOK_ROUNDS = 5
SHORTEST = 1e-6  # squared length of a residual in float32, below which it has no direction


@dataclass(frozen=True)
class Residuals:
    """Of the children of g nodes: unit child minus the node's direction, at unit length. Zero where there is no child.

    children: w of each node, padded; bases: (g, d), unit.
    """

    children: Rows
    bases: Tensor

    @property
    def unit(self) -> Tensor:
        """(g, w, d)."""
        residuals = self.children.unit - self.bases[:, None]
        present = self.children.scale[:, :, None] > 0
        return residuals.mul_(inverse_norm(residuals).mul_(present))

    def cosines(self, directions: Tensor) -> Tensor:
        """To each of ``directions`` (v, d): (g, w, v). Children are read as they are, and no residual is written."""
        scale, values = self.children.scale[:, :, None], self.children.values
        products = (values @ directions.mT).mul_(scale) - (self.bases @ directions.mT)[:, None]
        beside = torch.bmm(values, self.bases[:, :, None]).mul_(scale)
        squared = 1 + self.bases.square().sum(1)[:, None, None] - 2 * beside
        return products.mul_(squared.clamp_min_(SHORTEST).rsqrt_().mul_(scale > 0))


def fit_codebook(residuals: Tensor, seed: int, depth: int) -> Tensor:
    """Directions (v, d) to name children by, from residuals (g, v, d) of unit length, or zero where there is no child.

    Starts from k-means++ of residuals at equal distances, then matches and takes means in turns until no name changes.
    """
    g, v, d = residuals.shape
    rows = residuals.reshape(1, g * v, d)
    some = rows[:, :: max(1, g // SEEDING_ROWS)]
    codebook = seed_centroids(Points(some, some.any(-1)), v, node_seeds(seed, depth, np.zeros(1, np.int64)))[0]
    names = None
    for _ in range(CODEBOOK_ROUNDS):
        previous, names = names, match(residuals @ codebook.mT)
        if previous is not None and torch.equal(names, previous):
            break
        named = names.flatten() == torch.arange(v, device=rows.device)[:, None]
        codebook = unit(named.to(rows.dtype) @ rows[0])
    return codebook


def match(cosines: Tensor) -> Tensor:
    """Names (g, w) int64 of w <= v children, all different in a node: the maximum-weight matching.

    ``cosines`` (g, w, v) of a child's residual to the direction of each name; zero for a child that is not there, which
    takes a name that is left.
    """
    with needs("scipy", 'codes with alignment "residual"'):
        from scipy.optimize import linear_sum_assignment
    weights = cosines.cpu().numpy()
    best = weights.argmax(-1)
    ordered = np.sort(best, 1)
    contested = (ordered[:, 1:] == ordered[:, :-1]).any(1)  # elsewhere each child has the name that suits it best
    for node in np.flatnonzero(contested):
        best[node] = linear_sum_assignment(weights[node], maximize=True)[1]
    return torch.from_numpy(best).to(cosines.device)


def random_names(seeds: np.ndarray, v: int) -> Tensor:
    """A random permutation of [0, v) for each of ``seeds`` (g,): (g, v) int64."""
    return uniforms(seeds, v, stream=2).argsort(1)
