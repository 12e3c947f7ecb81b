"""Random seeds for the parts of a run."""

from __future__ import annotations

SEED_STRIDE = 1_000_003
"""How far apart the seeds of two runs lie, so that no part of one run draws the numbers of a part of the other."""


def seed_of(seed: int, part: int) -> int:
    """The seed of a numbered part, such as an epoch, of a run that has this seed; parts are fewer than the stride."""
    return seed * SEED_STRIDE + part
