"""Kernels that take a row a program: rows over their norms, and gradients that go back through the norm.

A pass of their own before a product, because a loop that multiplies must load for the product alone: where a load feeds
both registers and Hopper's asynchronous matrix units, Triton 3.5 to 3.8 keep one buffer too few, and the next copy
overwrites what the units still read. `gif_kernels.aot` looks for such loops.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import TRITON_DTYPE, inside, inverse_norm
from gif_kernels.device.reduction import incoming_stride

ONE_WARP = 256
"""Elements of a row that one warp takes."""
MOST_WARPS = 8
"""Warps of a program, however wide the row is."""


@triton.jit
def unit_rows_kernel(
    p_rows,  # (n, WIDTH), or the table whose rows p_index names; any strides
    p_index,  # (n,) int64
    p_unit,  # (n, WIDTH)
    rows_stride,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    """Rows over their norms."""
    i = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_index + i) if GATHER else i
    o_d = tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    b_row = tl.load(p_rows + i_row * rows_stride + o_d * COLUMN_STRIDE, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_unit + i * WIDTH + o_d, b_row * inverse_norm(tl.sum(b_row * b_row, 0)), mask=m_d)


@triton.jit
def inverse_norms_kernel(
    p_rows,  # (n, WIDTH), any strides
    p_inverse,  # (n,): 1 / norm of the row as it is multiplied
    rows_stride,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    """1 / ||row|| of rows rounded to OPERAND."""
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    b_row = tl.load(p_rows + i * rows_stride + o_d * COLUMN_STRIDE, mask=m_d, other=0.0)
    b_row = b_row.to(OPERAND).to(tl.float32)
    tl.store(p_inverse + i, inverse_norm(tl.sum(b_row * b_row, 0)))


@triton.jit(do_not_specialize=["incoming_stride"])
def row_gradients_kernel(
    p_rows,  # (n, WIDTH): x, any strides
    p_inverse,  # (n,): 1 / ||x||
    p_numerators,  # (n, WIDTH) float32: dL/dxhat / ||x||, but for the factor
    p_incoming,  # (n,) or (): dL/d(loss of the row); its stride is 0 where every row counts the same
    p_share,  # (): multiplies it, if MEAN
    p_gradient,  # (n, WIDTH)
    scale,
    rows_stride,
    incoming_stride,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    """dL/dx = factor (g - (g . xhat) xhat), g the numerators."""
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    factor = tl.load(p_incoming + i * incoming_stride).to(tl.float32) * scale
    if MEAN:
        factor *= tl.load(p_share)
    b_unit = tl.load(p_rows + i * rows_stride + o_d * COLUMN_STRIDE, mask=m_d, other=0.0).to(tl.float32)
    b_unit *= tl.load(p_inverse + i)
    b_gradient = tl.load(p_numerators + i * WIDTH + o_d, mask=m_d, other=0.0)
    b_gradient -= tl.sum(b_gradient * b_unit, 0) * b_unit
    tl.store(p_gradient + i * WIDTH + o_d, b_gradient * factor, mask=m_d)


def unit_rows(rows: Tensor, index: Tensor | None = None) -> Tensor:
    """``rows`` (n, d), or those that ``index`` names, over their norms, in their dtype; a row of zeros stays zero."""
    n, width = len(rows if index is None else index), rows.shape[1]
    unit = torch.empty((n, width), dtype=rows.dtype, device=rows.device)
    with torch.cuda.device_of(rows):
        unit_rows_kernel[(n,)](
            p_rows=rows,
            p_index=index,
            p_unit=unit,
            rows_stride=rows.stride(0),
            GATHER=index is not None,
            **row_constants(width, rows.stride(1)),
        )
    return unit


def inverse_norms(rows: Tensor, operand: torch.dtype) -> Tensor:
    """1 / ||row|| (n,) float32 of ``rows`` (n, d) rounded to ``operand``; 0 for a row of zeros, NaN of NaN."""
    inverse = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    if len(rows):
        with torch.cuda.device_of(rows):
            inverse_norms_kernel[(len(rows),)](
                p_rows=rows,
                p_inverse=inverse,
                rows_stride=rows.stride(0),
                OPERAND=TRITON_DTYPE[operand],
                **row_constants(rows.shape[1], rows.stride(1)),
            )
    return inverse


def row_gradients(
    rows: Tensor, inverse: Tensor, numerators: Tensor, incoming: Tensor, share: Tensor, scale: float
) -> Tensor:
    """dL/drows (n, d), in their dtype: ``numerators`` on the tangent space, times ``incoming`` and ``scale``.

    ``incoming`` () or (n,) is dL/d(loss of a row); ``share`` multiplies it unless it is empty (see `reduced`).
    """
    gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    if len(rows):
        with torch.cuda.device_of(rows):
            row_gradients_kernel[(len(rows),)](
                p_rows=rows,
                p_inverse=inverse,
                p_numerators=numerators,
                p_incoming=incoming,
                p_share=share,
                p_gradient=gradient,
                scale=scale,
                rows_stride=rows.stride(0),
                incoming_stride=incoming_stride(incoming),
                MEAN=share.ndim == 0,
                **row_constants(rows.shape[1], rows.stride(1)),
            )
    return gradient


def row_constants(width: int, column_stride: int) -> dict[str, Any]:
    """The constants of kernels that take a row a program: sizes, strides, and more warps for a wider row."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "COLUMN_STRIDE": column_stride, "BLOCK_D": block, "num_warps": warps(block, MOST_WARPS)}


def warps(block: int, most: int) -> int:
    """How many warps hold a block of so many numbers."""
    return max(1, min(most, block // ONE_WARP))
