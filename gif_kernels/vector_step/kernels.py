"""Vector step in Triton: positions sorted by row, then one launch in which each named row moves. See README.md."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import SMALLEST_SQUARE, inside
from gif_kernels.device.rounding import mix, rounded_row_constants, stochastic_round
from gif_kernels.rounding import SIGNIFICAND_BITS, seed_on


@triton.jit(do_not_specialize=["count", "table_rows"])
def vector_step(
    p_table,  # (table_rows, WIDTH), any strides
    p_rows,  # (count,) int64, ascending
    p_places,  # (count,) int64: where each stood before they were sorted
    p_gradient,  # (count, WIDTH), any strides
    p_row_ids,  # (table_rows,) int64, any stride, if NAMED
    p_seed,  # () int64, if DIGITS > 0
    p_stayed,  # () int64
    count,
    table_rows,
    rate,
    table_stride,
    gradient_stride,
    row_ids_stride,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    GRADIENT_COLUMN_STRIDE: tl.constexpr,
    NAMED: tl.constexpr,
    DIGITS: tl.constexpr,  # 0: what is computed is stored
    LOWEST: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    """h <- h - rate g of the row that begins here, g the sum of its gradients; it stays where not finite."""
    i = tl.program_id(0)
    i_row = tl.load(p_rows + i)
    i_before = tl.load(p_rows + i - 1, mask=i > 0, other=-1)
    if (i_row >= 0) & (i_row < table_rows) & (i_row != i_before):
        o_d = tl.arange(0, BLOCK_D)
        m_d = inside(o_d, WIDTH, BLOCK_D)
        p_table += i_row * table_stride
        b_sum = tl.zeros((BLOCK_D,), tl.float32)
        i_next = i_row
        while i_next == i_row:
            p_addend = p_gradient + tl.load(p_places + i) * gradient_stride
            b_sum += tl.load(p_addend + o_d * GRADIENT_COLUMN_STRIDE, mask=m_d, other=0.0).to(tl.float32)
            i += 1
            i_next = tl.load(p_rows + i, mask=i < count, other=-1)
        b_moved = tl.load(p_table + o_d * COLUMN_STRIDE, mask=m_d, other=0.0).to(tl.float32) - rate * b_sum
        squares = tl.sum(b_moved * b_moved, 0)
        if (squares >= SMALLEST_SQUARE) & (squares < float("inf")):  # nor NaN
            if DIGITS > 0:
                i_name = tl.load(p_row_ids + i_row * row_ids_stride) if NAMED else i_row
                mixed_seed = mix(tl.load(p_seed).to(tl.uint32))
                b_moved = stochastic_round(b_moved, i_name, o_d, mixed_seed, DIGITS, LOWEST)
            tl.store(p_table + o_d * COLUMN_STRIDE, b_moved, mask=m_d)
        else:
            tl.atomic_add(p_stayed, 1, sem="relaxed")  # of integers: in whatever order, the same


def step_(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: int | Tensor, lr: float
) -> Tensor:
    """Move the rows of ``table`` (n, d) that ``rows`` (B,) names; returns how many of them stayed, ().

    A row that the table has not is skipped, as a negative one is.
    """
    ordered, places = rows.sort(stable=True)
    stayed = torch.zeros((), dtype=torch.int64, device=table.device)
    rounds = table.dtype in SIGNIFICAND_BITS
    names = row_ids if rounds else None
    with torch.cuda.device_of(table):
        vector_step[(len(rows),)](
            p_table=table,
            p_rows=ordered,
            p_places=places,
            p_gradient=gradient,
            p_row_ids=names,
            p_seed=seed_on(table.device, seed) if rounds else None,
            p_stayed=stayed,
            count=len(rows),
            table_rows=len(table),
            rate=lr,
            table_stride=table.stride(0),
            gradient_stride=gradient.stride(0),
            row_ids_stride=0 if names is None else names.stride(0),
            GRADIENT_COLUMN_STRIDE=gradient.stride(1),
            NAMED=names is not None,
            **rounded_row_constants(table.dtype, table.shape[1], table.stride(1)),
        )
    return stayed
