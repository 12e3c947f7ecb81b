"""Nearest centroid in Triton: a running best beside the products, one launch, no host sync. Choices in README.md."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.primitives import TRITON_DTYPE, block_size, dot, inside, load_block
from gif_kernels.device.rows import inverse_norms
from gif_kernels.device.tuning import architecture, tile
from gif_kernels.precision import float32_precision, shared_dtype, tf32_allowed


@triton.jit(do_not_specialize=["segments"])
def nearest_centroid_search(
    p_vectors,  # (n, WIDTH), segment after segment
    p_centroids,  # (segments, COUNT, WIDTH)
    p_row_inverse,  # (n,): 1 / norm
    p_centroid_inverse,  # (segments, COUNT)
    p_offsets,  # (segments + 1,)
    p_segment,  # (programs,): whose rows a program takes; ``segments`` where none are left
    p_first,  # (segments,): the first program of each
    p_index,  # (n,)
    p_cosine,  # (n,)
    segments,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_segment = tl.load(p_segment + tl.program_id(0))
    if i_segment < segments:
        i_block = tl.program_id(0) - tl.load(p_first + i_segment)
        i_start = tl.load(p_offsets + i_segment) + i_block * BLOCK_M
        rows = tl.load(p_offsets + i_segment + 1) - i_start
        p_vectors += i_start * WIDTH
        p_centroids += i_segment * (COUNT * WIDTH)
        p_centroid_inverse += i_segment * COUNT
        o_m = tl.arange(0, BLOCK_M)
        m_m = o_m < rows
        b_best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        b_index = tl.zeros((BLOCK_M,), tl.int32)
        for j in range(0, COUNT, BLOCK_N):
            o_n = j + tl.arange(0, BLOCK_N)
            m_n = o_n < COUNT
            b_product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for i_d in range(0, WIDTH, BLOCK_D):
                o_d = i_d + tl.arange(0, BLOCK_D)
                m_d = inside(o_d, WIDTH, BLOCK_D)
                b_row = load_block(p_vectors, o_m, m_m, o_d, m_d, WIDTH).to(OPERAND)
                b_centroid = load_block(p_centroids, o_n, m_n, o_d, m_d, WIDTH).to(OPERAND)
                b_product = dot(b_row, tl.trans(b_centroid), b_product, PRECISION)
            b_inverse = tl.load(p_centroid_inverse + o_n, mask=m_n, other=0.0)
            b_product = tl.where(m_n[None, :], b_product * b_inverse[None, :], -float("inf"))
            b_found, b_where = tl.max(b_product, 1, return_indices=True, return_indices_tie_break_left=True)
            b_better = b_found > b_best  # strictly: of equals the first stays
            b_index = tl.where(b_better, j + b_where, b_index)
            b_best = tl.where(b_better, b_found, b_best)
        tl.store(p_index + i_start + o_m, b_index, mask=m_m)
        b_inverse = tl.load(p_row_inverse + i_start + o_m, mask=m_m, other=0.0)
        tl.store(p_cosine + i_start + o_m, b_best * b_inverse, mask=m_m)


def nearest_centroid(vectors: Tensor, centroids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) int64 and cosine (n,) among centroids (g, k, d): rows offsets[i]:offsets[i+1] use centroids[i]."""
    n, (segments, count, width) = len(vectors), centroids.shape
    index = torch.empty(n, dtype=torch.int64, device=vectors.device)
    cosine = torch.empty(n, dtype=torch.float32, device=vectors.device)
    if n == 0:
        return index, cosine
    vectors, centroids = vectors.contiguous(), centroids.contiguous()
    operand = shared_dtype(vectors.dtype, centroids.dtype)
    constants = search_constants(operand, count, width, tf32_allowed(), architecture(vectors.device))
    rows = constants["BLOCK_M"]
    # a segment's last block may be partly empty: as many programs as there can be, so that no one waits for the sizes
    programs = torch.arange(triton.cdiv(n, rows) + segments, device=vectors.device)
    blocks = (offsets.diff() + (rows - 1)) // rows
    ends = blocks.cumsum(0)
    with torch.cuda.device_of(vectors):
        nearest_centroid_search[(len(programs),)](
            p_vectors=vectors,
            p_centroids=centroids,
            p_row_inverse=inverse_norms(vectors, operand),
            p_centroid_inverse=inverse_norms(centroids.view(-1, width), operand),
            p_offsets=offsets.contiguous(),
            p_segment=torch.searchsorted(ends, programs, right=True),
            p_first=ends - blocks,
            p_index=index,
            p_cosine=cosine,
            segments=segments,
            **constants,
        )
    return index, cosine


@functools.cache
def search_constants(operand: torch.dtype, count: int, width: int, tf32: bool, architecture: str) -> dict[str, Any]:
    """The constants that the kernel compiles with."""
    limits = tile("nearest_centroid", operand, architecture)
    columns = block_size(count, limits.columns)
    return {
        "COUNT": count,
        "WIDTH": width,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": float32_precision(tf32, architecture),
        "BLOCK_M": limits.rows,
        "BLOCK_N": columns,
        "BLOCK_D": block_size(width, limits.width),
        **limits.launch(columns),
    }
