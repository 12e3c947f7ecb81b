"""The tree of clusters, a level at a time: all nodes of one depth are cut, named and replaced by their children.

A level is what its rows' tokens so far make it. What is held, where v^l <= 2^32 and m < 2^31: 4 bytes an identity of
tokens so far, 4 of the order and one of the next token; 4 bytes a node of where it begins, and 4 of the order it is cut
in. Vectors are read in blocks.

In a process group every process has the whole level and cuts some of its nodes; of a level of fewer nodes than
processes all cut each node together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gif.codes.align import Alignment, Residuals, fit_codebook, match, random_names
from gif.codes.blocks import block_floats, blocks_at_once, column_blocks
from gif.codes.clustering import split
from gif.codes.code_table import index_dtype, number_dtype
from gif.codes.nodes import Nodes, Rows
from gif.codes.segments import ancestors, counting_sort, offsets_of, tree_sums, whole_segments
from gif.codes.splitmix import node_seeds
from gif.distributed import rank, sum_over_processes, world_size
from gif_kernels.sphere import inverse_norm, unit

CODEBOOK_NODES = 256  # a level's codebook is fitted to the children of this many nodes at most
PADDING = 0.25  # nodes worked on together differ by this share in size at most
FEW_ROWS = 1 << 13  # up to so many padded rows, whatever their sizes: calls would take longer than the padding does
SORTED_ROWS = 1 << 20  # rows, or nodes, that are sorted at a time


@dataclass(frozen=True)
class Cutting:
    """How nodes are cut (see `gif.codes.clustering.split`)."""

    limit: int
    capacity_factor: float
    iterations: int


@dataclass(frozen=True)
class Cut:
    """Nodes and their children, as yet without names.

    node: (g,) of a level. child: (g, M) uint8 in [0, w), w <= v, for the rows of each node, meaningless past its size;
    of nodes that processes share, for this one's own columns. residuals: of the w children to their node.
    """

    node: Tensor
    child: Tensor
    residuals: Residuals


@dataclass(frozen=True)
class BySize:
    """Nodes by falling size, and by number where they are alike: ``node`` (n,), those of sizes[i] up to ends[i]."""

    node: Tensor
    sizes: np.ndarray
    ends: np.ndarray

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """Groups of at most ``rows`` padded rows (or one node) and of about equal sizes."""
        start = 0
        while start < len(self.node):
            largest = self.sizes[np.searchsorted(self.ends, start, side="right")]
            similar = self.ends[np.searchsorted(-self.sizes, -largest * (1 - PADDING), side="right") - 1]
            few = start + min(rows, FEW_ROWS) // int(largest)
            end = min(max(int(similar), few), start + max(1, rows // int(largest)), len(self.node))
            yield self.node[start:end]
            start = end


def by_size(node: Tensor, sizes: Tensor) -> BySize:
    """``node`` (n,) of ``sizes`` (n,), in the order of `BySize`."""
    falling, rank = sizes.sort(descending=True, stable=True)
    size, counts = falling.unique_consecutive(return_counts=True)
    return BySize(node[rank], size.cpu().numpy(), counts.cumsum(0).cpu().numpy())


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, by increasing path: node i holds identities order[offsets[i]:offsets[i + 1]], by id.

    numbers: (m,) the tokens so far of each identity as a number in base v, its node's path; in the dtype that whole
    codes are kept in.
    """

    table: Tensor
    vocab_size: int
    seed: int
    depth: int
    numbers: Tensor
    order: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sizes(self, node: Tensor) -> Tensor:
        """Rows (g,) int64 of each ``node`` (g,)."""
        return (self.offsets[node + 1] - self.offsets[node]).long()

    def paths(self, node: Tensor) -> Tensor:
        """The path (g,) int64 of each ``node`` (g,)."""
        return self._number_at(self.offsets[node])

    @property
    def block_rows(self) -> int:
        """Rows that are gathered at a time."""
        return max(1, block_floats(self.order.device) // max(self.table.shape[1], self.vocab_size))

    @property
    def shared(self) -> bool:
        """Whether all processes cut each node together, for there are fewer nodes than processes."""
        return len(self) < world_size()

    def tokens(self, cutting: Cutting, alignment: Alignment, advance: Callable[..., None]) -> tuple[Tensor, Tensor]:
        """Cut and name all nodes: the next token (m,) uint8 of each identity, and the codebook (v, d) of names.

        The codebook has no rows with alignment "none".
        """
        tokens = torch.zeros(len(self.order), dtype=torch.uint8, device=self.order.device)
        codebook = torch.empty(0, self.table.shape[1], device=self.order.device)
        sample = self.spread_out(CODEBOOK_NODES if alignment == "residual" else 0)
        sampled = list(self.cut(*self._sampled(sample), cutting=cutting))
        if alignment == "residual":
            codebook = fit_codebook(self._padded(sampled, sample), self.seed, self.depth)
        others = len(tokens)
        for cuts in (sampled, self.cut(self._large(sample), self._small(sample), cutting=cutting)):
            for cut in cuts:
                names = match(cut.residuals.cosines(codebook)) if len(codebook) else self._random_names(cut.node)
                if self.shared:  # the first process's: machines that round otherwise may see another one match
                    names = sum_over_processes(names * (rank() == 0))
                self._write(tokens, cut, names.to(torch.uint8))
                rows = int(self.sizes(cut.node).sum())
                advance(rows)
                others -= rows
        if world_size() > 1:
            for block in tokens.split(SORTED_ROWS):
                block.copy_(sum_over_processes(block))  # of which one process has written each
            advance(others)
        return tokens, codebook

    def spread_out(self, most: int) -> Tensor:
        """At most ``most`` nodes at equal distances, and no more than have their children in a block: (n,) int64."""
        n = len(self)
        count = min(n, most, max(1, block_floats() // self.table.shape[1] // self.vocab_size))
        return torch.linspace(0, n - 1, count, device=self.order.device, dtype=torch.float64).round().long()

    def cut(self, large: BySize, small: BySize, *, cutting: Cutting) -> Iterator[Cut]:
        """Cut the ``large`` nodes, of more than v rows, by balanced k-means; make each row of the ``small`` a child.

        Of several processes each yields its share of the nodes, all of them where they are shared.
        """
        for nodes, cut in ((large, self._cut_large), (small, self._cut_small)):
            for i, node in enumerate(nodes.chunks(self.block_rows)):
                if self.shared or i % world_size() == rank():
                    yield cut(node, cutting)

    def _sampled(self, node: Tensor) -> tuple[BySize, BySize]:
        """Of ``node`` (g,) those of more than v rows, and the others."""
        sizes = self.sizes(node)
        large = sizes > self.vocab_size
        return by_size(node[large], sizes[large]), by_size(node[~large], sizes[~large])

    def _large(self, sampled: Tensor) -> BySize:
        """The nodes of more than v rows but those ``sampled`` (g,)."""
        node = torch.cat([node[size > self.vocab_size] for node, size in self._others(sampled)])
        return by_size(node, self.offsets[node + 1] - self.offsets[node])

    def _small(self, sampled: Tensor) -> BySize:
        """The nodes of at most v rows but those ``sampled`` (g,): there may be as many as rows."""
        v = self.vocab_size

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            for node, size in self._others(sampled):
                small = size <= v
                yield node[small], (v - size[small]).to(torch.uint8)  # no node is empty

        node, counts = counting_sort(blocks, v)
        there = counts > 0
        return BySize(node, v - there.nonzero()[:, 0].numpy(), counts.cumsum(0)[there].numpy())

    def _others(self, sampled: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All nodes but those ``sampled`` (g,), and their sizes, a block at a time."""
        for begin in range(0, len(self), SORTED_ROWS):
            size = self.offsets[begin : begin + SORTED_ROWS + 1].diff()
            node = torch.arange(begin, begin + len(size), dtype=self.offsets.dtype, device=self.offsets.device)
            rest = torch.ones_like(node, dtype=torch.bool)
            rest[sampled[(sampled >= begin) & (sampled < begin + len(node))] - begin] = False
            yield node[rest], size[rest]

    def _cut_large(self, node: Tensor, cutting: Cutting) -> Cut:
        child, sums = split(
            self._shared_rows(node),
            self.vocab_size,
            capacity_factor=cutting.capacity_factor,
            limit=cutting.limit,
            iterations=cutting.iterations,
            seeds=self.seeds(node),
        )
        children = direction(sums)
        rows = Rows(children, inverse_norm(children)[:, :, 0])
        return Cut(node, child, Residuals(rows, direction(sums.sum(1))))

    def _cut_small(self, node: Tensor, cutting: Cutting) -> Cut:
        nodes = self.rows(node)
        width = nodes.mask.shape[1]
        base = self._inherited_base(node) if width == 1 else _mean_direction(nodes)
        own = self._shared_rows(node).own(self.vocab_size)
        child = torch.arange(own.begin, own.begin + own.mask.shape[1], dtype=torch.uint8, device=node.device)
        return Cut(node, child.expand(len(node), -1), Residuals(nodes.rows, base))

    def _inherited_base(self, node: Tensor) -> Tensor:
        """What the residuals of each ``node`` (g,) of one row are taken from: (g, d), each set of rows read once.

        The row has none to itself: the mean direction of the last node above it that has more.
        """
        start, size = self._family(self.offsets[node].long())
        key = start * (len(self.order) + 1) + size
        key, place = key.unique(return_inverse=True)
        start, size = key // (len(self.order) + 1), key % (len(self.order) + 1)
        bases = torch.empty(len(key), self.table.shape[1], device=node.device)
        for chunk in by_size(torch.arange(len(key), device=node.device), size).chunks(self.block_rows):
            bases[chunk] = _mean_direction(self._gather(start[chunk], size[chunk]))
        return bases[place]

    def _family(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Of nodes of one row, at ``place`` (g,) in the order: begin and size (g,) of the last above with more rows."""
        number, end = self._number_at(place), len(self.order) - 1
        before = torch.where(place > 0, self._number_at((place - 1).clamp_min(0)), -1)
        after = torch.where(place < end, self._number_at((place + 1).clamp_max(end)), -1)
        below = torch.full_like(number, self.vocab_size**self.depth)
        for step in range(self.depth - 1, 0, -1):
            above = self.vocab_size**step
            prefix = number // above
            below = torch.where((before // above == prefix) | (after // above == prefix), above, below)
        begin = self._last_beside(place, below, -1)
        return begin, self._last_beside(place, below, 1) - begin + 1

    def _last_beside(self, place: Tensor, below: Tensor, direction: int) -> Tensor:
        """The last place (g,) from ``place`` on, or back, at which number // ``below`` is the same: by galloping."""
        prefix, last = self._number_at(place) // below, place.clone()

        def advance(step: int) -> bool:
            trial = last + direction * step
            inside = trial.clamp(0, len(self.order) - 1)
            same = (inside == trial) & (self._number_at(inside) // below == prefix)
            last.copy_(torch.where(same, trial, last))
            return bool(same.any())

        step = 1
        while advance(step):
            step *= 2
        while step > 1:
            step //= 2
            advance(step)
        return last

    def _number_at(self, place: Tensor) -> Tensor:
        """The number (g,) int64 of the identity at each ``place`` (g,) in the order."""
        return self.numbers[self.order[place]].long()

    def _padded(self, cuts: list[Cut], nodes: Tensor) -> Tensor:
        """The residuals of all processes' ``cuts`` in the order of ``nodes`` (n,), which increase: (n, v, d).

        Zero beyond a cut's.
        """
        residuals = torch.zeros(len(nodes), self.vocab_size, self.table.shape[1], device=nodes.device)
        for cut in cuts:
            found = cut.residuals.unit
            residuals[torch.searchsorted(nodes, cut.node), : found.shape[1]] = found
        return residuals if self.shared else sum_over_processes(residuals)

    def _random_names(self, node: Tensor) -> Tensor:
        return random_names(self.seeds(node), self.vocab_size).to(node.device)

    def _write(self, tokens: Tensor, cut: Cut, names: Tensor) -> None:
        own = self._shared_rows(cut.node).own(self.vocab_size)
        for columns in column_blocks(own.mask):
            mask = own.mask[:, columns]
            named = names.gather(1, cut.child[:, columns].long())
            tokens[own.index[:, columns][mask]] = named[mask]

    def descend(self, tokens: Tensor) -> Level:
        """The next level, given the next token (m,) of each identity. It takes over this one's tensors."""
        sizes = []
        at_once = SORTED_ROWS * blocks_at_once(self.order.device)
        for nodes, rows in whole_segments(self.offsets, at_once):
            if rows.stop - rows.start > at_once:  # one node
                size = self._order_by_token(rows, tokens)
            else:
                node = torch.repeat_interleave(
                    self.offsets[nodes.start : nodes.stop + 1].diff(), output_size=rows.stop - rows.start
                )
                key, rank = node.int().mul_(self.vocab_size).add_(tokens[self.order[rows]]).sort(stable=True)
                self.order[rows] = self.order[rows][rank]
                size = key.unique_consecutive(return_counts=True)[1]
            sizes.append(size.to(self.offsets.dtype))
        self.numbers.mul_(self.vocab_size).add_(tokens)  # of a last token past 2^31: the bits of a number without sign
        return replace(self, depth=self.depth + 1, offsets=offsets_of(torch.cat(sizes)))

    def _order_by_token(self, rows: slice, tokens: Tensor) -> Tensor:
        """Put the identities of one node, ``rows`` of the order, in that of their tokens; how many each child has."""

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            return ((block, tokens[block]) for block in self.order[rows].split(SORTED_ROWS))

        self.order[rows], counts = counting_sort(blocks, self.vocab_size)
        return counts[counts > 0].to(self.order.device)

    def centroids(self, levels: int) -> list[Tensor]:
        """Unit centroids (nodes, d) float16 of depths 1 to ``levels``, at most this level's; on the CPU."""
        paths, offsets = self.numbers[self.order[self.offsets[:-1]]], self.offsets
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
        return self._gather(self.offsets[node].long(), self.sizes(node))

    def _shared_rows(self, node: Tensor) -> Nodes:
        """The same, of which each process works on its own columns where the level is `shared`."""
        return replace(self.rows(node), shared=self.shared)

    def _gather(self, start: Tensor, size: Tensor) -> Nodes:
        least, width = torch.stack(size.aminmax()).tolist()
        if len(start) == 1:  # perhaps of all rows there are: no positions, and a mask of one byte
            index = self.order[int(start) : int(start) + width][None]
            return Nodes(self.table, index, torch.ones_like(index[:, :1], dtype=torch.bool).expand_as(index), full=True)
        place = torch.arange(width, device=start.device)
        index = self.order[(start[:, None] + place).clamp_max(len(self.order) - 1)]
        return Nodes(self.table, index, place < size[:, None], full=least == width)

    def seeds(self, node: Tensor) -> np.ndarray:
        """Of each ``node`` (g,)."""
        return node_seeds(self.seed, self.depth, self.paths(node).cpu().numpy())


def root(table: Tensor, vocab_size: int, length: int, seed: int, *, device: torch.device | None = None) -> Level:
    """The level of depth 0 of codes of ``length`` tokens: one node that holds every row of ``table``.

    It is on ``device``, by default where the table is.
    """
    m, place = len(table), table.device if device is None else device
    dtype = index_dtype(m)
    order = torch.arange(m, dtype=dtype, device=place)
    numbers = torch.zeros(m, dtype=number_dtype(vocab_size, length), device=place)
    return Level(table, vocab_size, seed, 0, numbers, order, torch.tensor([0, m], dtype=dtype, device=place))


def direction(sums: Tensor) -> Tensor:
    """Unit rows in the precision of float16, in which centroids are kept: the order of a sum does not show in it."""
    return unit(sums).half().float()


def _mean_direction(nodes: Nodes) -> Tensor:
    """Of all rows of each node: (g, d)."""
    sums = torch.zeros(len(nodes.index), 1, nodes.table.shape[1], device=nodes.index.device)
    for _, rows in nodes.blocks(1):
        sums.baddbmm_(rows.scale[:, None], rows.values)
    return direction(sums[:, 0])
