"""Random numbers that follow from a seed and a place in the tree alone, on any device and in any order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gif.seeds import mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def node_seeds(seed: int, depth: int, paths: np.ndarray) -> np.ndarray:
    """A uint64 seed (g,) for each node, from its depth and path alone."""
    root = mix(np.array([seed % 2**64, depth], np.uint64))
    return mix(mix(paths.astype(np.uint64) ^ root[0]) ^ root[1])


def uniforms(seeds: np.ndarray, n: int, *, stream: int = 0) -> Tensor:
    """Uniform numbers (g, n) float64 in [0, 1), counter-based: SplitMix64 from each of ``seeds`` (g,)."""
    counters = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(stream << 40)
    bits = mix(seeds[:, None] + _GOLDEN * counters)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
