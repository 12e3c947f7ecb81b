"""Random seeds for the parts of a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SEED_STRIDE = 1_000_003
"""How far apart the seeds of two runs lie, so that no part of one run draws the numbers of a part of the other."""


def seed_of(seed: int, part: int) -> int:
    """The seed of a numbered part, such as an epoch, of a run that has this seed; parts are fewer than the stride."""
    return seed * SEED_STRIDE + part


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, which turns counters into random bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
