"""Stochastic rounding from float32, with a random number that is a function of (seed, row, column) alone."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["SIGNIFICAND_BITS", "stochastic_round", "uniform"]

SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11}
"""Bits of the significand of the dtypes that are rounded to, the implicit one counted."""
_LOWEST_EXPONENT = {torch.bfloat16: -125, torch.float16: -13}  # frexp's, of the smallest normal number
MASK = 0xFFFFFFFF
"""The bits of a seed that count."""
_Integers = TypeVar("_Integers", int, Tensor)


def stochastic_round(values: Tensor, dtype: torch.dtype, row_ids: Tensor, seed: int | Tensor) -> Tensor:
    """Round float32 ``values`` (n, d) to ``dtype``, up or down with the probabilities that make the mean exact.

    A step of less than half a unit in the last place survives on average, where round-to-nearest loses it. ``row_ids``
    (n,) int64 name the rows, so the result does not depend on the order in which they are rounded. ``seed`` is a
    number, or () int64 on the values' device, of which no host need know: both draw the same. A dtype that holds
    float32 passes unrounded.
    """
    if dtype not in SIGNIFICAND_BITS:
        return values.to(dtype)
    _, exponent = torch.frexp(values)
    exponent = exponent.clamp(min=_LOWEST_EXPONENT[dtype])
    unit = torch.ldexp(torch.ones_like(values), exponent - SIGNIFICAND_BITS[dtype])
    columns = torch.arange(values.shape[1], device=values.device)
    noise = uniform(row_ids.unsqueeze(1), columns, seed)
    scaled = values / unit
    low = torch.floor(scaled)
    # compared and not added: a sum would be rounded, and move values that need no rounding
    low += noise < scaled.sub_(low)
    return low.mul_(unit).to(dtype)


def uniform(rows: Tensor, columns: Tensor, seed: int | Tensor) -> Tensor:
    """Uniform float32 in [0, 1) for each pair of int64 ``rows`` and ``columns``, broadcast: a counter-based RNG."""
    mixed = _mix(seed & MASK) if isinstance(seed, Tensor) else mixed_seed(seed)
    state = _mix(rows ^ mixed) ^ _mix(rows >> 32)
    return _mix(state + columns * 0x9E3779B1).bitwise_right_shift_(8).float().mul_(2.0**-24)


def mixed_seed(seed: int) -> int:
    """The 32 bits by which a seed changes the hash of a row; they follow from its lowest 32."""
    return _mix(seed & MASK)


def seed_on(device: torch.device, seed: int | Tensor) -> Tensor:
    """The seed as () int64, without waiting: a number in memory that the device fills, a tensor as it is."""
    return seed if isinstance(seed, Tensor) else torch.full((), seed & MASK, dtype=torch.int64, device=device)


def _mix(x: _Integers) -> _Integers:
    """A bijective hash of 32 bits in int64, a tensor's in its memory (lowbias32, constants by C. Wellons, 2018)."""
    x &= MASK
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= MASK
    x ^= x >> 15
    x *= 0x846CA68B
    x &= MASK
    x ^= x >> 16
    return x
