"""Uniformity step: what its implementations are told beside tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UniformityStepOptions:
    """The arguments of `uniformity_step_` that are no tensors, checked.

    Args:
        lr: the rate per vector.
        t: the potential's t.
        seed: of the stochastic rounding.
    """

    lr: float
    t: float
    seed: int
