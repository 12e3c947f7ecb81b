"""Gaussian potential in Triton: two designs of the sweep over pairs, fused and in blocks. Derivation in README.md.

Both take unit rows of the vectors' dtype, with float32 products, exponentials and sums, and leave the numerators
sum_j P_ij h_j and partial sums of Z to `tangent_gradient`, which projects and scales them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import block_size, dot, inside, inverse_norm, load_block
from gif_kernels.device.rows import row_constants, unit_rows
from gif_kernels.device.tuning import Tile, architecture, fused_potential_tile, multiprocessors, tile
from gif_kernels.gaussian_potential import one_sweep
from gif_kernels.gaussian_potential.options import GaussianPotentialOptions
from gif_kernels.precision import float32_precision, gradient_dtype, tf32_allowed

BLOCK = 8192
"""Rows of a block in the second design: 128 MiB of bfloat16 pairs. Larger than a cache, but on an H100 the products of
8,192 x 8,192 pairs run at 730 TFLOP/s where those of 4,096 x 4,096, which stay in cache, run at 570."""
FUSED_UP_TO = 2048
"""Columns up to which the fused launch is used: blocks take the same time there on an H100, 52 us for 60 on an H200,
but a dozen launches, for which an eager step waits."""
GROUP = 8
"""Blocks of rows whose programs run together, and find each other's columns in the cache."""
ADDS_TO_FLOAT32 = torch.__version__ >= "2.10"
"""Whether PyTorch adds a product of bfloat16 to float32 sums; before, a product has memory of its own first."""


@triton.jit
def _pair_terms(b_cosine, sharpness, m_column, o_row, o_column):
    """P_ij = exp2(sharpness (cosine - 1)); 0 outside the mask and of a row with itself."""
    m_pair = m_column[None, :] & (o_row[:, None] != o_column[None, :])
    return tl.where(m_pair, tl.exp2(b_cosine * sharpness - sharpness), 0.0)


@triton.jit(do_not_specialize=["rows", "columns", "offset", "split_columns"])
def gaussian_potential_fused(
    p_rows,  # (rows, WIDTH), unit
    p_columns,  # (columns, WIDTH), unit
    p_sums,  # (splits, rows): sum_j P_ij
    p_numerators,  # (splits, rows, WIDTH): sum_j P_ij h_j
    rows,
    columns,
    offset,
    split_columns,
    sharpness,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # divides WIDTH
):
    """A block of rows against one part of the columns; the rows and their numerators stay, in chunks of the width."""
    CHUNKS: tl.constexpr = WIDTH // BLOCK_D
    i_start = tl.program_id(0) * BLOCK_M
    i_split = tl.program_id(1)
    first = i_split * split_columns
    p_rows += i_start.to(tl.int64) * WIDTH
    p_columns += first.to(tl.int64) * WIDTH
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < rows - i_start
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = inside(o_d, BLOCK_D, BLOCK_D)
    o_own = i_start + offset - first + o_m
    columns = tl.minimum(split_columns, columns - first)
    b_rows: tl.tuple = ()
    b_numerators: tl.tuple = ()
    for k in tl.static_range(CHUNKS):
        b_rows += (load_block(p_rows + k * BLOCK_D, o_m, m_m, o_d, m_d, WIDTH),)
        b_numerators += (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)
    b_sums = tl.zeros((BLOCK_M,), tl.float32)
    for j in range(0, columns, BLOCK_N):
        m_n = o_n < columns - j
        b_columns: tl.tuple = ()
        b_cosine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.static_range(CHUNKS):
            b_columns += (load_block(p_columns + k * BLOCK_D, o_n, m_n, o_d, m_d, WIDTH),)
            b_cosine = dot(b_rows[k], tl.trans(b_columns[k]), b_cosine, PRECISION)
        b_pairs = _pair_terms(b_cosine, sharpness, m_n, o_own, j + o_n)
        b_sums += tl.sum(b_pairs, 1)
        b_pairs = b_pairs.to(b_columns[0].dtype)
        b_added: tl.tuple = ()
        for k in tl.static_range(CHUNKS):
            b_added += (dot(b_pairs, b_columns[k], b_numerators[k], PRECISION),)
        b_numerators = b_added
        p_columns += BLOCK_N * WIDTH
    i_out = i_split.to(tl.int64) * rows + i_start
    tl.store(p_sums + i_out + o_m, b_sums, mask=m_m)
    p_numerators += i_out * WIDTH
    for k in tl.static_range(CHUNKS):
        o_out = o_m[:, None] * WIDTH + k * BLOCK_D + o_d[None, :]
        tl.store(p_numerators + o_out, b_numerators[k], mask=m_m[:, None])


@triton.jit(do_not_specialize=["rows", "offset"])
def gaussian_potential_pairs(
    p_rows,  # (rows, WIDTH), unit
    p_columns,  # (columns, WIDTH), unit
    p_pairs,  # (rows, columns): P_ij
    p_sums,  # (blocks of columns, rows): its sums over a block of columns, times weight, are added
    rows,
    columns,
    offset,
    sharpness,
    weight,
    WIDTH: tl.constexpr,
    STORE: tl.constexpr,
    EVEN: tl.constexpr,  # blocks divide rows and columns: nothing is masked
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that run together
):
    """A product whose epilogue is the exponential; programs that run together share rows and columns in the cache."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    i_group = tl.program_id(0) // (GROUP * blocks_n)
    i_inside = tl.program_id(0) % (GROUP * blocks_n)
    group = tl.minimum(blocks_m - i_group * GROUP, GROUP)
    i_start = (i_group * GROUP + i_inside % group) * BLOCK_M
    i_column = i_inside // group
    j_start = i_column * BLOCK_N
    p_rows += i_start.to(tl.int64) * WIDTH
    p_columns += j_start.to(tl.int64) * WIDTH
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    m_m = tl.full((BLOCK_M,), True, tl.int1) if EVEN else o_m < rows - i_start
    m_n = tl.full((BLOCK_N,), True, tl.int1) if EVEN else o_n < columns - j_start
    b_cosine = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = inside(o_d, WIDTH, BLOCK_D)
        b_rows = load_block(p_rows, o_m, m_m, o_d, m_d, WIDTH)
        b_columns = load_block(p_columns, o_n, m_n, o_d, m_d, WIDTH)
        b_cosine = dot(b_rows, tl.trans(b_columns), b_cosine, PRECISION)
    b_pairs = tl.exp2(b_cosine * sharpness - sharpness)
    i_own = i_start + offset
    if (j_start + BLOCK_N > columns) | ((i_own < j_start + BLOCK_N) & (j_start < i_own + BLOCK_M)):  # rarely
        b_pairs = tl.where(m_n[None, :] & ((i_own + o_m)[:, None] != (j_start + o_n)[None, :]), b_pairs, 0.0)
    p_sums += i_column.to(tl.int64) * rows + i_start + o_m
    tl.store(p_sums, tl.load(p_sums, mask=m_m, other=0.0) + weight * tl.sum(b_pairs, 1), mask=m_m)
    if STORE:
        p_pairs += i_start.to(tl.int64) * columns + j_start
        tl.store(p_pairs + o_m[:, None] * columns + o_n[None, :], b_pairs, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def tangent_gradient(
    p_row,
    p_numerators,
    p_total,
    rows,
    splits,
    slope,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dh at h = x / ||x|| on the tangent space, h, and 1 / ||x||, of the row at p_row; parts are added in order.

    dL/dh = slope / Z sum_j P_ij h_j, slope = 4t. A row of zeros gets none.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    b_row = tl.load(p_row + o_d * COLUMN_STRIDE, mask=m_d, other=0.0).to(tl.float32)
    inverse = inverse_norm(tl.sum(b_row * b_row, 0))
    b_unit = b_row * inverse
    b_gradient = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(splits):
        b_gradient += tl.load(p_numerators + o_d, mask=m_d, other=0.0)
        p_numerators += rows.to(tl.int64) * WIDTH
    b_gradient *= (slope / tl.load(p_total)).to(tl.float32)
    b_gradient -= tl.sum(b_gradient * b_unit, 0) * b_unit
    return tl.where(inverse > 0, b_gradient, 0.0), b_unit, inverse


@triton.jit(do_not_specialize=["rows", "splits"])
def gaussian_potential_gradient(
    p_vectors,  # (rows, WIDTH), any strides
    p_numerators,  # (splits, rows, WIDTH)
    p_total,  # () float64: Z
    p_gradient,  # (rows, WIDTH)
    rows,
    splits,
    slope,
    vectors_stride,
    WIDTH: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    """dL/dx of one row."""
    i = tl.program_id(0).to(tl.int64)
    p_vectors += i * vectors_stride
    b_gradient, _, inverse = tangent_gradient(
        p_vectors, p_numerators + i * WIDTH, p_total, rows, splits, slope, WIDTH, COLUMN_STRIDE, BLOCK_D
    )
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_gradient + i * WIDTH + o_d, b_gradient * inverse, mask=inside(o_d, WIDTH, BLOCK_D))


def gaussian_potential(vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions) -> Tensor:
    """log mean_{i != j} exp(-t ||h_i - h_j||^2), (); with ``others`` (m, d), the share of rows [offset, offset + n)."""
    return one_sweep.gaussian_potential(vectors, others, options, potential_and_gradient)


def potential_and_gradient(
    vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient (n, d) at ``vectors``, empty unless wanted; float32."""
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor] = torch.ops.gif_kernels.gaussian_potential_triton(
            vectors, others, options.offset, options.t, want_gradient
        )
        return found
    return _potential_and_gradient(vectors, others, options, want_gradient)


def _potential_and_gradient(
    vectors: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    n, width = vectors.shape
    gradient = torch.empty((n, width) if want_gradient else 0, dtype=torch.float32, device=vectors.device)
    with torch.cuda.device_of(vectors):
        rows = unit_rows(vectors)
        columns = None if others is None else unit_rows(others)
        total, numerators = pair_sums(rows, columns, options, want_gradient)
        if want_gradient:
            gaussian_potential_gradient[(n,)](
                p_vectors=vectors,
                p_numerators=numerators,
                p_total=total,
                p_gradient=gradient,
                rows=n,
                splits=len(numerators),
                slope=4 * options.t,
                vectors_stride=vectors.stride(0),
                **row_constants(width, vectors.stride(1)),
            )
    return one_sweep.log_mean(total, n if others is None else len(others)).float(), gradient


def pair_sums(
    rows: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_numerators: bool
) -> tuple[Tensor, Tensor]:
    """Z () float64 and sum_j P_ij h_j in parts (splits, n, d) to be added, empty unless wanted, of unit rows."""
    if not want_numerators:
        return _pair_sums_in_blocks(rows, others, options, False)
    limits = None if len(rows if others is None else others) > FUSED_UP_TO else _fused_tile(rows)
    if limits is None:
        return _pair_sums_in_blocks(rows, others, options, True)
    return _pair_sums_fused(rows, rows if others is None else others, options, limits)


def _fused_tile(rows: Tensor) -> Tile | None:
    return fused_potential_tile(rows.dtype, rows.shape[1], architecture(rows.device))


def _pair_sums_fused(
    rows: Tensor, others: Tensor, options: GaussianPotentialOptions, limits: Tile
) -> tuple[Tensor, Tensor]:
    """Every row's sums in one launch; the columns in as many parts as fill the device where the rows are few."""
    n, width = rows.shape
    row_blocks, column_blocks = triton.cdiv(n, limits.rows), triton.cdiv(len(others), limits.columns)
    blocks_a_split = triton.cdiv(column_blocks, max(1, multiprocessors(rows.device) // row_blocks))
    splits = triton.cdiv(column_blocks, blocks_a_split)
    sums = torch.empty((splits, n), dtype=torch.float32, device=rows.device)
    numerators = torch.empty((splits, n, width), dtype=torch.float32, device=rows.device)
    gaussian_potential_fused[(row_blocks, splits)](
        p_rows=rows,
        p_columns=others,
        p_sums=sums,
        p_numerators=numerators,
        rows=n,
        columns=len(others),
        offset=options.offset,
        split_columns=blocks_a_split * limits.columns,
        sharpness=_sharpness(options.t),
        **product_constants(limits, width, limits.width, _precision(rows)),
    )
    return sums.sum(dtype=torch.float64), numerators


def _pair_sums_in_blocks(
    rows: Tensor, others: Tensor | None, options: GaussianPotentialOptions, want_numerators: bool
) -> tuple[Tensor, Tensor]:
    """Pairs of blocks, one at a time: P is written, then multiplied by a library for both of its sides."""
    n, width = rows.shape
    columns = rows if others is None else others
    constants = pairs_constants(rows.dtype, width, want_numerators, _precision(rows), architecture(rows.device))
    workspace = torch.empty(
        min(n, BLOCK) * min(len(columns), BLOCK) if want_numerators else 0,
        dtype=gradient_dtype(rows.dtype),  # float16 cannot hold exp(-4t)
        device=rows.device,
    )
    numerators = torch.zeros((1, n, width) if want_numerators else 0, dtype=torch.float32, device=rows.device)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for i in range(0, n, BLOCK):
        left = rows[i : i + BLOCK]
        column_blocks = triton.cdiv(min(len(columns), BLOCK), constants["BLOCK_N"])
        sums = torch.zeros((column_blocks, len(left)), dtype=torch.float32, device=rows.device)
        for j in range(i if others is None else 0, len(columns), BLOCK):
            right = columns[j : j + BLOCK]
            mirrored = others is None and i != j
            blocks = triton.cdiv(len(left), constants["BLOCK_M"]), triton.cdiv(len(right), constants["BLOCK_N"])
            gaussian_potential_pairs[(blocks[0] * blocks[1],)](
                p_rows=left,
                p_columns=right,
                p_pairs=workspace,
                p_sums=sums,
                rows=len(left),
                columns=len(right),
                offset=i + options.offset - j,
                sharpness=_sharpness(options.t),
                weight=2.0 if mirrored else 1.0,
                EVEN=len(left) % constants["BLOCK_M"] == 0 and len(right) % constants["BLOCK_N"] == 0,
                **constants,
            )
            if want_numerators:
                pairs = workspace[: len(left) * len(right)].view(len(left), len(right))
                _add_product(numerators[0, i : i + BLOCK], pairs, right)
                if mirrored:
                    _add_product(numerators[0, j : j + BLOCK], pairs.T, left)
        total += sums.sum(dtype=torch.float64)
    return total, numerators


def _add_product(numerators: Tensor, pairs: Tensor, rows: Tensor) -> None:
    """numerators += pairs @ rows, summed in float32 whatever the pairs' dtype."""
    if pairs.dtype == torch.float32:
        numerators.addmm_(pairs, rows.float())
    elif ADDS_TO_FLOAT32:
        torch.addmm(numerators, pairs, rows, out_dtype=torch.float32, out=numerators)
    else:
        numerators += torch.mm(pairs, rows, out_dtype=torch.float32)


def _sharpness(t: float) -> float:
    """exp(2t (s - 1)) = exp2(sharpness (s - 1))."""
    return 2 * t / math.log(2)


def _precision(rows: Tensor) -> str:
    return float32_precision(tf32_allowed(), architecture(rows.device))


def product_constants(limits: Tile, width: int, chunk: int, precision: str) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "PRECISION": precision,
        "BLOCK_M": limits.rows,
        "BLOCK_N": limits.columns,
        "BLOCK_D": chunk,
        "num_warps": limits.warps,
        "num_stages": limits.stages,
    }


@functools.cache
def pairs_constants(dtype: torch.dtype, width: int, store: bool, precision: str, architecture: str) -> dict[str, Any]:
    limits = tile("gaussian_potential_pairs", dtype, architecture)
    constants = product_constants(limits, width, block_size(width, limits.width), precision)
    return {**constants, "STORE": store, "GROUP": GROUP}


@torch.library.custom_op("gif_kernels::gaussian_potential_triton", mutates_args=())
def _op(vectors: Tensor, others: Tensor | None, offset: int, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """The launches as one node of a compiled graph."""
    return _potential_and_gradient(vectors, others, GaussianPotentialOptions(t=t, offset=offset), want_gradient)


@_op.register_fake
def _(vectors: Tensor, others: Tensor | None, offset: int, t: float, want_gradient: bool) -> tuple[Tensor, Tensor]:
    shape = vectors.shape if want_gradient else 0
    return vectors.new_empty((), dtype=torch.float32), vectors.new_empty(shape, dtype=torch.float32)
