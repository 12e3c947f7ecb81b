"""Gradients through cosines in Triton: from dloss/dcosine to dloss/drow and dloss/dcentre.

A row x and a centre w meet in c = (x / ||x||) . (w / ||w||). A loss leaves dloss/dc, the slopes (B, T, N), for each of
T rows a sample and N centres a row; from there both gradients follow. Choices in token_margin/README.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.gathers import gathered_index, load_gathered
from gif_kernels.device.primitives import TRITON_DTYPE, block_size, dot, empty_like_if, inside, inverse_norm, load_block
from gif_kernels.device.reduction import incoming_stride, row_factor
from gif_kernels.device.tuning import architecture, tile
from gif_kernels.precision import float32_precision, gradient_dtype, tf32_allowed

PROGRAMS = 256
"""Programs among which the centre gradient is shared, by splitting the batch, where it has fewer blocks than that."""

ALIGNED = 16
"""Numbers that Triton looks for in a stride before it loads 16 bytes at once."""


@triton.jit
def _row_gradient(
    i_block,
    i_token,
    i_d,
    p_rows,
    p_centers,
    p_slopes,
    p_row_inverse,
    p_radial,
    p_center_inverse,
    p_incoming,
    p_share,
    p_pull,
    p_targets,
    p_target_rows,
    p_row_gradient,
    batch,
    incoming_stride,
    target_count,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    PULLED: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of dloss/drow = factor / norm (sum_n slope_n center_n / norm_n - radial row / norm + pull target)."""
    i_start = i_block.to(tl.int64) * BLOCK_B
    i_row = i_start * TOKENS + i_token
    i_column = i_token.to(tl.int64) * COLUMNS
    p_slopes += i_row * SLOPES
    p_centers += i_column * WIDTH
    p_center_inverse += i_column
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    b_gradient = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for i_n in range(0, COLUMNS, BLOCK_N):
        m_n = o_n < COLUMNS - i_n
        o_slopes = o_b[:, None] * (TOKENS * SLOPES) + o_n[None, :]
        b_slopes = tl.load(p_slopes + o_slopes, mask=m_b[:, None] & m_n[None, :], other=0.0)
        b_slopes = b_slopes * tl.load(p_center_inverse + o_n, mask=m_n, other=0.0)[None, :]
        b_center = load_block(p_centers, o_n, m_n, o_d, m_d, WIDTH).to(OPERAND)
        b_gradient = dot(b_slopes.to(OPERAND), b_center, b_gradient, PRECISION)
        p_slopes += BLOCK_N
        p_centers += BLOCK_N * WIDTH
        p_center_inverse += BLOCK_N
    b_row = load_block(p_rows + i_row * WIDTH, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(tl.float32)
    b_inverse = tl.load(p_row_inverse + i_row + o_b * TOKENS, mask=m_b, other=0.0)
    b_radial = tl.load(p_radial + i_row + o_b * TOKENS, mask=m_b, other=0.0) * b_inverse
    b_gradient -= b_radial[:, None] * b_row
    if PULLED:
        b_index, m_target, _ = gathered_index(p_target_rows, i_start, o_b, m_b, target_count, HAS_TARGET_ROWS)
        b_pull = tl.load(p_pull + i_start + o_b, mask=m_b, other=0.0)
        b_gradient += b_pull[:, None] * load_gathered(p_targets, b_index, m_target, o_d, m_d, WIDTH).to(tl.float32)
    b_factor = row_factor(p_incoming, incoming_stride, p_share, i_start, o_b, m_b, MEAN) * b_inverse
    o_out = o_b[:, None] * (TOKENS * WIDTH) + o_d[None, :]
    tl.store(p_row_gradient + i_row * WIDTH + o_out, b_gradient * b_factor[:, None], mask=m_b[:, None] & m_d[None, :])


@triton.jit
def _center_partial(
    i_split,
    i_token,
    i_n,
    i_d,
    p_rows,
    p_slopes,
    p_row_inverse,
    p_incoming,
    p_share,
    p_partial,
    batch,
    incoming_stride,
    split_rows,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of dloss/d(center / norm) = sum_b factor_b slope_b row_b / norm_b over one part of the batch."""
    i_start = i_split.to(tl.int64) * split_rows
    i_row = i_start * TOKENS + i_token
    i_column = i_n.to(tl.int64) * BLOCK_N
    p_rows += i_row * WIDTH
    p_slopes += i_row * SLOPES + i_column
    p_row_inverse += i_row
    p_partial += ((i_split.to(tl.int64) * TOKENS + i_token) * COLUMNS + i_column) * WIDTH
    rows = tl.minimum(split_rows, batch - i_start).to(tl.int32)
    o_b = tl.arange(0, BLOCK_B)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < COLUMNS - i_column
    b_partial = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for i_b in range(0, rows, BLOCK_B):
        m_b = o_b < rows - i_b
        b_factor = tl.load(p_row_inverse + o_b * TOKENS, mask=m_b, other=0.0)
        b_factor *= row_factor(p_incoming, incoming_stride, p_share, i_start + i_b, o_b, m_b, MEAN)
        o_slopes = o_b[:, None] * (TOKENS * SLOPES) + o_n[None, :]
        b_slopes = tl.load(p_slopes + o_slopes, mask=m_b[:, None] & m_n[None, :], other=0.0) * b_factor[:, None]
        b_row = load_block(p_rows, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(OPERAND)
        b_partial = dot(tl.trans(b_row), b_slopes.to(OPERAND), b_partial, PRECISION)
        p_rows += BLOCK_B * TOKENS * WIDTH
        p_slopes += BLOCK_B * TOKENS * SLOPES
        p_row_inverse += BLOCK_B * TOKENS
    o_out = o_n[None, :] * WIDTH + o_d[:, None]
    tl.store(p_partial + o_out, b_partial, mask=m_n[None, :] & m_d[:, None])


@triton.jit(do_not_specialize=["batch", "incoming_stride", "target_count", "split_rows", "row_programs"])
def cosine_backward(
    p_rows,  # (B, TOKENS, WIDTH)
    p_centers,  # (TOKENS, COLUMNS, WIDTH)
    p_slopes,  # (B, TOKENS, SLOPES), SLOPES >= COLUMNS: dloss/dcosine
    p_row_inverse,  # (B, TOKENS): 1 / norm
    p_radial,  # (B, TOKENS): row / norm . dloss/d(row / norm)
    p_center_inverse,  # (TOKENS, COLUMNS)
    p_incoming,  # (B,) or (): its stride is 0 where every row counts the same
    p_share,  # (): multiplies it, if MEAN
    p_pull,  # (B,): the pull of `code_regression`, if PULLED (and TOKENS is 1)
    p_targets,  # (target_count, WIDTH)
    p_target_rows,  # (B,)
    p_row_gradient,  # (B, TOKENS, WIDTH)
    p_partial,  # (splits, TOKENS, COLUMNS, WIDTH)
    batch,
    incoming_stride,
    target_count,
    split_rows,
    row_programs,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    PULLED: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first row_programs programs take blocks of the row gradient, the others of the centre gradient's parts."""
    BLOCKS_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0)
    if i < row_programs:
        _row_gradient(
            i_block=i // (BLOCKS_D * TOKENS),
            i_token=i // BLOCKS_D % TOKENS,
            i_d=i % BLOCKS_D,
            p_rows=p_rows,
            p_centers=p_centers,
            p_slopes=p_slopes,
            p_row_inverse=p_row_inverse,
            p_radial=p_radial,
            p_center_inverse=p_center_inverse,
            p_incoming=p_incoming,
            p_share=p_share,
            p_pull=p_pull,
            p_targets=p_targets,
            p_target_rows=p_target_rows,
            p_row_gradient=p_row_gradient,
            batch=batch,
            incoming_stride=incoming_stride,
            target_count=target_count,
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            SLOPES=SLOPES,
            WIDTH=WIDTH,
            MEAN=MEAN,
            PULLED=PULLED,
            HAS_TARGET_ROWS=HAS_TARGET_ROWS,
            OPERAND=OPERAND,
            PRECISION=PRECISION,
            BLOCK_B=BLOCK_B,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )
    else:
        i -= row_programs
        BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
        _center_partial(
            i_split=i // (BLOCKS_D * BLOCKS_N * TOKENS),
            i_token=i // (BLOCKS_D * BLOCKS_N) % TOKENS,
            i_n=i // BLOCKS_D % BLOCKS_N,
            i_d=i % BLOCKS_D,
            p_rows=p_rows,
            p_slopes=p_slopes,
            p_row_inverse=p_row_inverse,
            p_incoming=p_incoming,
            p_share=p_share,
            p_partial=p_partial,
            batch=batch,
            incoming_stride=incoming_stride,
            split_rows=split_rows,
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            SLOPES=SLOPES,
            WIDTH=WIDTH,
            MEAN=MEAN,
            OPERAND=OPERAND,
            PRECISION=PRECISION,
            BLOCK_B=BLOCK_B,
            BLOCK_D=BLOCK_D,
            BLOCK_N=BLOCK_N,
        )


@triton.jit(do_not_specialize=["splits", "centers"])
def center_gradient(
    p_partial,  # (splits, centers, WIDTH): dloss/d(center / norm), by part of the batch
    p_centers,  # (centers, WIDTH)
    p_gradient,  # (centers, WIDTH)
    splits,
    centers,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    i_center = tl.program_id(0).to(tl.int64) * WIDTH
    part = centers.to(tl.int64) * WIDTH
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    b_direction = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(splits):
        b_direction += tl.load(p_partial + i_center + o_d, mask=m_d, other=0.0)
        p_partial += part
    b_center = tl.load(p_centers + i_center + o_d, mask=m_d, other=0.0).to(tl.float32)
    inverse = inverse_norm(tl.sum(b_center * b_center, 0))
    b_unit = b_center * inverse
    b_direction = (b_direction - tl.sum(b_direction * b_unit, 0) * b_unit) * inverse
    tl.store(p_gradient + i_center + o_d, b_direction, mask=m_d)


class Cosines(NamedTuple):
    """The tensors that a loss over cosines leaves for its backward pass."""

    rows: Tensor
    """x, (B, T, d')"""
    centers: Tensor
    """w, (T, N, d') or (l, v, d')"""
    slopes: Tensor
    """dloss/dcosine, (B, T, `slopes_stride` of N)"""
    row_inverse: Tensor
    """1 / ||x||, (B, T)"""
    radial: Tensor
    """x / ||x|| . dloss/d(x / ||x||), (B, T)"""
    center_inverse: Tensor
    """1 / ||w||, of as many numbers as there are centres"""


class Pulled(NamedTuple):
    """The term of `code_regression` that joins the row gradient."""

    pull: Tensor
    """dloss/dcosine with the target, over the target's norm, (B,)"""
    targets: Tensor
    """(m, d')"""
    target_rows: Tensor | None
    """(B,); None: row i is for row i"""


def cosine_gradients(
    cosines: Cosines,
    pulled: Pulled | None,
    incoming: Tensor,
    share: Tensor,
    operand: torch.dtype,
    *,
    need_rows: bool,
    need_centers: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the centres, each in its shape and dtype; empty if not needed.

    ``incoming`` () or (B,) is dL/d(loss of a row); ``share`` multiplies it unless it is empty (see `reduced`).
    """
    rows, centers = cosines.rows.contiguous(), cosines.centers.contiguous()
    row_gradient, centers_gradient = empty_like_if(need_rows, rows), empty_like_if(need_centers, centers)
    batch, tokens, width = rows.shape
    count = centers.shape[0] * centers.shape[1]
    columns = count // tokens
    constants = backward_constants(operand, tokens, columns, width, tf32_allowed(), architecture(rows.device))
    block_b, block_n = constants["BLOCK_B"], constants["BLOCK_N"]
    blocks, blocks_d = triton.cdiv(batch, block_b), triton.cdiv(width, constants["BLOCK_D"])
    split_programs = tokens * blocks_d * triton.cdiv(columns, block_n)
    split_blocks = max(1, triton.cdiv(blocks * split_programs, max(PROGRAMS, split_programs)))
    splits = triton.cdiv(blocks, split_blocks) if need_centers else 0
    partial = torch.empty((splits, count, width), dtype=torch.float32, device=rows.device)
    row_programs = blocks * blocks_d * tokens if need_rows else 0
    pull, targets, target_rows = (None if x is None else x.contiguous() for x in pulled or (None, None, None))
    with torch.cuda.device_of(rows):
        cosine_backward[(row_programs + splits * split_programs,)](
            p_rows=rows,
            p_centers=centers,
            p_slopes=cosines.slopes,
            p_row_inverse=cosines.row_inverse,
            p_radial=cosines.radial,
            p_center_inverse=cosines.center_inverse,
            p_incoming=incoming,
            p_share=share,
            p_pull=pull,
            p_targets=targets,
            p_target_rows=target_rows,
            p_row_gradient=row_gradient,
            p_partial=partial,
            batch=batch,
            incoming_stride=incoming_stride(incoming),
            target_count=0 if targets is None else len(targets),
            split_rows=split_blocks * block_b,
            row_programs=row_programs,
            MEAN=share.ndim == 0,
            PULLED=pulled is not None,
            HAS_TARGET_ROWS=target_rows is not None,
            **constants,
        )
        if need_centers:
            center_gradient[(count,)](
                p_partial=partial,
                p_centers=centers,
                p_gradient=centers_gradient,
                splits=splits,
                centers=count,
                WIDTH=width,
                BLOCK_D=triton.next_power_of_2(width),
            )
    return row_gradient, centers_gradient


def slopes_stride(columns: int) -> int:
    """Numbers from one row of slopes to the next: rounded up, so that rows begin where whole vectors are loaded."""
    return triton.cdiv(columns, ALIGNED) * ALIGNED


@functools.cache
def backward_constants(
    operand: torch.dtype, tokens: int, columns: int, width: int, tf32: bool, architecture: str
) -> dict[str, Any]:
    """The constants that `cosine_backward` compiles with, but for MEAN, PULLED and HAS_TARGET_ROWS."""
    tf32 = tf32 or operand == torch.float16  # which has as many digits as TF32, but not its range
    operand = gradient_dtype(operand)
    limits = tile("cosine_backward", operand, architecture)
    block_n = block_size(columns, limits.columns)
    return {
        "TOKENS": tokens,
        "COLUMNS": columns,
        "SLOPES": slopes_stride(columns),
        "WIDTH": width,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": float32_precision(tf32, architecture),
        "BLOCK_B": limits.rows,
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_N": block_n,
        **limits.launch(block_n),
    }
