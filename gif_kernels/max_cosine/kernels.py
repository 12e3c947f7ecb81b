"""Largest cosine in Triton: a running best beside the products, never n x m similarities. Choices in README.md."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import TRITON_DTYPE, block_size, dot, inside, load_block
from gif_kernels.device.rows import inverse_norms
from gif_kernels.device.tuning import architecture, multiprocessors, tile
from gif_kernels.precision import float32_precision, shared_dtype, tf32_allowed


@triton.jit(do_not_specialize=["rows", "columns", "split_columns"])
def max_cosine_search(
    p_vectors,  # (rows, WIDTH)
    p_others,  # (columns, WIDTH)
    p_vectors_inverse,  # (rows,)
    p_others_inverse,  # (columns,)
    p_cosine,  # (splits, rows): the largest of one part of the columns
    p_index,  # (splits, rows): whose it is
    rows,
    columns,
    split_columns,
    WIDTH: tl.constexpr,
    AMONG_THEMSELVES: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_start = tl.program_id(0) * BLOCK_M
    i_split = tl.program_id(1)
    first = i_split * split_columns
    last = tl.minimum(first + split_columns, columns)
    o_m = i_start + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    o_row = tl.arange(0, BLOCK_M)
    o_column = tl.arange(0, BLOCK_N)
    p_vectors += i_start.to(tl.int64) * WIDTH
    p_others += first.to(tl.int64) * WIDTH
    b_inverse = tl.load(p_vectors_inverse + o_m, mask=m_m, other=0.0)
    b_best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_index = tl.zeros((BLOCK_M,), tl.int32)
    for j in range(first, last, BLOCK_N):
        o_n = j + o_column
        m_n = o_n < last
        b_cosine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_d in range(0, WIDTH, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = inside(o_d, WIDTH, BLOCK_D)
            b_rows = load_block(p_vectors, o_row, m_m, o_d, m_d, WIDTH).to(OPERAND)
            b_columns = load_block(p_others, o_column, m_n, o_d, m_d, WIDTH).to(OPERAND)
            b_cosine = dot(b_rows, tl.trans(b_columns), b_cosine, PRECISION)
        b_others = tl.load(p_others_inverse + o_n, mask=m_n, other=0.0)
        b_cosine = b_cosine * b_inverse[:, None] * b_others[None, :]
        m_pair = m_n[None, :] & (o_m[:, None] != o_n[None, :]) if AMONG_THEMSELVES else m_n[None, :]
        b_cosine = tl.where(m_pair, b_cosine, -float("inf"))
        b_found, b_where = tl.max(b_cosine, 1, return_indices=True, return_indices_tie_break_left=True)
        b_better = b_found > b_best  # strictly: of equals the first stays
        b_index = tl.where(b_better, j + b_where, b_index)
        b_best = tl.where(b_better, b_found, b_best)
        p_others += BLOCK_N * WIDTH
    i_out = i_split.to(tl.int64) * rows
    tl.store(p_cosine + i_out + o_m, b_best, mask=m_m)
    tl.store(p_index + i_out + o_m, b_index, mask=m_m)


def max_cosine(vectors: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine (m,) and index (m,) int64 of the nearest row of ``others``, or of the nearest other row of ``vectors``."""
    if len(vectors) == 0:
        return vectors.new_empty(0, dtype=torch.float32), vectors.new_empty(0, dtype=torch.int64)
    vectors = vectors.contiguous()
    columns = vectors if others is None else others.contiguous()
    n, width = vectors.shape
    operand = shared_dtype(vectors.dtype, columns.dtype)
    constants = search_constants(operand, width, others is None, tf32_allowed(), architecture(vectors.device))
    row_blocks = triton.cdiv(n, constants["BLOCK_M"])
    column_blocks = triton.cdiv(len(columns), constants["BLOCK_N"])
    side_by_side = max(1, multiprocessors(vectors.device) // row_blocks)
    blocks_a_split = triton.cdiv(column_blocks, side_by_side)
    splits = triton.cdiv(column_blocks, blocks_a_split)
    cosine = torch.empty((splits, n), dtype=torch.float32, device=vectors.device)
    index = torch.empty((splits, n), dtype=torch.int32, device=vectors.device)
    with torch.cuda.device_of(vectors):
        inverse = inverse_norms(vectors, operand)
        max_cosine_search[(row_blocks, splits)](
            p_vectors=vectors,
            p_others=columns,
            p_vectors_inverse=inverse,
            p_others_inverse=inverse if others is None else inverse_norms(columns, operand),
            p_cosine=cosine,
            p_index=index,
            rows=n,
            columns=len(columns),
            split_columns=blocks_a_split * constants["BLOCK_N"],
            **constants,
        )
    best = cosine.amax(0)
    lowest = torch.where(cosine == best, index, len(columns) - 1).amin(0)  # of equals, in whichever part
    return best, lowest.long()


@functools.cache
def search_constants(
    operand: torch.dtype, width: int, among_themselves: bool, tf32: bool, architecture: str
) -> dict[str, Any]:
    """The constants that the kernel compiles with."""
    limits = tile("max_cosine", operand, architecture)
    return {
        "WIDTH": width,
        "AMONG_THEMSELVES": among_themselves,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": float32_precision(tf32, architecture),
        "BLOCK_M": limits.rows,
        "BLOCK_N": limits.columns,
        "BLOCK_D": block_size(width, limits.width),
        "num_warps": limits.warps,
        "num_stages": limits.stages,
    }
