"""The rows of many nodes at once, and their cosines to the nodes' centroids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gif.codes.blocks import block_floats, column_blocks
from gif.codes.prices import dearest
from gif.codes.splitmix import uniforms
from gif_kernels.sphere import unit


@dataclass(frozen=True)
class Nodes:
    """The rows of g nodes, padded to M rows each.

    table: (m, d) vectors of any length and float dtype; index: (g, M) rows of it; mask: (g, M), False on padding.
    full: there is known to be no padding.
    """

    table: Tensor
    index: Tensor
    mask: Tensor
    full: bool = False

    @cached_property
    def sizes(self) -> Tensor:
        """(g,) rows of each node."""
        return self.mask.sum(1)

    @cached_property
    def rows(self) -> Tensor:
        """(g, M, d) unit rows in float32, zero on padding."""
        return self._gather(slice(None))

    def sample(self, rows: int, seeds: np.ndarray) -> Nodes:
        """``rows`` rows of each node, one at random from each of as many equal strata; all rows where it has fewer."""
        if self.index.shape[1] <= rows:
            return self
        random = uniforms(seeds, rows, stream=1).to(self.index.device)
        strata, sizes = torch.arange(rows, device=self.index.device), self.sizes[:, None]
        position = torch.where(sizes > rows, ((strata + random) * (sizes / rows)).long(), strata)
        return Nodes(self.table, self.index.gather(1, position.minimum(sizes - 1)), strata < sizes, full=self.full)

    def similarity(self, centroids: Tensor) -> Tensor:
        """Cosine of each row to its node's ``centroids`` (g, k, d): (g, M, k)."""
        similarity = centroids.new_empty(*self.index.shape, centroids.shape[1])
        for columns, block in self.similarities(centroids):
            similarity[:, columns] = block
        return similarity

    def similarities(self, centroids: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`similarity` in blocks: columns of the index, and their (g, columns, k)."""
        for columns, rows in self._blocks(centroids.shape[1]):
            yield columns, torch.bmm(rows, centroids.mT)

    def sums(self, child: Tensor, k: int) -> Tensor:
        """Sum (g, k, d) of the unit rows of each ``child`` (g, M)."""
        children = torch.arange(k, device=child.device)
        sums = torch.zeros(len(child), k, self.table.shape[1], device=child.device)
        for columns, rows in self._blocks(k):
            member = (child[:, columns, None] == children) & self.mask[:, columns, None]
            sums.baddbmm_(member.to(rows.dtype).mT, rows)
        return sums

    def centroids(self, child: Tensor, empty: Tensor) -> Tensor:
        """Unit mean (g, k, d) of the rows of each ``child`` (g, M), or of ``empty`` (g, k, d) where it has none."""
        k = empty.shape[1]
        return torch.where((count(child, self.mask, k) > 0)[:, :, None], unit(self.sums(child, k)), empty)

    def _blocks(self, k: int) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the index, and their unit rows (g, columns, d) in float32, zero on padding, to go with (., k)."""
        g, width = self.index.shape
        step = max(1, block_floats(self.table.device) // (g * max(k, self.table.shape[1])))
        if step >= width:
            yield slice(0, width), self.rows
            return
        for begin in range(0, width, step):
            columns = slice(begin, begin + step)
            yield columns, self._gather(columns)

    def _gather(self, columns: slice) -> Tensor:
        rows = self.table[self.index[:, columns]].float()
        rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        return rows if self.full else rows.mul_(self.mask[:, columns, None])


class Scores:
    """Cosines of the rows of ``nodes`` to ``centroids`` (g, k, d): held where they fit a block, else made on demand."""

    def __init__(self, nodes: Nodes, centroids: Tensor) -> None:
        self._nodes, self._centroids = nodes, centroids
        fit = nodes.index.numel() * centroids.shape[1] <= block_floats(centroids.device)
        self._held = nodes.similarity(centroids) if fit else None

    def sample(self, seeds: np.ndarray) -> tuple[Nodes, Tensor]:
        """Nodes of as many rows as fit a CPU's block, whatever the device, and their similarity."""
        sample = self._nodes.sample(max(1, block_floats() // self._centroids.shape[1]), seeds)
        if sample is self._nodes and self._held is not None:
            return sample, self._held
        return sample, sample.similarity(self._centroids)

    def dearest(self, prices: Tensor) -> Tensor:
        """The child (g, M) uint8 with the largest similarity - price for each row; the lowest number on ties."""
        child = torch.empty(self._nodes.index.shape, dtype=torch.uint8, device=prices.device)
        for columns, similarity in self._blocks():
            child[:, columns] = dearest(similarity, prices)
        return child

    def moves(self, child: Tensor, wanted: Tensor, open: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Node, row, best other child that is ``open`` (g, k), and what it loses, of the rows in ``wanted`` (g, M)."""
        found = []
        for columns, similarity in self._blocks():
            node, row = wanted[:, columns].nonzero(as_tuple=True)
            scores = similarity[node, row]  # (c, k)
            best, target = scores.masked_fill(~open[node], -torch.inf).max(1)
            source = child[:, columns][node, row].long()
            found.append((node, row + columns.start, target, scores.gather(1, source[:, None])[:, 0] - best))
        node, row, target, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
        return node, row, target, loss

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self._held is not None:
            return iter([(slice(0, self._held.shape[1]), self._held)])
        return self._nodes.similarities(self._centroids)


def count(child: Tensor, mask: Tensor, k: int) -> Tensor:
    """Rows (g, k) int64 of each child, padding left out."""
    counts = torch.zeros(len(child), k, dtype=torch.int64, device=child.device)
    for columns in column_blocks(mask):
        counts.scatter_add_(1, child[:, columns].long(), mask[:, columns].long())
    return counts
