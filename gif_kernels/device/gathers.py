"""Rows of a table by index: which of a block there are, and their numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gathered_index(p_index, i_start, o_b, m_b, count, HAS_INDEX: tl.constexpr):
    """For each row of a block its row of a table of ``count`` rows, int64; which have one; and which index is wrong.

    Without an index row i takes row i of the table. An index of -1 is right and has no row.
    """
    b_index = i_start + o_b
    if HAS_INDEX:
        b_index = tl.load(p_index + b_index, mask=m_b, other=-1)
    m_valid = (b_index >= -1) & (b_index < count)
    return b_index, m_b & m_valid & (b_index >= 0), m_b & ~m_valid


@triton.jit
def load_gathered(p, b_index, m_row, o_column, m_column, STRIDE: tl.constexpr):
    """Block (rows, columns) of the rows at ``b_index`` int64 of a row-major matrix; 0 outside the masks."""
    p += b_index[:, None] * STRIDE + o_column[None, :]
    return tl.load(p, mask=m_row[:, None] & m_column[None, :], other=0.0)
