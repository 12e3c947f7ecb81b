"""The tree of clusters, a level at a time: all nodes of one depth are cut, named and replaced by their children.

A level is what its rows' tokens so far make it, and costs some bytes a row and a node; vectors are read in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gif.codes.align import Alignment, fit_codebook, match, random_names
from gif.codes.blocks import block_floats, blocks_at_once, column_blocks
from gif.codes.clustering import split
from gif.codes.nodes import Nodes
from gif.codes.segments import ancestors, offsets_of, tree_sums, whole_segments
from gif.codes.splitmix import node_seeds
from gif_kernels.sphere import unit

CODEBOOK_NODES = 1024  # a level's codebook is fitted to the children of this many nodes at most
PADDING = 0.25  # nodes worked on together differ by this share in size at most
SORTED_ROWS = 1 << 22  # rows sorted by node and token at a time, unless a node has more


@dataclass(frozen=True)
class Cutting:
    """How nodes are cut (see `gif.codes.clustering.split`)."""

    limit: int
    capacity_factor: float
    iterations: int


@dataclass(frozen=True)
class Cut:
    """Nodes and their children, as yet without names.

    node: (g,) of a level. child: (g, M) uint8 in [0, w), w <= v, for the rows of each node, meaningless past its size.
    residuals: (g, w, d) of children to their node, of unit length; zero where there is no child.
    """

    node: Tensor
    child: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, by increasing path: node i holds identities order[offsets[i]:offsets[i + 1]], by id.

    paths: (n,) of the nodes. base_start, base_size: (n,) the rows whose mean direction a node's residuals are taken
    from: its own, or, where it has one row and so no residual, those of the last node above it that has more.
    """

    table: Tensor
    vocab_size: int
    seed: int
    depth: int
    order: Tensor
    offsets: Tensor
    paths: Tensor
    base_start: Tensor
    base_size: Tensor

    @cached_property
    def sizes(self) -> Tensor:
        return self.offsets.diff()

    @property
    def block_rows(self) -> int:
        """Rows that are gathered at a time."""
        return max(1, block_floats(self.table.device) // max(self.table.shape[1], self.vocab_size))

    def tokens(self, cutting: Cutting, alignment: Alignment, advance: Callable[..., None]) -> tuple[Tensor, Tensor]:
        """Cut and name all nodes: the next token (m,) uint8 of each identity, and the codebook (v, d) of names.

        The codebook has no rows with alignment "none".
        """
        tokens = torch.empty(len(self.order), dtype=torch.uint8, device=self.order.device)
        codebook = self.table.new_empty(0, self.table.shape[1], dtype=torch.float32)
        rest = torch.ones_like(self.sizes, dtype=torch.bool)
        sampled = []
        if alignment == "residual":
            sample = self.spread_out(CODEBOOK_NODES)
            sampled = list(self.cut(sample, cutting))
            codebook = fit_codebook(self._padded(sampled, sample), self.seed, self.depth)
            rest[sample] = False
        for cuts in (sampled, self.cut(rest.nonzero()[:, 0], cutting)):
            for cut in cuts:
                names = match(cut.residuals, codebook) if len(codebook) else self._random_names(cut.node)
                self._write(tokens, cut, names.to(torch.uint8))
                advance(int(self.sizes[cut.node].sum()))
        return tokens, codebook

    def spread_out(self, most: int) -> Tensor:
        """At most ``most`` nodes at equal distances, and no more than have their children in a block: (n,) int64."""
        n = len(self.sizes)
        count = min(n, most, max(1, block_floats() // self.table.shape[1] // self.vocab_size))
        return torch.linspace(0, n - 1, count, device=self.order.device, dtype=torch.float64).round().long()

    def cut(self, node: Tensor, cutting: Cutting) -> Iterator[Cut]:
        """Cut each ``node`` (g,) of more than v rows by balanced k-means; make each row of the others a child."""
        large = self.sizes[node] > self.vocab_size
        for nodes, cut in ((node[large], self._cut_large), (node[~large], self._cut_small)):
            for chunk in _chunks(self.sizes[nodes], self.block_rows):
                yield cut(nodes[chunk], cutting)

    def _cut_large(self, node: Tensor, cutting: Cutting) -> Cut:
        nodes = self.rows(node)
        child, sums = split(
            nodes,
            self.vocab_size,
            capacity_factor=cutting.capacity_factor,
            limit=cutting.limit,
            iterations=cutting.iterations,
            seeds=self.seeds(node),
        )
        return Cut(node, child, _residuals(direction(sums), direction(sums.sum(1))))

    def _cut_small(self, node: Tensor, cutting: Cutting) -> Cut:
        nodes = self.rows(node)
        width = nodes.mask.shape[1]
        base = self._inherited_base(node) if width == 1 else _mean_direction(nodes)
        child = torch.arange(width, dtype=torch.uint8, device=node.device).expand(len(node), -1)
        return Cut(node, child, _residuals(nodes.rows, base))

    def _inherited_base(self, node: Tensor) -> Tensor:
        """Mean direction (g, d) of the base rows of each ``node`` (g,), each set of rows read once."""
        key = self.base_start[node].long() * (len(self.order) + 1) + self.base_size[node]
        key, place = key.unique(return_inverse=True)
        start, size = key // (len(self.order) + 1), key % (len(self.order) + 1)
        bases = torch.empty(len(key), self.table.shape[1], device=node.device)
        for chunk in _chunks(size, self.block_rows):
            bases[chunk] = _mean_direction(self._gather(start[chunk], size[chunk]))
        return bases[place]

    def _padded(self, cuts: list[Cut], nodes: Tensor) -> Tensor:
        """The residuals of ``cuts`` in the order of ``nodes`` (n,), which increase: (n, v, d), zero beyond a cut's."""
        residuals = torch.zeros(len(nodes), self.vocab_size, self.table.shape[1], device=nodes.device)
        for cut in cuts:
            residuals[torch.searchsorted(nodes, cut.node), : cut.residuals.shape[1]] = cut.residuals
        return residuals

    def _random_names(self, node: Tensor) -> Tensor:
        return random_names(self.seeds(node), self.vocab_size).to(node.device)

    def _write(self, tokens: Tensor, cut: Cut, names: Tensor) -> None:
        nodes = self.rows(cut.node)
        for columns in column_blocks(nodes.mask):
            mask = nodes.mask[:, columns]
            named = names.gather(1, cut.child[:, columns].long())
            tokens[nodes.index[:, columns][mask]] = named[mask]

    def descend(self, tokens: Tensor) -> Level:
        """The next level, given the next token (m,) of each identity."""
        order = torch.empty_like(self.order)
        paths, sizes, parents = [], [], []
        at_once = SORTED_ROWS * blocks_at_once(self.order.device)
        for nodes, rows in whole_segments(self.offsets, at_once):
            node = torch.repeat_interleave(self.sizes[nodes], output_size=rows.stop - rows.start).int()
            key, rank = node.mul_(self.vocab_size).add_(tokens[self.order[rows]]).sort(stable=True)
            order[rows] = self.order[rows][rank]
            key, size = key.unique_consecutive(return_counts=True)
            parent = nodes.start + key.long() // self.vocab_size
            parents.append(parent)
            sizes.append(size)
            paths.append(self.paths[parent] * self.vocab_size + key % self.vocab_size)
        size, parent = torch.cat(sizes), torch.cat(parents)
        offsets = offsets_of(size)
        return replace(
            self,
            depth=self.depth + 1,
            order=order,
            offsets=offsets,
            paths=torch.cat(paths),
            base_start=torch.where(size > 1, offsets[:-1].to(order.dtype), self.base_start[parent]),
            base_size=torch.where(size > 1, size.to(order.dtype), self.base_size[parent]),
        )

    def centroids(self, levels: int) -> list[Tensor]:
        """Unit centroids (nodes, d) float16 of depths 1 to ``levels``, at most this level's; on the CPU."""
        paths, offsets = self.paths, self.offsets
        for _ in range(self.depth - levels):
            paths, children = (paths // self.vocab_size).unique_consecutive(return_counts=True)
            offsets = offsets[offsets_of(children)]
        above = ancestors(paths, self.vocab_size, levels)
        width = self.table.shape[1]
        centroids = [torch.empty(len(nodes), width, dtype=torch.float16) for nodes in above]
        for depth, nodes, sums in tree_sums(self.table, self.order, offsets, above, self.vocab_size):
            centroids[depth - 1][nodes] = direction(sums).half().cpu()
        return centroids

    def rows(self, node: Tensor) -> Nodes:
        """The rows of each ``node`` (g,), padded to the largest."""
        return self._gather(self.offsets[node], self.sizes[node])

    def _gather(self, start: Tensor, size: Tensor) -> Nodes:
        least, width = torch.stack(size.aminmax()).tolist()
        if len(start) == 1:  # perhaps of all rows there are: no positions
            index = self.order[int(start) : int(start) + width][None]
            return Nodes(self.table, index, torch.ones_like(index, dtype=torch.bool), full=True)
        place = torch.arange(width, device=start.device)
        index = self.order[(start[:, None] + place).clamp_max(len(self.order) - 1)]
        return Nodes(self.table, index, place < size[:, None], full=least == width)

    def seeds(self, node: Tensor) -> np.ndarray:
        return node_seeds(self.seed, self.depth, self.paths[node].cpu().numpy())


def root(table: Tensor, vocab_size: int, seed: int) -> Level:
    """The level of depth 0: one node that holds every row of ``table``."""
    m = len(table)
    dtype = torch.int32 if m <= torch.iinfo(torch.int32).max else torch.int64
    order = torch.arange(m, dtype=dtype, device=table.device)
    zero, all_rows = torch.zeros(1, dtype=torch.int64, device=table.device), order.new_full((1,), m)
    return Level(table, vocab_size, seed, 0, order, offsets_of(zero + m), zero, order.new_zeros(1), all_rows)


def direction(sums: Tensor) -> Tensor:
    """Unit rows in the precision of float16, in which centroids are kept: the order of a sum does not show in it."""
    return unit(sums).half().float()


def _mean_direction(nodes: Nodes) -> Tensor:
    return direction(nodes.sums(torch.zeros_like(nodes.mask, dtype=torch.uint8), 1)[:, 0])


def _residuals(children: Tensor, bases: Tensor) -> Tensor:
    """Unit residuals (g, w, d) of ``children`` (g, w, d) to ``bases`` (g, d); zero where a child is zero."""
    residuals = children - bases[:, None]
    norm = torch.linalg.vector_norm(residuals, dim=-1, keepdim=True)
    return residuals.div_(torch.where(norm > 0, norm, 1)).mul_(children.any(-1, keepdim=True))


def _chunks(sizes: Tensor, rows: int) -> Iterator[Tensor]:
    """Nodes, by falling size, in groups of at most ``rows`` padded rows (or one node) and of about equal sizes."""
    falling, node = sizes.sort(descending=True, stable=True)
    negated = -falling.cpu().numpy()
    start = 0
    while start < len(node):
        largest = -negated[start]
        similar = np.searchsorted(negated, -largest * (1 - PADDING), side="right")
        end = min(int(similar), start + max(1, rows // int(largest)))
        yield node[start:end]
        start = end
