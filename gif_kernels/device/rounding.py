"""Stochastic rounding on the device, with the random numbers of `gif_kernels.rounding`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gif_kernels.device.rows import row_constants
from gif_kernels.rounding import SIGNIFICAND_BITS

LOWEST_EXPONENT = {torch.bfloat16: 8, torch.float16: 113}
"""Biased by 127: numbers below it share its unit in the last place. float16's is its own, 2^-24; bfloat16's is kept a
normal float32, 2^-126, for coordinates below 2^-119."""


@triton.jit
def mix(x):
    """The hash of `gif_kernels.rounding`, in unsigned numbers of 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic_round(x, row, column, mixed_seed, DIGITS: tl.constexpr, LOWEST: tl.constexpr):
    """``x`` rounded to DIGITS significant bits, with the random numbers of `gif_kernels.rounding`."""
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    state = mix(low ^ mixed_seed.to(tl.uint32, bitcast=True)) ^ mix(high)
    noise = (mix(state + column.to(tl.uint32) * 0x9E3779B1) >> 8).to(tl.float32) * (1.0 / 16777216)
    exponent = (x.to(tl.uint32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(exponent, LOWEST) - (DIGITS - 1)  # of the unit in the last place, biased
    scaled = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    below = tl.floor(scaled)
    rounded = below + tl.where(noise < scaled - below, 1.0, 0.0)
    return rounded * (exponent << 23).to(tl.float32, bitcast=True)


def rounded_row_constants(dtype: torch.dtype, width: int, column_stride: int) -> dict[str, Any]:
    """The constants of kernels that take a row a program and round it to ``dtype``.

    DIGITS is 0 where what is computed is stored as it is.
    """
    rows = row_constants(width, column_stride)
    rounding = {"DIGITS": SIGNIFICAND_BITS.get(dtype, 0), "LOWEST": LOWEST_EXPONENT.get(dtype, 0)}
    return {**rows, **rounding, "num_warps": 2 * rows["num_warps"]}  # rounding needs registers of its own
