"""One level of balanced spherical k-means: many nodes at once, each cut into k children that have capacities.

`split` is the entry: k-means on a sample of each node's rows (here), prices that make nearly every child fit
(`gif.codes.prices`), and the moves that make all of them fit (`gif.codes.repair`).

Nodes are padded to the largest and every step is a batched product or an integer count, so that a level of 160,000
small nodes costs what its rows cost. A node of more rows than a block is streamed: its centroids and prices come from a
sample, each row is read once for its child and again where it might have to move, and a row costs some bytes.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from gif.codes.nodes import Nodes, Scores
from gif.codes.prices import PRICE_RATES, Market, balancing_prices, dearest, final_prices
from gif.codes.repair import capacities, repair
from gif.codes.splitmix import uniforms
from gif.seeds import mix

SEEDING_ROWS = 64  # k-means++ looks at this many rows a child at most
CANDIDATES = 2  # rows it draws for each centroid
LLOYD_ROWS = 256  # and Lloyd's rounds at this many; the last assignment sees every row
DISTANCE_UNIT = 2.0**-24  # 1 - cosine in float32 is a whole multiple of it
RESTARTS = 8  # of k-means in a node of so many samples' rows, for the seeding decides most; else as many as it has
BALANCING_ROUNDS = 3  # assignment within the capacities, and new centroids


def split(
    nodes: Nodes, k: int, *, capacity_factor: float, limit: int, iterations: int, seeds: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Cut each node of n rows into k children of at most min(limit, ceil(capacity_factor n / k)) rows.

    Spherical k-means (k-means++, then Lloyd), and then the assignment that keeps the capacities and loses little
    cosine: a child has a price >= 0, rows take the largest similarity - price, and prices rise where too many come.
    ``seeds`` (g,) make a node's result independent of the nodes beside it. Needs k * limit >= n.

    Returns child (g, M) uint8 in [0, k), meaningless on padding, and the sum (g, k, d) of each child's unit rows. Of
    shared nodes child is that of this process's own columns.
    """
    sample = nodes.sample(LLOYD_ROWS * k, seeds)
    capacity = largest_share(nodes, k, capacity_factor, limit) * sample.sizes[:, None]
    centroids, prices, cosine = balanced_kmeans(sample, k, capacity, iterations, seeds)
    attempts = (nodes.sizes // (LLOYD_ROWS * k)).clamp(1, RESTARTS)
    for attempt in range(1, int(attempts.max())):
        others = balanced_kmeans(sample, k, capacity, iterations, mix(seeds + np.uint64(attempt)))
        better = ((attempts > attempt) & (others[2] > cosine))[:, None]
        centroids = torch.where(better[:, :, None], others[0], centroids)
        prices = torch.where(better, others[1], prices)
        cosine = torch.where(better[:, 0], others[2], cosine)
    assigned = partial(assign, nodes, capacity_factor=capacity_factor, limit=limit, seeds=seeds)
    own, child = nodes.own(k), assigned(centroids, prices)
    sampled = attempts > 1
    if bool(sampled.any()):  # a sample's centroids fit its own rows best: once more from those of all rows
        centroids = torch.where(sampled[:, None, None], own.centroids(child, centroids), centroids)
        child = assigned(centroids, prices)
    return child, own.sums(child, k)


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
    scores = Scores(nodes, centroids)
    child = scores.dearest(_prices_of_all(nodes, scores, prices, capacity_factor, limit, seeds))
    return repair(scores, child, capacities(scores.count(child), capacity_factor, limit))


def _prices_of_all(
    nodes: Nodes, scores: Scores, prices: Tensor, capacity_factor: float, limit: int, seeds: np.ndarray
) -> Tensor:
    """Prices (g, k) for all rows, or as many as fit a block; what they come from is let go of."""
    k = prices.shape[1]
    sample, similarity = scores.sample(seeds)
    capacity = largest_share(nodes, k, capacity_factor, limit) * sample.sizes[:, None]
    market = Market(similarity, sample.mask, capacity)
    return final_prices(market, prices, sample.sizes[:, None] > LLOYD_ROWS * k)


def largest_share(nodes: Nodes, k: int, capacity_factor: float, limit: int) -> Tensor:
    """(g, 1): how much of a node's rows one child may take."""
    return (limit / nodes.sizes).clamp_max(capacity_factor / k)[:, None]


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
