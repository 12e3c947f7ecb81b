"""One level of balanced spherical k-means: many nodes at once, each cut into k children that have capacities.

`split` is the entry: k-means on a sample of each node's rows, in a sketch of them (here, `gif.codes.sketch`), with
prices that make nearly every child fit (`gif.codes.prices`), and the moves that make all fit (`gif.codes.repair`).

Nodes are padded to the largest and every step is a batched product or an integer count, so that a level of 160,000
small nodes costs what its rows cost. A node of more rows than a block is streamed: its centroids and prices come from a
sample, each row is read once for its child and again where it might have to move, and a row costs some bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gif.codes.nodes import Nodes, Scores, strata
from gif.codes.prices import FINAL_RATES, Market, balancing_prices, final_prices, which
from gif.codes.repair import capacities, repair
from gif.codes.sketch import sketch
from gif.codes.splitmix import uniforms
from gif.seeds import mix
from gif_kernels.sphere import inverse_norm, unit

SEEDING_ROWS = 64  # k-means++ and the rounds before its starts are compared look at this many rows a child at most
CANDIDATES = 2  # rows it draws for each centroid
LLOYD_ROWS = 256  # and Lloyd's rounds at this many; the assignment sees every row
RESTARTS = 16  # of k-means in a node of so many samples' rows, for the seeding decides most; else as many as it has
TRIAL_ROUNDS = 5  # before the starts are compared
BALANCING_ROUNDS = 2  # of all: those before the last, which is of whole rows
BALANCING_RATES = FINAL_RATES[:3]
MARKET_ROWS = 512  # a child, from which the prices of a large node come; repair moves what they err by
DISTANCE_UNIT = 2.0**-24  # 1 - cosine in float32 is a whole multiple of it
FIRST_RATE, LAST_RATE = 0.4, 0.1  # of prices in the rounds of k-means, in units of the mean spread of similarities


def split(
    nodes: Nodes, k: int, *, capacity_factor: float, limit: int, iterations: int, seeds: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Cut each node of n rows into k children of at most min(limit, ceil(capacity_factor n / k)) rows.

    Spherical k-means (k-means++, then Lloyd) within the capacities: a child has a price >= 0, rows take the largest
    similarity - price, and prices rise where too many come. ``seeds`` (g,) make a node's result independent of the
    nodes beside it. Needs k * limit >= n.

    Returns child (g, M) uint8 in [0, k), meaningless on padding, and the sum (g, k, d) of each child's unit rows. Of
    shared nodes child is that of this process's own columns.
    """
    sample, own = nodes.sample(LLOYD_ROWS * k, seeds), nodes.own(k)
    share = largest_share(nodes, k, capacity_factor, limit)
    attempts = (nodes.sizes // (LLOYD_ROWS * k)).clamp(1, RESTARTS)
    points = Points.sketched(sample, k)
    start = best_start(points.sample(SEEDING_ROWS * k, seeds), k, share, attempts, seeds)
    centroids, prices, _ = rounds(points, start, share, max(0, iterations - BALANCING_ROUNDS - 1))
    prices, member = balanced(points, centroids, prices, share)
    centroids = unit(sample.sums(which(member), k))
    child = assign(nodes, centroids, prices, capacity_factor=capacity_factor, limit=limit, seeds=seeds)
    return child, own.sums(child, k)


@dataclass(frozen=True)
class Points:
    """What rounds of k-means look at: rows (g, M, s) of g nodes, zero on padding; mask: (g, M), False there."""

    rows: Tensor
    mask: Tensor

    @classmethod
    def sketched(cls, nodes: Nodes, k: int) -> Points:
        """The unit rows of ``nodes`` in fewer columns, made in blocks that go with (., k)."""
        sketches = [sketch(rows.values) * rows.scale[:, :, None] for _, rows in nodes.blocks(k)]
        return cls(sketches[0] if len(sketches) == 1 else torch.cat(sketches, 1), nodes.mask)

    def sample(self, rows: int, seeds: np.ndarray) -> Points:
        """``rows`` of each node, as `Nodes.sample` draws them; all where it has fewer."""
        if self.mask.shape[1] <= rows:
            return self
        position, mask = strata(self.mask.sum(1), rows, seeds)
        found = self.rows.gather(1, position[:, :, None].expand(-1, -1, self.rows.shape[2]))
        return Points(found * mask[:, :, None], mask)

    def of(self, node: Tensor) -> Points:
        """Those of each ``node`` (n,), of which some may be named repeatedly."""
        if len(self.rows) == 1:  # in memory once
            return Points(self.rows.expand(len(node), -1, -1), self.mask.expand(len(node), -1))
        return self if len(node) == len(self.rows) else Points(self.rows[node], self.mask[node])

    def market(self, centroids: Tensor, share: Tensor) -> Market:
        """What they want of ``centroids`` (g, k, s) that may have a ``share`` (g, 1) of them each."""
        return Market(torch.bmm(centroids, self.rows.mT).mT, self.mask, share * self.mask.sum(1, keepdim=True))

    def means(self, member: Tensor, empty: Tensor) -> Tensor:
        """Unit mean (g, k, s) of the rows that each child has, of ``member`` (g, k, M); of none ``empty`` (g, k, s)."""
        sums = torch.bmm(member, self.rows)
        factor = inverse_norm(sums)
        return torch.where(factor > 0, sums * factor, empty)


def best_start(points: Points, k: int, share: Tensor, attempts: Tensor, seeds: np.ndarray) -> Tensor:
    """Centroids (g, k, s) to start from: the best of ``attempts`` (g,) times k-means++ and a few rounds.

    What is compared is the dual objective, that no assignment within the capacities can pass.
    """
    node = torch.arange(len(attempts), device=attempts.device).repeat_interleave(attempts)
    first = attempts.cumsum(0) - attempts
    number = (torch.arange(len(node), device=node.device) - first[node]).cpu().numpy()
    several = seeds[node.cpu().numpy()]
    start = seed_centroids(points.of(node), k, np.where(number == 0, several, mix(several + number.astype(np.uint64))))
    if len(node) == len(attempts):
        return start
    tried, _, dual = rounds(points.of(node), start, share[node], TRIAL_ROUNDS)
    best = _first_largest(dual, first, attempts)
    return torch.where((attempts > 1)[:, None, None], tried[best], start[first])


def _first_largest(value: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Where the largest of each node's ``count`` (g,) values from ``first`` (g,) on is, or the first of them: (g,)."""
    place = torch.arange(int(count.max()), device=value.device)
    of_node = value[(first[:, None] + place).clamp_max(len(value) - 1)]
    return first + of_node.masked_fill_(place >= count[:, None], -torch.inf).argmax(1)


def rounds(points: Points, centroids: Tensor, share: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of k-means from ``centroids`` (g, k, s), each with a step of the prices.

    Returns centroids, prices (g, k) at which nearly no child has more than its ``share`` (g, 1) of the rows, and the
    dual objective (g,) at them.
    """
    prices = torch.zeros_like(centroids[:, :, 0])
    for rate in np.geomspace(FIRST_RATE, LAST_RATE, iterations):
        market = points.market(centroids, share)
        member = market.takers(prices)[1]
        prices = market.dearer(prices, market.wanted(member), rate)
        centroids = points.means(member, centroids)
    return centroids, prices, points.market(centroids, share).takers(prices)[0]


def balanced(points: Points, centroids: Tensor, prices: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Better prices (g, k), and who takes which row (g, k, M) at them, after rounds whose prices are right in each."""
    for _ in range(BALANCING_ROUNDS):
        market = points.market(centroids, share)
        prices = balancing_prices(market, prices, BALANCING_RATES)
        centroids = points.means(market.takers(prices)[1], centroids)
    return prices, points.market(centroids, share).takers(prices)[1]


def seed_centroids(points: Points, k: int, seeds: np.ndarray) -> Tensor:
    """Greedy k-means++ on the sphere: k rows (g, k, s) of each node.

    Candidates are drawn in proportion to 1 - cosine to the nearest so far; the one that leaves the least sum is taken.
    """
    rows, present = points.rows, points.mask
    random = uniforms(seeds, k * CANDIDATES).view(-1, k, CANDIDATES).to(rows.device)
    node = torch.arange(len(rows), device=rows.device)
    distance = 2 * present.to(rows.dtype)  # the largest 1 - cosine
    least = present.long()  # where all distances are zero each row is as likely
    centroids = rows.new_empty(len(rows), k, rows.shape[2])
    for i in range(k):
        weight = (distance / DISTANCE_UNIT).long().add_(least).cumsum(1)  # exact: the same in any order, on any device
        drawn = (random[:, i] * weight[:, -1:]).long()
        pick = torch.searchsorted(weight, drawn, right=True).clamp_max(rows.shape[1] - 1)
        candidates = rows[node[:, None], pick]
        away = (1 - torch.bmm(candidates, rows.mT)).clamp_min_(0).minimum(distance[:, None])
        best = away.sum(2).argmin(1)
        centroids[:, i], distance = candidates[node, best], away[node, best]
    return centroids


def assign(
    nodes: Nodes, centroids: Tensor, prices: Tensor, *, capacity_factor: float, limit: int, seeds: np.ndarray
) -> Tensor:
    """The child (g, M) uint8 of each row, within the capacities, from ``prices`` (g, k) that are nearly right."""
    scores = Scores(nodes, centroids)
    child = scores.dearest(_prices_of_all(nodes, scores, prices, capacity_factor, limit, seeds))
    return repair(scores, child, capacities(scores.count(child), capacity_factor, limit))


def _prices_of_all(
    nodes: Nodes, scores: Scores, prices: Tensor, capacity_factor: float, limit: int, seeds: np.ndarray
) -> Tensor:
    """Prices (g, k) for all rows, or as many as fit a block; what they come from is let go of."""
    k = prices.shape[1]
    sample, similarity = scores.sample(MARKET_ROWS * k, seeds)
    capacity = largest_share(nodes, k, capacity_factor, limit) * sample.sizes[:, None]
    market = Market(similarity, sample.mask, capacity)
    return final_prices(market, prices, sample.sizes[:, None] > LLOYD_ROWS * k)


def largest_share(nodes: Nodes, k: int, capacity_factor: float, limit: int) -> Tensor:
    """(g, 1): how much of a node's rows one child may take."""
    return (limit / nodes.sizes).clamp_max(capacity_factor / k)[:, None]


def kmeans(nodes: Nodes, k: int, iterations: int, seeds: np.ndarray) -> Tensor:
    """Spherical k-means without capacities: unit centroids (g, k, d)."""
    seeding = nodes.sample(SEEDING_ROWS * k, seeds)
    centroids = seed_centroids(Points(seeding.rows.unit, seeding.mask), k, seeds)
    for _ in range(iterations):
        centroids = nodes.centroids(nodes.similarity(centroids).argmax(-1), centroids)
    return centroids
