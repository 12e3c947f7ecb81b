"""A pool of places for identities, of which those that were not seen for longest leave first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gif.errors import InputError


@dataclass(frozen=True)
class Places:
    """Who holds each of K places: ``identities`` (K,) int64, -1 where a place is empty, and when it was ``used`` (K,).

    Times only order the places; an empty one has -1.
    """

    identities: Tensor
    used: Tensor

    @classmethod
    def empty(cls, count: int) -> Places:
        """So many places that nobody holds."""
        return cls(torch.full((count,), -1), torch.full((count,), -1))

    def find(self, identities: Tensor) -> Tensor:
        """The place of each of ``identities`` (n,), (n,) int64; -1 where it has none."""
        held, order = self.identities.sort()
        where = torch.searchsorted(held, identities).clamp(max=len(held) - 1)
        return torch.where((held[where] == identities) & (identities >= 0), order[where], -1)

    def take(self, identities: Tensor) -> tuple[Places, Tensor, Tensor]:
        """The places after ``identities`` (n,) >= 0 came by, in order; the place of each, and who is new: (n,).

        Who has a place keeps it, and is as new as its last row here. The others get the empty places, then those of
        identities that are not here and came by longest ago.

        Raises ValueError where there are more identities than places.
        """
        who, inverse = identities.unique(return_inverse=True)
        if len(who) > len(self.identities):
            raise InputError(
                f"a batch has {len(who)} identities and the pool {len(self.identities)} places; give a pool_size of at "
                "least that"
            )
        numbers = torch.arange(len(identities), device=identities.device)
        last = torch.zeros_like(who).scatter_reduce_(0, inverse, numbers, "amax", include_self=False)
        now = self.used.max() + 1 + last
        places = self.find(who)
        new = places < 0
        held, used = self.identities.clone(), self.used.clone()
        used[places[~new]] = now[~new]
        places[new] = used.argsort(stable=True)[: int(new.sum())]
        held[places], used[places] = who, now
        return Places(held, used), places[inverse], new[inverse]
