"""From an assignment that exceeds some capacities to one that keeps them all, at the least loss of cosine."""

from __future__ import annotations

from torch import Tensor

from gif.codes.nodes import Scores


def repair(scores: Scores, child: Tensor, room: Tensor) -> Tensor:
    """Move the rows that lose least out of over-full children into children with ``room`` (g, k), in place.

    Until none is over-full: where a move is refused its target has become full, so at most k rounds are needed. Ties
    go to the lower row. Returns ``child`` (g, M).
    """
    while bool(((excess := scores.count(child) - room) > 0).any()):
        scores.move(child, scores.leaving(child, excess).entering(-excess))
    return child


def capacities(counts: Tensor, capacity_factor: float, limit: int) -> Tensor:
    """Rows (g, k) each child may hold: ceil(capacity_factor n) shared out, the odd ones to the children in demand.

    With capacity_factor 1 the children's sizes differ by at most one. Sums to n or more where k * limit does.
    """
    n, k = counts.sum(1, keepdim=True), counts.shape[1]
    total = (n.double() * min(capacity_factor, k)).ceil().long()
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (total // k + (rank < total % k)).clamp_max(limit)
