"""The rows of many nodes at once, and their cosines to the nodes' centroids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gif.codes.blocks import block_floats, column_blocks, take
from gif.codes.moves import Moves
from gif.codes.prices import dearest
from gif.codes.segments import sum_of_groups
from gif.codes.splitmix import uniforms
from gif.distributed import gather_rows, in_turn, rank, sum_over_processes, world_size
from gif_kernels.sphere import inverse_norm, unit


@dataclass(frozen=True)
class Rows:
    """Rows of g nodes as a table has them, and what makes them unit rows, which are not written.

    values: (g, M, d) float32 of any length; scale: (g, M), 1 over their length, zero on padding.
    """

    values: Tensor
    scale: Tensor

    @property
    def unit(self) -> Tensor:
        """(g, M, d), zero on padding."""
        return self.values * self.scale[:, :, None]

    def cosines(self, centroids: Tensor) -> Tensor:
        """To each of ``centroids`` (g, k, d): (g, k, M), zero on padding."""
        return torch.bmm(centroids, self.values.mT).mul_(self.scale[:, None])

    def sums(self, child: Tensor, k: int) -> Tensor:
        """Sum (g, k, d) of the unit rows of each ``child`` (g, M)."""
        group = torch.arange(0, k * len(child), k, device=child.device)[:, None] + child
        sums = sum_of_groups(self.values.flatten(0, 1), group.flatten(), k * len(child), self.scale.flatten())
        return sums.unflatten(0, (-1, k))


@dataclass(frozen=True)
class Nodes:
    """The rows of g nodes, padded to M rows each.

    table: (m, d) vectors of any length and float dtype; index: (g, M) rows of it; mask: (g, M), False on padding.
    full: there is known to be no padding. shared: every process has these nodes, and works on columns of its `own`;
    begin: the first of them.
    """

    table: Tensor
    index: Tensor
    mask: Tensor
    full: bool = False
    shared: bool = False
    begin: int = 0

    @cached_property
    def sizes(self) -> Tensor:
        """(g,) rows of each node."""
        return self.mask.sum(1)

    @cached_property
    def rows(self) -> Rows:
        """All of them."""
        return self._gather(slice(None))

    def sample(self, rows: int, seeds: np.ndarray) -> Nodes:
        """``rows`` rows of each node, one at random from each of as many equal strata; all rows where it has fewer."""
        if self.index.shape[1] <= rows:
            return replace(self, shared=False) if self.shared else self
        position, mask = strata(self.sizes, rows, seeds)
        return Nodes(self.table, self.index.gather(1, position), mask, full=self.full)

    def own(self, k: int) -> Nodes:
        """All columns; where the nodes are shared those of this process, whole blocks that go with (., k)."""
        if not self.shared:
            return self
        step, width = self._step(k), self.index.shape[1]
        blocks = -(-width // step)
        begin, end = (min(width, step * (blocks * share // world_size())) for share in (rank(), rank() + 1))
        return replace(self, index=self.index[:, begin:end], mask=self.mask[:, begin:end], begin=begin)

    def similarity(self, centroids: Tensor) -> Tensor:
        """Cosine of each row to its node's ``centroids`` (g, k, d): (g, M, k)."""
        blocks = [block.mT for _, block in self.similarities(centroids)]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)).mT

    def similarities(self, centroids: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`similarity` in blocks: columns of the index, and their (g, columns, k)."""
        for columns, rows in self.blocks(centroids.shape[1]):
            yield columns, rows.cosines(centroids).mT

    def sums(self, child: Tensor, k: int) -> Tensor:
        """Sum (g, k, d) of the unit rows of each ``child`` (g, M)."""

        def add(sums: Tensor) -> Tensor:
            for columns, rows in self.blocks(k):
                sums += rows.sums(child[:, columns], k)
            return sums

        sums = torch.zeros(len(child), k, self.table.shape[1], device=child.device)
        return in_turn(add, sums) if self.shared else add(sums)

    def count(self, child: Tensor, k: int) -> Tensor:
        """Rows (g, k) int64 of each ``child`` (g, M)."""
        counts = count(child, self.mask, k)
        return sum_over_processes(counts) if self.shared else counts

    def centroids(self, child: Tensor, empty: Tensor) -> Tensor:
        """Unit mean (g, k, d) of the rows of each ``child`` (g, M), or of ``empty`` (g, k, d) where it has none."""
        k = empty.shape[1]
        return torch.where((self.count(child, k) > 0)[:, :, None], unit(self.sums(child, k)), empty)

    def blocks(self, k: int) -> Iterator[tuple[slice, Rows]]:
        """Columns of the index, and their rows, to go with (., k)."""
        width, step = self.index.shape[1], self._step(k)
        if step >= width:
            yield slice(0, width), self.rows
            return
        for begin in range(0, width, step):
            columns = slice(begin, begin + step)
            yield columns, self._gather(columns)

    def _step(self, k: int) -> int:
        return max(1, block_floats(self.index.device) // (len(self.index) * max(k, self.table.shape[1])))

    def _gather(self, columns: slice) -> Rows:
        index = self.index[:, columns]
        consecutive = _consecutive(index) if self.table.device == index.device else None
        rows = take(self.table, index) if consecutive is None else self.table[consecutive][None].float()
        scale = inverse_norm(rows)[:, :, 0]
        return Rows(rows, scale if self.full else scale.mul_(self.mask[:, columns]))


def strata(sizes: Tensor, rows: int, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
    """One place at random in each of ``rows`` equal strata of [0, size), for ``sizes`` (g,): (g, rows), and its mask.

    All places of a node that has fewer, and then False in the mask.
    """
    random = uniforms(seeds, rows, stream=1).to(sizes.device)
    stratum, sizes = torch.arange(rows, device=sizes.device), sizes[:, None]
    place = torch.where(sizes > rows, ((stratum + random) * (sizes / rows)).long(), stratum)
    return place.minimum(sizes - 1), stratum < sizes


def _consecutive(index: Tensor) -> slice | None:
    """The rows that ``index`` (g, M) names, where they are one after the other, as those of the root are; on a CPU."""
    if len(index) != 1 or index.device.type != "cpu" or not index.shape[1]:
        return None
    first, count = int(index[0, 0]), index.shape[1]
    if int(index[0, -1]) != first + count - 1 or not bool((index[0].diff() == 1).all()):
        return None
    return slice(first, first + count)


class Scores:
    """Cosines of the rows of ``nodes`` to ``centroids`` (g, k, d): held where they fit a block, else made on demand.

    Where the nodes are shared, each process has the scores of its own rows.
    """

    def __init__(self, nodes: Nodes, centroids: Tensor) -> None:
        self._nodes, self._centroids = nodes, centroids
        self._own = nodes.own(centroids.shape[1])
        fit = nodes.index.numel() * centroids.shape[1] <= block_floats(centroids.device)
        self._held = self._own.similarity(centroids) if fit else None

    def sample(self, rows: int, seeds: np.ndarray) -> tuple[Nodes, Tensor]:
        """``rows`` rows of each node at most, or as many as fit a CPU's block, and their similarity."""
        rows = min(rows, max(1, block_floats() // self._centroids.shape[1]))
        sample = self._nodes.sample(rows, seeds)
        if sample is self._own and self._held is not None:
            return sample, self._held
        return sample, sample.similarity(self._centroids)

    def dearest(self, prices: Tensor) -> Tensor:
        """The child (g, M) uint8 with the largest similarity - price for each row; the lowest number on ties."""
        child = torch.empty(self._own.index.shape, dtype=torch.uint8, device=prices.device)
        for columns, similarity in self._blocks():
            child[:, columns] = dearest(similarity, prices)
        return child

    def count(self, child: Tensor) -> Tensor:
        """Rows (g, k) int64 of each ``child`` (g, M), of all processes."""
        return self._own.count(child, self._centroids.shape[1])

    def leaving(self, child: Tensor, excess: Tensor) -> Moves:
        """The rows that lose least by leaving a child of positive ``excess`` (g, k), as many as that.

        Each for the best other child whose excess is negative. The same on every process.
        """
        own, open = self._own, excess < 0
        found = Moves.none(excess.device, own.index.dtype)
        for columns, similarity in self._blocks():
            crowded = (excess > 0).gather(1, child[:, columns].long()) & own.mask[:, columns]
            node, row = crowded.nonzero(as_tuple=True)
            scores = similarity[node, row]  # (c, k)
            best, target = scores.masked_fill(~open[node], -torch.inf).max(1)
            source = child[:, columns][node, row]
            loss = scores.gather(1, source[:, None].long())[:, 0] - best
            moves = Moves.of(node, row + (own.begin + columns.start), source, target, loss, own.index.dtype)
            found = found.followed_by(moves).leaving(excess)  # of all rows, what is held is what leaves
        return found.map(gather_rows).leaving(excess) if own.shared else found

    def move(self, child: Tensor, moves: Moves) -> None:
        """Give the rows in ``moves`` their targets, in ``child`` (g, M)."""
        column = moves.row - self._own.begin
        own = (column >= 0) & (column < child.shape[1])
        child[moves.node[own], column[own]] = moves.target[own]

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self._held is not None:
            return iter([(slice(0, self._held.shape[1]), self._held)])
        return self._own.similarities(self._centroids)


def count(child: Tensor, mask: Tensor, k: int) -> Tensor:
    """Rows (g, k) int64 of each child, padding left out."""
    counts = torch.zeros(len(child), k, dtype=torch.int64, device=child.device)
    for columns in column_blocks(mask):
        counts.scatter_add_(1, child[:, columns].long(), mask[:, columns].long())
    return counts
