"""One level of balanced spherical k-means: many nodes at once, each cut into k children that have capacities.

Nodes are padded to the largest and every step is a batched product or an integer count, so that a level of 160,000
small nodes costs what its rows cost. A node of more rows than a block is streamed: its centroids and prices come from a
sample, each row is read once for its child and again where it might have to move, and a row costs some bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from gif.codes.segments import BLOCK_FLOATS, blocks_at_once
from gif_kernels.sphere import unit

SEEDING_ROWS = 64  # k-means++ looks at this many rows a child at most
CANDIDATES = 2  # rows it draws for each centroid
LLOYD_ROWS = 256  # and Lloyd's rounds at this many; the last assignment sees every row
CACHE_FLOATS = 1 << 18  # similarities that demand is counted on at a time by a CPU: 1 MiB, that stays in its caches
DISTANCE_UNIT = 2.0**-24  # 1 - cosine in float32 is a whole multiple of it
ANY_CHILD = 1e30  # a similarity beside which no price shows
STARTS = 8  # of k-means in a node that has as many samples' rows, for the seeding decides most; else as many as it has
BALANCING_ROUNDS = 3  # assignment within the capacities, and new centroids
PRICE_RATES = tuple(0.2 * 0.88**i for i in range(30))  # of a node's mean spread of similarities; falls to 0.005
FINAL_RATES = tuple(0.02 * 0.86**i for i in range(10))  # from prices that are nearly right already
MISPLACED = 0.01  # of a node's rows by which children with a price are not just full: beyond, prices are refined
REFINING_ROUNDS = 60
FASTER, SLOWER = 1.2, 0.5  # a price's next step where demand still errs to the same side, and where it has crossed


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
        for start in range(0, width, step):
            columns = slice(start, start + step)
            yield columns, self._gather(columns)

    def _gather(self, columns: slice) -> Tensor:
        rows = self.table[self.index[:, columns]].float()
        rows /= torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        return rows if self.full else rows.mul_(self.mask[:, columns, None])


def split(
    nodes: Nodes, k: int, *, capacity_factor: float, limit: int, iterations: int, seeds: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Cut each node of n rows into k children of at most min(limit, ceil(capacity_factor n / k)) rows.

    Spherical k-means (k-means++, then Lloyd), and then the assignment that keeps the capacities and loses little
    cosine: a child has a price >= 0, rows take the largest similarity - price, and prices rise where too many come.
    ``seeds`` (g,) make a node's result independent of the nodes beside it. Needs k * limit >= n.

    Returns child (g, M) uint8 in [0, k), meaningless on padding, and the sum (g, k, d) of each child's unit rows.
    """
    sample = nodes.sample(LLOYD_ROWS * k, seeds)
    capacity = largest_share(nodes, k, capacity_factor, limit) * sample.sizes[:, None]
    centroids, prices, cosine = balanced_kmeans(sample, k, capacity, iterations, seeds)
    starts = (nodes.sizes // (LLOYD_ROWS * k)).clamp(1, STARTS)
    for start in range(1, int(starts.max())):
        others = balanced_kmeans(sample, k, capacity, iterations, _mix(seeds + np.uint64(start)))
        better = ((starts > start) & (others[2] > cosine))[:, None]
        centroids = torch.where(better[:, :, None], others[0], centroids)
        prices = torch.where(better, others[1], prices)
        cosine = torch.where(better[:, 0], others[2], cosine)
    assigned = partial(assign, nodes, capacity_factor=capacity_factor, limit=limit, seeds=seeds)
    child = assigned(centroids, prices)
    sampled = starts > 1
    if bool(sampled.any()):  # a sample's centroids fit its own rows best: once more from those of all rows
        centroids = torch.where(sampled[:, None, None], nodes.centroids(child, centroids), centroids)
        child = assigned(centroids, prices)
    return child, nodes.sums(child, k)


def balanced_kmeans(
    sample: Nodes, k: int, capacity: Tensor, iterations: int, seeds: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit centroids (g, k, d), prices (g, k) that keep the ``capacity`` (g, 1) nearly, and the mean cosine (g,) so."""
    centroids = kmeans(sample, k, iterations, seeds)
    prices = torch.zeros_like(centroids[:, :, 0])
    for _ in range(BALANCING_ROUNDS):
        similarity = sample.similarity(centroids)
        prices = balancing_prices(Market(similarity, sample.mask, capacity), prices, PRICE_RATES)
        child = dearest(similarity, prices)
        centroids = sample.centroids(child, centroids)
    kept = similarity.gather(2, child[:, :, None])[:, :, 0]
    return centroids, prices, (kept * sample.mask).sum(1) / sample.sizes


def assign(
    nodes: Nodes, centroids: Tensor, prices: Tensor, *, capacity_factor: float, limit: int, seeds: np.ndarray
) -> Tensor:
    """The child (g, M) uint8 of each row, within the capacities, from ``prices`` (g, k) that are nearly right."""
    k = centroids.shape[1]
    scores = Scores(nodes, centroids)
    sample, similarity = scores.sample(seeds)
    capacity = largest_share(nodes, k, capacity_factor, limit) * sample.sizes[:, None]
    market = Market(similarity, sample.mask, capacity)
    prices = refined_prices(market, balancing_prices(market, prices, FINAL_RATES))
    child = scores.dearest(prices)
    room = capacities(count(child, nodes.mask, k), capacity_factor, limit)
    return repair(scores, child, nodes.mask, room)


def largest_share(nodes: Nodes, k: int, capacity_factor: float, limit: int) -> Tensor:
    """(g, 1): how much of a node's rows one child may take."""
    return (limit / nodes.sizes).clamp_max(capacity_factor / k)[:, None]


class Scores:
    """Cosines of the rows of ``nodes`` to ``centroids`` (g, k, d): held where they fit a block, else made on demand."""

    def __init__(self, nodes: Nodes, centroids: Tensor) -> None:
        self._nodes, self._centroids = nodes, centroids
        fit = nodes.index.numel() * centroids.shape[1] <= block_floats(centroids.device)
        self._held = nodes.similarity(centroids) if fit else None

    def sample(self, seeds: np.ndarray) -> tuple[Nodes, Tensor]:
        """Nodes of as many rows as fit a CPU's block, whatever the device, and their similarity."""
        sample = self._nodes.sample(max(1, BLOCK_FLOATS // self._centroids.shape[1]), seeds)
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


def kmeans(nodes: Nodes, k: int, iterations: int, seeds: np.ndarray) -> Tensor:
    """Spherical k-means without capacities: unit centroids (g, k, d)."""
    centroids = seed_centroids(nodes.sample(SEEDING_ROWS * k, seeds), k, seeds)
    for _ in range(iterations):
        centroids = nodes.centroids(nodes.similarity(centroids).argmax(-1), centroids)
    return centroids


def seed_centroids(nodes: Nodes, k: int, seeds: np.ndarray) -> Tensor:
    """Greedy k-means++ on the sphere: k rows (g, k, d) of each node.

    Candidates are drawn in proportion to 1 - cosine to the nearest so far; the one that leaves the least sum is taken.
    """
    rows, present = nodes.rows, nodes.mask.float()
    random = uniforms(seeds, k * CANDIDATES).view(-1, k, CANDIDATES).to(rows.device)
    node = torch.arange(len(rows), device=rows.device)
    distance = 2 * present  # the largest 1 - cosine
    centroids = rows.new_empty(len(rows), k, rows.shape[2])
    for i in range(k):
        weight = torch.where(distance.any(1, keepdim=True), distance, present)
        weight = (weight / DISTANCE_UNIT).long().cumsum(1).double()  # exact: the same in any order, on any device
        pick = torch.searchsorted(weight, random[:, i] * weight[:, -1:], right=True).clamp_max(rows.shape[1] - 1)
        candidates = rows[node[:, None], pick]
        away = (1 - torch.bmm(candidates, rows.mT)).clamp_min(0).minimum(distance[:, None])
        best = away.sum(2).argmin(1)
        centroids[:, i], distance = candidates[node, best], away[node, best]
    return centroids


class Market:
    """What rows want at given prices: ``similarity`` (g, M, k), ``mask`` (g, M), False on padding, ``capacity`` (g, k).

    Similarities are kept with rows last, so that the largest of k is found for many rows at a time.
    """

    def __init__(self, similarity: Tensor, mask: Tensor, capacity: Tensor) -> None:
        self._similarity = similarity.mT.contiguous()
        self._similarity += torch.where(mask, 0, ANY_CHILD)[:, None]
        self._present = mask.to(similarity.dtype)
        self.capacity = capacity
        self.rows = mask.sum(1, keepdim=True)

    @cached_property
    def spread(self) -> Tensor:
        """(g, 1): how far a row's best similarity is above its mean, on average over a node's rows."""
        above = self._similarity.amax(1) - self._similarity.mean(1)
        return torch.linalg.vecdot(above, self._present)[:, None] / self.rows

    def demand(self, prices: Tensor) -> tuple[Tensor, Tensor]:
        """The dual objective (g, 1) at ``prices`` (g, k), and how many rows (g, k) want each child.

        A row whose best children are alike counts for each of them.
        """
        dual = (self.capacity * prices).sum(1, keepdim=True)
        wanted = self.rows.repeat(1, prices.shape[1])
        for nodes, columns in self._tiles():
            score = self._similarity[nodes, :, columns] - prices[nodes, :, None]
            best = score.amax(1, keepdim=True)
            dual[nodes] += torch.linalg.vecdot(best[:, 0], self._present[nodes, columns])[:, None]
            wanted[nodes] += score.sub_(best).sign_().sum(2).long()  # -1 where another child is better; 0 on padding
        return dual, wanted

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the nodes and of their rows whose similarities fit a CPU's cache, or a block of another device."""
        g, k, width = self._similarity.shape
        device = self._similarity.device
        floats = CACHE_FLOATS if device.type == "cpu" else block_floats(device)
        nodes = min(g, max(1, floats // (k * width)))
        columns = max(1, floats // (k * nodes))
        for first in range(0, g, nodes):
            for start in range(0, width, columns):
                yield slice(first, first + nodes), slice(start, start + columns)


def balancing_prices(market: Market, start: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Prices (g, k) >= 0 of children with capacities: dual ascent from ``start``.

    Minimises the dual of the transport problem, sum_i max_k(similarity - price) + sum_k capacity * price, by
    subgradient steps at ``rates``, in units of the node's mean spread of similarities. Returns the best prices met,
    lest one end higher than it need be.
    """
    prices = best = start
    least = torch.full_like(market.spread, torch.inf)
    for rate in rates:
        dual, wanted = market.demand(prices)
        best = torch.where(dual < least, prices, best)
        least = least.minimum(dual)
        prices = (prices + rate * market.spread * (wanted / market.capacity - 1)).clamp_min(0)
    return best


def refined_prices(market: Market, start: Tensor) -> Tensor:
    """Better prices for nodes whose ``start`` (g, k) came from a sample and is off by more than MISPLACED rows.

    At the optimum a child with a price is just full, and one without is not over-full.

    Where all capacities bind, prices depend on each other, and steps in proportion to demand take hundreds of rounds.
    Here a step has the sign of what demand errs by, and a length of its own (Rprop: Riedmiller and Braun, 1993).
    """
    prices = best = start
    k = start.shape[1]
    least, wanted = market.demand(start)
    excess = wanted - market.capacity
    misplaced = torch.where(start > 0, excess.abs(), excess.clamp_min(0)).sum(1, keepdim=True)
    refined = (misplaced > MISPLACED * market.rows) & (market.rows > LLOYD_ROWS * k)
    if not bool(refined.any()):
        return start
    step, last = (FINAL_RATES[0] * market.spread).expand_as(start), torch.zeros_like(start)
    for _ in range(REFINING_ROUNDS):
        sign = torch.sign(wanted - market.capacity)
        step = torch.where(sign * last > 0, step * FASTER, torch.where(sign * last < 0, step * SLOWER, step))
        prices, last = (prices + sign * step).clamp_min(0), sign
        dual, wanted = market.demand(prices)
        best = torch.where(refined & (dual < least), prices, best)
        least = least.minimum(dual)
    return best


def dearest(similarity: Tensor, prices: Tensor) -> Tensor:
    """The child (g, M) with the largest similarity - price for each row; the lowest number on ties."""
    child = torch.empty(similarity.shape[:2], dtype=torch.int64, device=similarity.device)
    step = max(1, block_floats(similarity.device) // similarity[:, 0].numel())
    for rows, which in zip(similarity.split(step, 1), child.split(step, 1), strict=True):
        torch.argmax(rows - prices[:, None], dim=-1, out=which)
    return child


def capacities(counts: Tensor, capacity_factor: float, limit: int) -> Tensor:
    """Rows (g, k) each child may hold: ceil(capacity_factor n) shared out, the odd ones to the children in demand.

    With capacity_factor 1 the children's sizes differ by at most one. Sums to n or more where k * limit does.
    """
    n, k = counts.sum(1, keepdim=True), counts.shape[1]
    total = (n.double() * min(capacity_factor, k)).ceil().long()
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (total // k + (rank < total % k)).clamp_max(limit)


def repair(scores: Scores, child: Tensor, mask: Tensor, room: Tensor) -> Tensor:
    """Move the rows that lose least out of over-full children into children with room, until none is over-full.

    Where a move is refused its target has become full, so at most k rounds are needed. Ties go to the lower row.
    """
    child, k = child.clone(), room.shape[1]
    while bool(((excess := count(child, mask, k) - room) > 0).any()):
        crowded = torch.zeros_like(mask)
        for columns in column_blocks(mask):
            crowded[:, columns] = (excess > 0).gather(1, child[:, columns].long()) & mask[:, columns]
        node, row, target, loss = scores.moves(child, crowded, excess < 0)
        source = child[node, row].long()
        leaves = (rank_in_group(node * k + source, loss) < excess[node, source]).nonzero()[:, 0]
        node, row, target, loss = node[leaves], row[leaves], target[leaves], loss[leaves]
        enters = (rank_in_group(node * k + target, loss) < -excess[node, target]).nonzero()[:, 0]
        child[node[enters], row[enters]] = target[enters].to(child.dtype)
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
    counts = torch.zeros(len(child), k, dtype=torch.int64, device=child.device)
    for columns in column_blocks(mask):
        counts.scatter_add_(1, child[:, columns].long(), mask[:, columns].long())
    return counts


def block_floats(device: torch.device) -> int:
    """Floats that are worked on at a time."""
    return BLOCK_FLOATS * blocks_at_once(device)


def column_blocks(mask: Tensor) -> Iterator[slice]:
    """Slices of the columns of ``mask`` (g, M) that hold about a block of entries."""
    step = max(1, block_floats(mask.device) // max(1, len(mask)))
    return (slice(start, start + step) for start in range(0, mask.shape[1], step))


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
