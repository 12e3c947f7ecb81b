"""The tree of clusters, a level at a time: all nodes of one depth are cut, named and replaced by their children."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gif.codes.align import fit_codebook, match, random_names
from gif.codes.balanced import BLOCK_FLOATS, Nodes, node_seeds, split
from gif_kernels.sphere import unit

Alignment = Literal["none", "residual"]
ALIGNMENTS: tuple[Alignment, ...] = ("none", "residual")
CODEBOOK_NODES = 1024  # a level's codebook is fitted to the children of this many nodes at most
PADDING = 0.25  # nodes worked on together differ by this share in size at most


@dataclass(frozen=True)
class Cut:
    """The children of a level's nodes, as yet without names.

    child: (m,) uint8 in [0, v), for each row in the level's order. Node i with more than v rows has its children's unit
    centroids in centroids[slot[i]], (v, d) float16; a smaller one has slot -1, and each row for a child.
    """

    child: Tensor
    slot: Tensor
    centroids: Tensor


@dataclass(frozen=True)
class Level:
    """The nodes of one depth, by increasing path: node i holds identities order[offsets[i]:offsets[i + 1]], by id.

    bases: (n, d) float16 directions that residuals are taken from: the node's centroid; where the node has one row, and
    so no residual of its own, its parent's base.
    """

    table: Tensor
    vocab_size: int
    seed: int
    depth: int
    order: Tensor
    offsets: Tensor
    paths: Tensor
    centroids: Tensor
    bases: Tensor

    @cached_property
    def sizes(self) -> Tensor:
        return self.offsets.diff()

    @property
    def block_rows(self) -> int:
        """Rows that are gathered at a time."""
        return max(1, BLOCK_FLOATS // self.table.shape[1])

    def node_of_row(self) -> Tensor:
        """(m,) the node of each row, in the level's order."""
        return torch.repeat_interleave(self.sizes)

    def split(self, *, capacity_factor: float, limit: int, iterations: int, advance: Callable[..., None]) -> Cut:
        """Cut every node of more than v rows by balanced k-means; give each row of the others a child of its own."""
        v = self.vocab_size
        large = (self.sizes > v).nonzero()[:, 0]
        slot = torch.full_like(self.sizes, -1)
        slot[large] = torch.arange(len(large), device=slot.device)
        centroids = torch.empty(len(large), v, self.table.shape[1], dtype=torch.float16, device=slot.device)
        row = torch.arange(len(self.order), device=slot.device)
        child = (row - self.offsets[self.node_of_row()]).clamp_max(v - 1).to(torch.uint8)
        for chunk in _chunks(self.sizes[large], self.block_rows):
            node = large[chunk]
            nodes = self.rows(node, int(self.sizes[node[0]]))
            seeds = self.seeds(node)
            token, centroid = split(
                nodes, v, capacity_factor=capacity_factor, limit=limit, iterations=iterations, seeds=seeds
            )
            child[self.positions(node, nodes.mask.shape[1])[nodes.mask]] = token[nodes.mask].to(torch.uint8)
            centroids[chunk] = centroid.to(centroids.dtype)
            advance(int(self.sizes[node].sum()))
        return Cut(child, slot, centroids)

    def names(self, cut: Cut, alignment: Alignment, advance: Callable[..., None]) -> Tensor:
        """(n, v) uint8: the token that each child of each node is called by."""
        v, n = self.vocab_size, len(self.sizes)
        names = torch.empty(n, v, dtype=torch.uint8, device=self.order.device)
        if alignment == "residual":
            sample = min(n, CODEBOOK_NODES, max(1, self.block_rows // v))
            spaced = torch.linspace(0, n - 1, sample, device=self.order.device, dtype=torch.float64).round().long()
            codebook = fit_codebook(self.residuals(spaced, cut), self.seed, self.depth)
        for node in torch.arange(n, device=self.order.device).split(max(1, self.block_rows // v)):
            if alignment == "residual":
                names[node] = match(self.residuals(node, cut), codebook).to(torch.uint8)
            else:
                names[node] = random_names(self.seeds(node), v).to(names)
            advance(int(self.sizes[node][cut.slot[node] < 0].sum()))
        return names

    def residuals(self, node: Tensor, cut: Cut) -> Tensor:
        """Unit residuals (g, v, d) of the children of each ``node`` (g,) to its base; zero where there is no child."""
        v, d = cut.centroids.shape[1:]
        children = torch.empty(len(node), v, d, device=node.device)
        slot = cut.slot[node]
        children[slot >= 0] = cut.centroids[slot[slot >= 0]].float()
        children[slot < 0] = self.rows(node[slot < 0], v).rows
        return unit(children - self.bases[node].float()[:, None]) * children.any(-1, keepdim=True)

    def descend(self, cut: Cut, names: Tensor, tokens: Tensor) -> Level:
        """The next level, given what the children are called (n, v) and so the token of each row (m,)."""
        key, rank = (self.node_of_row() * self.vocab_size + tokens).sort(stable=True)
        key, sizes = key.unique_consecutive(return_counts=True)
        order, offsets = self.order[rank], _offsets(sizes)
        parent, name = key // self.vocab_size, key % self.vocab_size
        centroids = torch.empty(len(key), self.table.shape[1], dtype=torch.float16, device=key.device)
        for node in torch.arange(len(key), device=key.device).split(self.block_rows):
            centroids[node] = unit(self.table[order[offsets[node]]].float()).half()  # right where the row is alone
            node = node[cut.slot[parent[node]] >= 0]
            child = names[parent[node]].long().argsort(1).gather(1, name[node, None])[:, 0]
            centroids[node] = cut.centroids[cut.slot[parent[node]], child]
        return replace(
            self,
            depth=self.depth + 1,
            order=order,
            offsets=offsets,
            paths=self.paths[parent] * self.vocab_size + name,
            centroids=centroids,
            bases=torch.where((sizes > 1)[:, None], centroids, self.bases[parent]),
        )

    def rows(self, node: Tensor, width: int) -> Nodes:
        """The rows of each ``node`` (g,), padded to ``width``."""
        mask = torch.arange(width, device=node.device) < self.sizes[node, None]
        position = self.positions(node, width).clamp_max(len(self.order) - 1)
        return Nodes(self.table, self.order[position], mask)

    def positions(self, node: Tensor, width: int) -> Tensor:
        """(g, width) places in the order: the node's own rows, then those that follow them."""
        return self.offsets[node, None] + torch.arange(width, device=node.device)

    def seeds(self, node: Tensor) -> np.ndarray:
        return node_seeds(self.seed, self.depth, self.paths[node].cpu().numpy())


def root(table: Tensor, vocab_size: int, seed: int) -> Level:
    """The level of depth 0: one node that holds every row of ``table``."""
    m, d = table.shape
    total = torch.zeros(d, dtype=torch.float64, device=table.device)
    for rows in table.split(max(1, BLOCK_FLOATS // d)):
        total += unit(rows.float()).sum(0)
    centroid = unit(total)[None].half()
    zero = torch.zeros(1, dtype=torch.int64, device=table.device)
    order = torch.arange(m, device=table.device)
    return Level(table, vocab_size, seed, 0, order, _offsets(zero + m), zero, centroid, centroid)


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


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
