"""Uniformity step in Triton: the rows are read, moved, rounded and written back in the table itself."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import inside, inverse_norm
from gif_kernels.device.rows import row_constants, unit_rows
from gif_kernels.gaussian_potential import one_sweep
from gif_kernels.gaussian_potential.kernels import pair_sums, tangent_gradient
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.rounding import SIGNIFICAND_BITS, mixed_seed
from gif_kernels.uniformity_step.options import UniformityStepOptions

LOWEST_EXPONENT = {torch.bfloat16: 8, torch.float16: 113}
"""Biased by 127: numbers below it share its unit in the last place. float16's is its own, 2^-24; bfloat16's is kept a
normal float32, 2^-126, for coordinates below 2^-119."""


@triton.jit
def _mix(x):
    """The hash of `gif_kernels.rounding`, in unsigned numbers of 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stochastic_round(x, row, column, mixed_seed, DIGITS: tl.constexpr, LOWEST: tl.constexpr):
    """``x`` rounded to DIGITS significant bits, with the random numbers of `gif_kernels.rounding`."""
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    state = _mix(low ^ mixed_seed.to(tl.uint32, bitcast=True)) ^ _mix(high)
    noise = (_mix(state + column.to(tl.uint32) * 0x9E3779B1) >> 8).to(tl.float32) * (1.0 / 16777216)
    exponent = (x.to(tl.uint32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(exponent, LOWEST) - (DIGITS - 1)  # of the unit in the last place, biased
    scaled = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    below = tl.floor(scaled)
    rounded = below + tl.where(noise < scaled - below, 1.0, 0.0)
    return rounded * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "splits", "mixed_seed"])
def uniformity_step(
    p_table,  # (m, WIDTH), any strides
    p_index,  # (rows,) int64
    p_numerators,  # (splits, rows, WIDTH)
    p_total,  # () float64: Z
    rows,
    splits,
    slope,
    rate,
    mixed_seed,
    table_stride,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    DIGITS: tl.constexpr,  # 0: what is computed is stored
    LOWEST: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    """h <- normalise(h - rate dL/dh) of one row, which stays as it is where that is not finite."""
    i = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_index + i)
    p_table += i_row * table_stride
    b_gradient, b_unit, _ = tangent_gradient(
        p_table, p_numerators + i * WIDTH, p_total, rows, splits, slope, WIDTH, COLUMN_STRIDE, BLOCK_D
    )
    b_moved = b_unit - rate * b_gradient
    squares = tl.sum(b_moved * b_moved, 0)
    b_moved *= inverse_norm(squares)
    o_d = tl.arange(0, BLOCK_D)
    if DIGITS > 0:
        b_moved = _stochastic_round(b_moved, i_row, o_d, mixed_seed, DIGITS, LOWEST)
    if (squares > 0) & (squares < float("inf")):  # nor NaN
        tl.store(p_table + o_d * COLUMN_STRIDE, b_moved, mask=inside(o_d, WIDTH, BLOCK_D))


def step_(table: Tensor, index: Tensor, options: UniformityStepOptions) -> Tensor:
    """Move the rows of ``table`` (m, d) that ``index`` (n,) names; returns the loss before, ()."""
    n = len(index)
    index = index.contiguous()
    with torch.cuda.device_of(table):
        potential = GaussianPotentialOptions(t=options.t)
        total, numerators = pair_sums(unit_rows(table, index), None, potential, want_numerators=True)
        uniformity_step[(n,)](
            p_table=table,
            p_index=index,
            p_numerators=numerators,
            p_total=total,
            rows=n,
            splits=len(numerators),
            slope=4 * options.t,
            rate=options.lr * n,
            mixed_seed=_signed(mixed_seed(options.seed)),
            table_stride=table.stride(0),
            **step_constants(table.dtype, table.shape[1], table.stride(1)),
        )
    return one_sweep.log_mean(total, n).float()


def _signed(bits: int) -> int:
    """32 bits as the signed integer that Triton takes them for."""
    return bits - (bits >> 31 << 32)


def step_constants(dtype: torch.dtype, width: int, column_stride: int) -> dict[str, Any]:
    """The constants that the kernel compiles with."""
    rounding = {"DIGITS": SIGNIFICAND_BITS.get(dtype, 0), "LOWEST": LOWEST_EXPONENT.get(dtype, 0)}
    rows = row_constants(width, column_stride)
    return {**rows, **rounding, "num_warps": 2 * rows["num_warps"]}  # rounding needs registers of its own
