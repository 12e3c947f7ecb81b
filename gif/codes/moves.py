"""Rows that would move from one child to another, and which of them may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moves:
    """Rows that would move: (n,) each. node, row: whose child it is; source, target: which, and which it would be.

    loss: of cosine. 14 bytes each, for there may be as many as rows.
    """

    node: Tensor
    row: Tensor
    source: Tensor
    target: Tensor
    loss: Tensor

    @classmethod
    def of(cls, node: Tensor, row: Tensor, source: Tensor, target: Tensor, loss: Tensor, index: torch.dtype) -> Moves:
        """Moves with nodes and rows as ``index``, an integer dtype."""
        return cls(node.to(index), row.to(index), source.to(torch.uint8), target.to(torch.uint8), loss)

    @classmethod
    def none(cls, device: torch.device, index: torch.dtype) -> Moves:
        """Not one."""
        empty = torch.empty(0, device=device)
        return cls.of(empty, empty, empty, empty, empty, index)

    def map(self, function: Callable[[Tensor], Tensor]) -> Moves:
        """With ``function`` of each tensor."""
        return Moves(*(function(each) for each in (self.node, self.row, self.source, self.target, self.loss)))

    def followed_by(self, others: Moves) -> Moves:
        """These and then ``others``."""
        if not len(self.row):
            return others
        return Moves(
            torch.cat([self.node, others.node]),
            torch.cat([self.row, others.row]),
            torch.cat([self.source, others.source]),
            torch.cat([self.target, others.target]),
            torch.cat([self.loss, others.loss]),
        )

    def leaving(self, excess: Tensor) -> Moves:
        """Of each source those of least loss, as many as its ``excess`` (g, k)."""
        return self._least(self.source, excess)

    def entering(self, room: Tensor) -> Moves:
        """Of each target those of least loss, as many as it has ``room`` (g, k) for."""
        return self._least(self.target, room)

    def _least(self, child: Tensor, most: Tensor) -> Moves:
        group = self.node.long() * most.shape[1] + child
        chosen = rank_in_group(group, self.loss) < most.flatten()[group]
        return self.map(lambda each: each[chosen])


def rank_in_group(group: Tensor, value: Tensor) -> Tensor:
    """Rank (n,) of each value among those of its group, from 0; ties in the order given."""
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    grouped = group[order]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(grouped, grouped)
    return rank
