"""Gaussian potential: what its implementations are told beside tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GaussianPotentialOptions:
    """The arguments of `gaussian_potential` that are no tensors, checked.

    Args:
        t: how far a pair is felt.
        offset: where the vectors stand in the others, if there are any.
    """

    t: float
    offset: int = 0
