"""One level of balanced spherical k-means: many nodes at once, each cut into k children that have capacities.

Nodes are padded to the largest and every step is a batched product or an integer count, so that a level of 160,000
small nodes costs what its rows cost. A large node is streamed: only its (n, k) similarities are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gif_kernels.sphere import unit

BLOCK_FLOATS = 1 << 24  # rows gathered at a time, in floats: 64 MiB
SEEDING_ROWS = 64  # k-means++ looks at this many rows a child at most
LLOYD_ROWS = 256  # and Lloyd's rounds at this many; the last assignment sees every row
BALANCING_ROUNDS = 3  # assignment within the capacities, and new centroids
PRICE_RATES = tuple(0.2 * 0.88**i for i in range(30))  # of a node's mean spread of similarities; falls to 0.005
FINAL_RATES = tuple(0.02 * 0.86**i for i in range(10))  # from prices that are nearly right already


@dataclass(frozen=True)
class Nodes:
    """The rows of g nodes, padded to M rows each.

    table: (m, d) vectors of any length and float dtype; index: (g, M) rows of it; mask: (g, M), False on padding.
    """

    table: Tensor
    index: Tensor
    mask: Tensor

    @cached_property
    def sizes(self) -> Tensor:
        """(g,) rows of each node."""
        return self.mask.sum(1)

    @cached_property
    def rows(self) -> Tensor:
        """(g, M, d) unit rows in float32, zero on padding."""
        return self._gather(slice(None))

    def sample(self, rows: int, seeds: np.ndarray) -> Nodes:
        """At most ``rows`` rows of each node, one at random from each of as many equal strata."""
        if self.index.shape[1] <= rows:
            return self
        random = uniforms(seeds, rows, stream=1).to(self.index.device)
        strata = torch.arange(rows, device=self.index.device)
        position = ((strata + random) * (self.sizes[:, None] / rows)).long()
        index = self.index.gather(1, position.minimum(self.sizes[:, None] - 1))
        return Nodes(self.table, index, torch.ones_like(index, dtype=torch.bool))

    def similarity(self, centroids: Tensor) -> Tensor:
        """Cosine of each row to its node's ``centroids`` (g, k, d): (g, M, k)."""
        similarity = centroids.new_empty(*self.index.shape, centroids.shape[1])
        for columns, rows in self._blocks():
            similarity[:, columns] = torch.bmm(rows, centroids.mT)
        return similarity

    def centroids(self, child: Tensor, empty: Tensor) -> Tensor:
        """Unit mean (g, k, d) of the rows of each ``child`` (g, M), or of ``empty`` (g, k, d) where it has none."""
        children = torch.arange(empty.shape[1], device=child.device)
        sums = torch.zeros_like(empty)
        for columns, rows in self._blocks():
            member = (child[:, columns, None] == children) & self.mask[:, columns, None]
            sums.baddbmm_(member.to(rows.dtype).mT, rows)
        return torch.where((count(child, self.mask, len(children)) > 0)[:, :, None], unit(sums), empty)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the index, and their unit rows (g, columns, d) in float32, zero on padding."""
        g, width = self.index.shape
        step = max(1, BLOCK_FLOATS // (g * self.table.shape[1]))
        if step >= width:
            yield slice(0, width), self.rows
            return
        for start in range(0, width, step):
            columns = slice(start, start + step)
            yield columns, self._gather(columns)

    def _gather(self, columns: slice) -> Tensor:
        return unit(self.table[self.index[:, columns]].float()) * self.mask[:, columns, None]


def split(
    nodes: Nodes, k: int, *, capacity_factor: float, limit: int, iterations: int, seeds: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Cut each node of n rows into k children of at most min(limit, ceil(capacity_factor n / k)) rows.

    Spherical k-means (k-means++, then Lloyd), and then the assignment that keeps the capacities and loses little
    cosine: a child has a price >= 0, rows take the largest similarity - price, and prices rise where too many come.
    ``seeds`` (g,) make a node's result independent of the nodes beside it. Needs k * limit >= n.

    Returns child (g, M) int64 in [0, k), meaningless on padding, and unit centroids (g, k, d), zero where there are no
    rows.
    """
    sample = nodes.sample(LLOYD_ROWS * k, seeds)
    centroids = kmeans(sample, k, iterations, seeds)
    share = (limit / nodes.sizes).clamp_max(capacity_factor / k)[:, None]  # of a node's rows, that a child may take
    prices = torch.zeros_like(centroids[:, :, 0])
    for _ in range(BALANCING_ROUNDS):
        similarity = sample.similarity(centroids)
        prices = balancing_prices(similarity, sample.mask, share * sample.sizes[:, None], prices, PRICE_RATES)
        centroids = sample.centroids(dearest(similarity, prices), centroids)

    similarity = nodes.similarity(centroids)
    prices = balancing_prices(similarity, nodes.mask, share * nodes.sizes[:, None], prices, FINAL_RATES)
    child = dearest(similarity, prices)
    room = capacities(count(child, nodes.mask, k), capacity_factor, limit)
    child = repair(similarity, child, nodes.mask, room)
    return child, nodes.centroids(child, torch.zeros_like(centroids))


def kmeans(nodes: Nodes, k: int, iterations: int, seeds: np.ndarray) -> Tensor:
    """Spherical k-means without capacities: unit centroids (g, k, d)."""
    centroids = seed_centroids(nodes.sample(SEEDING_ROWS * k, seeds), k, seeds)
    for _ in range(iterations):
        centroids = nodes.centroids(nodes.similarity(centroids).argmax(-1), centroids)
    return centroids


def seed_centroids(nodes: Nodes, k: int, seeds: np.ndarray) -> Tensor:
    """k-means++ on the sphere: k rows (g, k, d) a node, drawn in proportion to 1 - cosine to the nearest so far."""
    rows, present = nodes.rows, nodes.mask.float()
    random = uniforms(seeds, k).to(rows.device)
    node = torch.arange(len(rows), device=rows.device)
    distance = present
    centroids = rows.new_empty(len(rows), k, rows.shape[2])
    for i in range(k):
        weight = torch.where(distance.any(1, keepdim=True), distance, present).double().cumsum(1)
        pick = torch.searchsorted(weight, random[:, i, None] * weight[:, -1:], right=True).clamp_max(rows.shape[1] - 1)
        centroids[:, i] = rows[node, pick[:, 0]]
        away = 1 - torch.bmm(rows, centroids[:, i, :, None])[:, :, 0]
        distance = away.clamp_min(0) * present if i == 0 else distance.minimum(away.clamp_min(0))
    return centroids


def balancing_prices(
    similarity: Tensor, mask: Tensor, capacity: Tensor, start: Tensor, rates: tuple[float, ...]
) -> Tensor:
    """Prices (g, k) >= 0 of children with a ``capacity`` (g, k) in rows: dual ascent from ``start``.

    Minimises the dual of the transport problem, sum_i max_k(similarity - price) + sum_k capacity * price, by
    subgradient steps at ``rates``, in units of the node's mean spread of similarities. Returns the best prices met,
    lest one end higher than it need be.
    """
    present, k = mask.to(similarity.dtype), similarity.shape[2]
    spread = ((similarity.amax(-1) - similarity.mean(-1)) * present).sum(1, keepdim=True) / present.sum(1, keepdim=True)
    prices = best = start
    least = torch.full_like(spread, torch.inf)
    for rate in rates:
        score, child = _best_scores(similarity, prices)
        dual = torch.linalg.vecdot(score, present)[:, None] + (capacity * prices).sum(1, keepdim=True)
        best = torch.where(dual < least, prices, best)
        least = least.minimum(dual)
        prices = (prices + rate * spread * (count(child, mask, k) / capacity - 1)).clamp_min(0)
    return best


def dearest(similarity: Tensor, prices: Tensor) -> Tensor:
    """The child (g, M) with the largest similarity - price for each row; the lowest number on ties."""
    return _best_scores(similarity, prices)[1]


def _best_scores(similarity: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    score = similarity.new_empty(similarity.shape[:2])
    child = torch.empty_like(score, dtype=torch.int64)
    step = max(1, BLOCK_FLOATS // similarity[:, 0].numel())
    for rows, best, which in zip(similarity.split(step, 1), score.split(step, 1), child.split(step, 1), strict=True):
        torch.max(rows - prices[:, None], dim=-1, out=(best, which))
    return score, child


def capacities(counts: Tensor, capacity_factor: float, limit: int) -> Tensor:
    """Rows (g, k) each child may hold: ceil(capacity_factor n) shared out, the odd ones to the children in demand.

    With capacity_factor 1 the children's sizes differ by at most one. Sums to n or more where k * limit does.
    """
    n, k = counts.sum(1, keepdim=True), counts.shape[1]
    total = (n.double() * min(capacity_factor, k)).ceil().long()
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (total // k + (rank < total % k)).clamp_max(limit)


def repair(similarity: Tensor, child: Tensor, mask: Tensor, room: Tensor) -> Tensor:
    """Move the rows that lose least out of over-full children into children with room, until none is over-full.

    Where a move is refused its target has become full, so at most k rounds are needed. Ties go to the lower row.
    """
    child, k = child.clone(), room.shape[1]
    while bool(((excess := count(child, mask, k) - room) > 0).any()):
        node, row = ((excess > 0).gather(1, child) & mask).nonzero(as_tuple=True)
        source = child[node, row]
        scores = similarity[node, row]  # (c, k)
        best, target = scores.masked_fill((excess >= 0)[node], -torch.inf).max(1)
        loss = scores.gather(1, source[:, None])[:, 0] - best
        leaves = rank_in_group(node * k + source, loss) < excess[node, source]
        node, row, target, loss = node[leaves], row[leaves], target[leaves], loss[leaves]
        enters = rank_in_group(node * k + target, loss) < -excess[node, target]
        child[node[enters], row[enters]] = target[enters]
    return child


def rank_in_group(group: Tensor, value: Tensor) -> Tensor:
    """Rank (n,) of each value among those of its group, from 0; ties in the order given."""
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    grouped = group[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(grouped, grouped)
    return rank


def count(child: Tensor, mask: Tensor, k: int) -> Tensor:
    """Rows (g, k) int64 of each child, padding left out."""
    return torch.zeros(len(child), k, dtype=torch.int64, device=child.device).scatter_add_(1, child, mask.long())


def node_seeds(seed: int, depth: int, paths: np.ndarray) -> np.ndarray:
    """A uint64 seed (g,) for each node, from its depth and path alone."""
    root = _mix(np.array([seed % 2**64, depth], np.uint64))
    return _mix(_mix(paths.astype(np.uint64) ^ root[0]) ^ root[1])


def uniforms(seeds: np.ndarray, n: int, *, stream: int = 0) -> Tensor:
    """Uniform numbers (g, n) float64 in [0, 1), counter-based: SplitMix64 from each of ``seeds`` (g,)."""
    counters = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(stream << 40)
    bits = _mix(seeds[:, None] + _GOLDEN * counters)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, which turns counters into random bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
