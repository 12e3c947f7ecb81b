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
_COLUMN = 0x9E3779B1
"""By how much the hashes of two numbers beside each other are apart before they are mixed."""
_CACHE_NUMBERS = 1 << 17
"""Numbers that a CPU rounds at a time, so that some thirty passes over them stay in its caches."""
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
    cuts = dtype == torch.bfloat16 and values.dtype == torch.float32
    rows = len(values) if values.device.type != "cpu" else max(1, _CACHE_NUMBERS // max(1, values.shape[1]))
    parts = [
        _cut(part, names, seed) if cuts else _floored(part, dtype, names, seed)
        for part, names in zip(values.split(rows), row_ids.split(rows), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _floored(values: Tensor, dtype: torch.dtype, row_ids: Tensor, seed: int | Tensor) -> Tensor:
    """`stochastic_round` to any of the dtypes, as it is defined."""
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


def _cut(values: Tensor, row_ids: Tensor, seed: int | Tensor) -> Tensor:
    """The same of float32 to bfloat16, which is its upper half: the lower half is cut off, or the upper goes up by one.

    Of a negative number the larger magnitude is the lower value. Conditions are -1 and 0, since a CPU is ten times as
    fast at bits as at choosing.
    """
    bits = values.view(torch.int32)
    negative = bits >> 31
    rest = (bits & 0xFFFF).bitwise_left_shift_(8)  # above the lower of both neighbours, of 2^24 as the noise is
    rest.bitwise_xor_(negative).sub_(negative).bitwise_and_(0xFFFFFF)
    goes_up = (_noise(row_ids, values.shape[1], seed) - rest).bitwise_right_shift_(31)
    # away from zero: up of a positive number; of a negative one that is none of bfloat16's, not up
    away = negative.bitwise_and_(rest.neg_().bitwise_right_shift_(31)).bitwise_xor_(goes_up)
    no_number = (0x7F800000 - (bits & 0x7FFFFFFF)).bitwise_right_shift_(31)
    away.bitwise_and_(~no_number).bitwise_left_shift_(16)
    found = (bits & ~0xFFFF).sub_(away).bitwise_or_(no_number.bitwise_and_(1 << 22))
    return found.view(torch.float32).add_(0.0).to(torch.bfloat16)  # zero has no sign


def _noise(rows: Tensor, columns: int, seed: int | Tensor) -> Tensor:
    """2^24 times `uniform` of int64 ``rows`` (n,) and so many columns: (n, columns) int32, in 32 bits throughout."""
    numbers = torch.arange(columns, device=rows.device).mul_(_COLUMN).to(torch.int32)
    x = _of_rows(rows.unsqueeze(1), seed).to(torch.int32) + numbers
    x ^= (x >> 16).bitwise_and_(0xFFFF)  # without the sign, which a shift of int32 repeats
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)


def uniform(rows: Tensor, columns: Tensor, seed: int | Tensor) -> Tensor:
    """Uniform float32 in [0, 1) for each pair of int64 ``rows`` and ``columns``, broadcast: a counter-based RNG."""
    return _mix(_of_rows(rows, seed) + columns * _COLUMN).bitwise_right_shift_(8).float().mul_(2.0**-24)


def _of_rows(rows: Tensor, seed: int | Tensor) -> Tensor:
    """What a seed and int64 ``rows`` bring to the hash of each of their numbers."""
    mixed = _mix(seed & MASK) if isinstance(seed, Tensor) else mixed_seed(seed)
    return _mix(rows ^ mixed) ^ _mix(rows >> 32)


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
