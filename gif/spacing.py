"""Places at equal distances: what is looked at of many things, where looking at all would take too long."""

from __future__ import annotations

import torch


def evenly_spaced(total: int, most: int) -> list[int]:
    """At most ``most`` places of [0, ``total``) at equal distances, the first and, of several, the last among them.

    In float64: float32 tells numbers up to 2^24 apart, and there are data sets of more images and identities.
    """
    return torch.linspace(0, total - 1, min(total, most), dtype=torch.float64).long().tolist()
