"""Neighbours put together: a balanced tree of random cuts, which needs one pass over the table whatever its depth.

Every node of the tree is halved at the median of its rows' projections on a direction of its level's own. A pair at a
small angle stays together unless a median falls between its two projections: at cosine 0.995 about 3 % a level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from gif.distributed import gather_rows
from gif.vectors.distributed_table import DistributedTable

ROWS_A_BLOCK = 1 << 14


class NeighborSubsets:
    """Subsets of neighbours for the rows of ``table``: each is whole leaves of a tree of random cuts.

    A leaf has ``most`` rows at most, and a subset as many leaves as make about ``batch`` rows. ``sizes``: rows of each
    subset, whatever the tree.
    """

    def __init__(self, table: DistributedTable, most: int, batch: int) -> None:
        self._table = table
        self._bounds = leaf_bounds(table.m, most)
        self._leaves_together = max(1, batch // most)
        cuts = [*self._bounds[: -1 : self._leaves_together].tolist(), table.m]
        self.sizes = [end - begin for begin, end in pairwise(cuts)]

    def order(self, seed: int) -> Tensor:
        """All rows (m,), neighbours together, by the tree of this ``seed``; the same on each process."""
        depth = (len(self._bounds) - 1).bit_length() - 1
        projections = project(self._table, depth, seed)
        return neighbor_order(gather_rows(projections.to(self._table.device)).cpu())

    def subsets(self, order: Tensor) -> tuple[Tensor, ...]:
        """The rows of each subset, given the `order`."""
        return order.split(self.sizes)

    def leaves(self, subset: int, device: torch.device) -> Iterator[Tensor]:
        """The places (n,) in a subset that each of its leaves takes; none for a subset past the last."""
        bounds = self._bounds[subset * self._leaves_together :][: self._leaves_together + 1].tolist()
        for begin, end in pairwise(bounds):
            yield torch.arange(begin - bounds[0], end - bounds[0], device=device)


def leaf_bounds(m: int, size: int) -> Tensor:
    """Where the leaves begin and end in the order: (2^depth + 1,) int64; each has ``size`` rows at most, and over half
    of that unless it is the only one."""
    depth = max(0, math.ceil(math.log2(m / size)))
    return _bounds(m, depth)


def project(table: DistributedTable, depth: int, seed: int) -> Tensor:
    """Projections (k, depth) float32 of the own rows on random directions, on the CPU; the table is read once."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(table.width, depth, generator=generator).to(table.device)
    return torch.cat([(rows.float() @ directions).cpu() for rows in table.own_blocks(ROWS_A_BLOCK)])


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
