"""Prices of children that have capacities: at the right ones, each row takes the child that is dearest to it and no
child is taken by more rows than it has room for.

Entry: `Market`, what rows want at given prices; `final_prices`, from prices that are nearly right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from gif.codes.blocks import block_floats

CACHE_FLOATS = 1 << 18  # similarities that demand is counted on at a time by a CPU: 1 MiB, that stays in its caches
FINAL_RATES = tuple(0.05 * 0.7**i for i in range(6))  # of a node's mean spread; from prices that are nearly right
MISPLACED = 0.01  # of a node's rows by which children with a price are not just full: beyond, prices are refined
REFINING_ROUNDS = 30
FASTER, SLOWER = 1.2, 0.5  # a price's next step where demand still errs to the same side, and where it has crossed


class Market:
    """What rows want at given prices: ``similarity`` (g, M, k), ``mask`` (g, M), False on padding, ``capacity`` (g, k).

    Similarities whose rows are last in memory, as `Nodes.similarity` makes them, are read as they are, so that the
    largest of k is found for many rows at a time.
    """

    def __init__(self, similarity: Tensor, mask: Tensor, capacity: Tensor) -> None:
        self._similarity = similarity.mT.contiguous()
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
        wanted = torch.zeros_like(prices)
        for nodes, columns in self._tiles():
            present = self._present[nodes, columns]
            best, member = takers(self._similarity[nodes, :, columns], prices[nodes])
            dual[nodes] += torch.linalg.vecdot(best, present[:, None])
            wanted[nodes] += torch.linalg.vecdot(member, present[:, None])  # whole numbers, exact up to 2^24
        return dual, wanted

    def takers(self, prices: Tensor) -> tuple[Tensor, Tensor]:
        """The dual objective (g,) at ``prices`` (g, k), a row; and 1 (g, k, M) where a row wants a child, else 0."""
        best, member = takers(self._similarity, prices)
        dual = (self.capacity * prices).sum(1) + torch.linalg.vecdot(best[:, 0], self._present)
        return dual / self.rows[:, 0], member

    def wanted(self, member: Tensor) -> Tensor:
        """How many rows (g, k) want each child, of ``member`` (g, k, M)."""
        return torch.linalg.vecdot(member, self._present[:, None])

    def dearer(self, prices: Tensor, wanted: Tensor, rate: float) -> Tensor:
        """Prices (g, k) >= 0, a subgradient step of the dual at ``prices``, at which (g, k) rows wanted each child.

        That is the dual of the transport problem, sum_i max_k(similarity - price) + sum_k capacity * price. ``rate`` is
        in units of the node's mean spread of similarities.
        """
        return (prices + rate * self.spread * (wanted / self.capacity - 1)).clamp_min(0)

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the nodes and of their rows whose similarities fit a CPU's cache, or a block of another device."""
        g, k, width = self._similarity.shape
        device = self._similarity.device
        floats = CACHE_FLOATS if device.type == "cpu" else block_floats(device)
        nodes = min(g, max(1, floats // (k * width)))
        columns = max(1, floats // (k * nodes))
        for first in range(0, g, nodes):
            for begin in range(0, width, columns):
                yield slice(first, first + nodes), slice(begin, begin + columns)


def takers(similarity: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """The best (g, 1, M) of ``similarity`` (g, k, M) less ``prices`` (g, k), and 1 (g, k, M) where it is that."""
    score = similarity - prices[:, :, None]
    best = score.amax(1, keepdim=True)
    return best, torch.ge(score, best, out=score)


def which(member: Tensor) -> Tensor:
    """The child (g, M) of each row, of ``member`` (g, k, M): the last that it wants."""
    number = torch.arange(member.shape[1], dtype=member.dtype, device=member.device)
    return (member * number[:, None]).amax(1).long()


def balancing_prices(market: Market, initial: Tensor, rates: Sequence[float]) -> Tensor:
    """Prices (g, k) >= 0 of children with capacities: dual ascent from ``initial`` ones.

    At ``rates`` in units of the node's mean spread of similarities. Returns the best prices met, lest one end higher
    than it need be.
    """
    prices = best = initial
    least = torch.full_like(market.spread, torch.inf)
    for rate in rates:
        dual, wanted = market.demand(prices)
        best = torch.where(dual < least, prices, best)
        least = least.minimum(dual)
        prices = market.dearer(prices, wanted, rate)
    return best


def final_prices(market: Market, initial: Tensor, from_sample: Tensor) -> Tensor:
    """Prices (g, k) at which nearly all rows fit, given ``initial`` ones that are nearly right.

    ``from_sample`` (g, 1) bool says of which nodes the initial prices come from a sample of the rows: only those may
    be so far off that they are refined.
    """
    return _refined(market, balancing_prices(market, initial, FINAL_RATES), from_sample)


def _refined(market: Market, initial: Tensor, from_sample: Tensor) -> Tensor:
    """Better prices for the nodes ``from_sample`` whose ``initial`` ones (g, k) are off by more than MISPLACED rows.

    At the optimum a child with a price is just full, and a child without a price is not over-full.

    Where all capacities bind, prices depend on each other, and steps in proportion to demand take hundreds of rounds.
    Here a step has the sign of what demand errs by, and a length of its own (Rprop: Riedmiller and Braun, 1993).
    """
    least, wanted = market.demand(initial)
    excess = wanted - market.capacity
    misplaced = torch.where(initial > 0, excess.abs(), excess.clamp_min(0)).sum(1, keepdim=True)
    refined = (misplaced > MISPLACED * market.rows) & from_sample
    if not bool(refined.any()):
        return initial
    prices = best = initial
    step, last = (FINAL_RATES[0] * market.spread).expand_as(initial), torch.zeros_like(initial)
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
    step = max(1, block_floats(similarity.device) // (similarity.shape[0] * similarity.shape[2]))
    for rows, which in zip(similarity.split(step, 1), child.split(step, 1), strict=True):
        which.copy_((rows - prices[:, None]).max(-1)[1])  # argmax is slower where rows are last in memory
    return child
