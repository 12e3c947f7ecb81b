"""From an assignment that exceeds some capacities to one that keeps them all, at the least loss of cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from gif.codes.blocks import column_blocks
from gif.codes.nodes import Scores, count


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


def capacities(counts: Tensor, capacity_factor: float, limit: int) -> Tensor:
    """Rows (g, k) each child may hold: ceil(capacity_factor n) shared out, the odd ones to the children in demand.

    With capacity_factor 1 the children's sizes differ by at most one. Sums to n or more where k * limit does.
    """
    n, k = counts.sum(1, keepdim=True), counts.shape[1]
    total = (n.double() * min(capacity_factor, k)).ceil().long()
    rank = counts.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (total // k + (rank < total % k)).clamp_max(limit)


def rank_in_group(group: Tensor, value: Tensor) -> Tensor:
    """Rank (n,) of each value among those of its group, from 0; ties in the order given."""
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    grouped = group[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(grouped, grouped)
    return rank
