"""Neighbours put together: a balanced tree of random cuts, which needs one pass over the table whatever its depth.

Every node of the tree is halved at the median of its rows' projections on a direction of its level's own. A pair at a
small angle stays together unless a median falls between its two projections: at cosine 0.995 about 3 % a level.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gif.vectors.shards import Shards

ROWS_A_BLOCK = 1 << 14


def leaf_bounds(m: int, size: int) -> Tensor:
    """Where the leaves begin and end in the order: (2^depth + 1,) int64; each has ``size`` rows at most, and over half
    of that unless it is the only one."""
    depth = max(0, math.ceil(math.log2(m / size)))
    return _bounds(m, depth)


def project(shards: Shards, depth: int, seed: int) -> Tensor:
    """Projections (k, depth) float32 of the own rows on random directions, on the CPU; the table is read once."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(shards.table.shape[1], depth, generator=generator).to(shards.device)
    return torch.cat([(rows.float() @ directions).cpu() for rows in shards.own_blocks(ROWS_A_BLOCK)])


def neighbor_order(projections: Tensor) -> Tensor:
    """The rows leaf by leaf, (m,) int64, for `leaf_bounds` of as many levels as ``projections`` (m, depth) has."""
    m, depth = projections.shape
    order = torch.arange(m)
    place = torch.arange(m)
    for level in range(depth):
        node = torch.bucketize(place, _bounds(m, level), right=True)
        order = order[(node + projections[order, level].double().sigmoid()).argsort(stable=True)]
    return order


def _bounds(m: int, depth: int) -> Tensor:
    """Of 2^depth nodes of about equal size; those of the next depth halve them."""
    return torch.arange(2**depth + 1) * m // 2**depth
