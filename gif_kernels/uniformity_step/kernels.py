"""Uniformity step in Triton: the rows are read, moved, rounded and written back in the table itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import inside, inverse_norm
from gif_kernels.device.rounding import rounded_row_constants, stochastic_round
from gif_kernels.device.rows import unit_rows
from gif_kernels.gaussian_potential import one_sweep
from gif_kernels.gaussian_potential.kernels import pair_sums, tangent_gradient
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.rounding import mixed_seed
from gif_kernels.uniformity_step.options import UniformityStepOptions


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
        b_moved = stochastic_round(b_moved, i_row, o_d, mixed_seed, DIGITS, LOWEST)
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
            **rounded_row_constants(table.dtype, table.shape[1], table.stride(1)),
        )
    return one_sweep.log_mean(total, n).float()


def _signed(bits: int) -> int:
    """32 bits as the signed integer that Triton takes them for."""
    return bits - (bits >> 31 << 32)
