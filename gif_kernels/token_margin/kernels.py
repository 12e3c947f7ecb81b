"""Token-margin loss in Triton: three launches forward and backward. Derivation and choices in README.md.

Without projections all tokens of a sample compare one row, z; with projections each token has its own, u_j = P_j z.
Both are rows (B, T, d'), T = 1 or l. Norms, margins, logits and sums are float32 whatever the operands are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.dispatch import full_precision
from gif_kernels.margins import COSINE_LIMIT, AngularMargin
from gif_kernels.primitives import (
    SIGNATURE,
    TRITON_DTYPE,
    block_size,
    empty_like_if,
    has_tf32,
    inside,
    inverse_norm,
    load_block,
    operand_dtype,
    tf32_allowed,
)
from gif_kernels.tuning import Configuration, MatrixUnits, architecture, tile

MAX_VOCAB = 256
"""Centres a token that the kernels hold at once."""
MAX_SPLITS = 32
"""Parts of the batch whose sums for the centre gradient are kept apart, then added in order."""

WIDEST_ROWS = 64
"""Rows that a warp group multiplies at once on sm_90 (and sm_100)."""

LIMIT = tl.constexpr(COSINE_LIMIT)
PI = tl.constexpr(math.pi)


@triton.jit
def _acos(x):
    """acos in float32 without a library call: sqrt(1 - |x|) p(|x|), error 2e-8 (Abramowitz and Stegun 4.4.46)."""
    y = tl.abs(x)
    p = -0.0012624911
    p = p * y + 0.0066700901
    p = p * y - 0.0170881256
    p = p * y + 0.0308918810
    p = p * y - 0.0501743046
    p = p * y + 0.0889789874
    p = p * y - 0.2145988016
    p = p * y + 1.5707963050
    angle = tl.sqrt_rn(1.0 - y) * p
    return tl.where(x < 0, PI - angle, angle)


@triton.jit
def _cos_and_sin(angle):
    """Both in float32 for an angle in [0, pi], error 2e-7: odd and even polynomials about pi / 2 (Chebyshev fit)."""
    t = angle - PI / 2
    x = t * t
    odd = 0.0000026051
    odd = odd * x - 0.0001980902
    odd = odd * x + 0.0083330502
    odd = odd * x - 0.1666665795
    odd = odd * x + 0.9999999957
    even = -0.0000002605
    even = even * x + 0.0000247601
    even = even * x - 0.0013888360
    even = even * x + 0.0416666362
    even = even * x - 0.4999999936
    even = even * x + 0.9999999998
    return -t * odd, even


@triton.jit
def _margin(cosine, first, second, third, BEND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """psi and dpsi/dcos; `_margin_numbers` says what the three numbers are for each BEND."""
    slope = tl.full(cosine.shape, 1.0, tl.float32)
    if BEND == "none":
        value = cosine - third
    else:
        c = tl.minimum(tl.maximum(cosine, -LIMIT), LIMIT)
        s = tl.sqrt_rn((1.0 - c) * (1.0 + c))
        if BEND == "shift":
            past = c <= -first  # the shifted angle is past pi
            value = c * first - s * second
            value = tl.where(past, -value - 2.0, value) - third
            true_slope = (s * first + c * second) / s
            true_slope = tl.where(past, -true_slope, true_slope)
        else:
            angle = first * _acos(c) + second
            turns = tl.floor(angle / PI)
            rest = angle - turns * PI  # (-1)^k cos(a) = cos(rest), and so for sin
            cos_rest, sin_rest = _cos_and_sin(rest)
            value = cos_rest - 2.0 * turns - third
            true_slope = first * sin_rest / s
        if not STRAIGHT_THROUGH:
            slope = true_slope
    return value, slope


@triton.jit(do_not_specialize=["batch"])
def token_margin_forward(
    p_rows,  # (B, T, WIDTH), T = 1 if SHARED else LENGTH
    p_centers,  # (LENGTH, VOCAB, WIDTH)
    p_codes,  # (B, LENGTH)
    p_weights,  # (LENGTH,)
    p_losses,  # (B,)
    p_slopes,  # (B, LENGTH, VOCAB): dloss/dcosine
    p_row_inverse,  # (B, T): 1 / norm
    p_radial,  # (B, T): row / norm . dloss/d(row / norm)
    p_center_inverse,  # (LENGTH, VOCAB)
    batch,
    scale,
    margin_first,
    margin_second,
    margin_third,
    LENGTH: tl.constexpr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    SAVE: tl.constexpr,
    BEND: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,  # >= VOCAB
    GROUP: tl.constexpr,  # tokens in one product
):
    TOKENS: tl.constexpr = 1 if SHARED else LENGTH
    i_start = tl.program_id(0).to(tl.int64) * BLOCK_B  # int64 once; offsets inside a block are small
    p_rows += i_start * (TOKENS * WIDTH)
    p_codes += i_start * LENGTH
    p_losses += i_start
    p_slopes += i_start * (LENGTH * VOCAB)
    p_row_inverse += i_start * TOKENS
    p_radial += i_start * TOKENS

    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_v = tl.arange(0, BLOCK_V)
    m_v = (o_v < VOCAB)[None, None, :]
    o_column = tl.arange(0, GROUP * BLOCK_V)
    b_losses = tl.zeros((BLOCK_B,), tl.float32)
    b_radial = tl.zeros((BLOCK_B,), tl.float32)
    for i_token in range(0, LENGTH, GROUP):
        i_row = 0 if SHARED else i_token
        o_token = i_token + tl.arange(0, GROUP)
        m_token = o_token < LENGTH
        o_column_token = i_token + o_column // BLOCK_V
        o_center = o_column_token * VOCAB + o_column % BLOCK_V
        m_center = (o_column_token < LENGTH) & (o_column % BLOCK_V < VOCAB)

        b_product = tl.zeros((BLOCK_B, GROUP * BLOCK_V), tl.float32)
        b_row_square = tl.zeros((BLOCK_B,), tl.float32)
        b_center_square = tl.zeros((GROUP * BLOCK_V,), tl.float32)
        for i_d in range(0, WIDTH, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = inside(o_d, WIDTH, BLOCK_D)
            b_row = load_block(p_rows + i_row * WIDTH, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(OPERAND)
            b_center = load_block(p_centers, o_center, m_center, o_d, m_d, WIDTH).to(OPERAND)
            b_product = tl.dot(b_row, tl.trans(b_center), acc=b_product, input_precision=PRECISION)
            b_row_square += tl.sum(b_row.to(tl.float32) * b_row.to(tl.float32), 1)
            b_center_square += tl.sum(b_center.to(tl.float32) * b_center.to(tl.float32), 1)
        b_row_inverse = inverse_norm(b_row_square)
        b_center_inverse = inverse_norm(b_center_square)
        b_cosine = b_product * b_row_inverse[:, None] * b_center_inverse[None, :]
        b_cosine = tl.reshape(b_cosine, (BLOCK_B, GROUP, BLOCK_V))

        m_code = m_b[:, None] & m_token[None, :]
        b_code = tl.load(p_codes + o_b[:, None] * LENGTH + o_token[None, :], mask=m_code, other=-1)
        b_weight = tl.load(p_weights + o_token, mask=m_token, other=0.0).to(tl.float32)
        b_weight = tl.where(b_code >= 0, b_weight[None, :], 0.0)  # (BLOCK_B, GROUP)
        m_own = o_v[None, None, :] == b_code[:, :, None]
        b_own = tl.sum(tl.where(m_own, b_cosine, 0.0), 2)
        b_value, b_slope = _margin(b_own, margin_first, margin_second, margin_third, BEND, STRAIGHT_THROUGH)
        b_logit = tl.where(m_v, tl.where(m_own, b_value[:, :, None], b_cosine) * scale, -float("inf"))
        b_max = tl.max(b_logit, 2)
        b_exp = tl.exp(b_logit - b_max[:, :, None])
        b_sum = tl.sum(b_exp, 2)
        b_losses += tl.sum((tl.log(b_sum) + (b_max - b_value * scale)) * b_weight, 1)

        if SAVE:
            b_slopes = b_exp / b_sum[:, :, None]  # softmax; then dloss/dcosine
            b_slopes = tl.where(m_own, (b_slopes - 1.0) * b_slope[:, :, None], b_slopes)
            b_slopes = b_slopes * (b_weight * scale)[:, :, None]
            o_slope = (o_b[:, None, None] * LENGTH + o_token[None, :, None]) * VOCAB + o_v[None, None, :]
            tl.store(p_slopes + o_slope, b_slopes, mask=m_code[:, :, None] & m_v)
            b_radial += tl.sum(tl.sum(b_slopes * b_cosine, 2), 1)
            tl.store(p_row_inverse + o_b * TOKENS + i_row, b_row_inverse, mask=m_b)
            if tl.program_id(0) == 0:
                tl.store(p_center_inverse + o_center, b_center_inverse, mask=m_center)
            if not SHARED:
                tl.store(p_radial + o_b * TOKENS + i_row, b_radial, mask=m_b)
                b_radial = tl.zeros((BLOCK_B,), tl.float32)
    tl.store(p_losses + o_b, b_losses, mask=m_b)
    if SAVE and SHARED:
        tl.store(p_radial + o_b, b_radial, mask=m_b)


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
    p_loss_gradient,
    p_row_gradient,
    batch,
    loss_gradient_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of dloss/drow = loss gradient / norm (sum_n slope_n center_n / norm_n - radial row / norm)."""
    i_start = i_block.to(tl.int64) * BLOCK_B
    i_row = i_start * TOKENS + i_token
    p_slopes += i_row * COLUMNS
    p_centers += i_token * COLUMNS * WIDTH
    p_center_inverse += i_token * COLUMNS
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    b_gradient = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for i_n in range(0, COLUMNS, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < COLUMNS
        b_slopes = load_block(p_slopes, o_b, m_b, o_n, m_n, TOKENS * COLUMNS)
        b_slopes = b_slopes * tl.load(p_center_inverse + o_n, mask=m_n, other=0.0)[None, :]
        b_center = load_block(p_centers, o_n, m_n, o_d, m_d, WIDTH).to(OPERAND)
        b_gradient = tl.dot(b_slopes.to(OPERAND), b_center, acc=b_gradient, input_precision=PRECISION)
    b_row = load_block(p_rows + i_row * WIDTH, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(tl.float32)
    b_inverse = tl.load(p_row_inverse + i_row + o_b * TOKENS, mask=m_b, other=0.0)
    b_radial = tl.load(p_radial + i_row + o_b * TOKENS, mask=m_b, other=0.0) * b_inverse
    p_loss_gradient += i_start * loss_gradient_stride
    b_factor = tl.load(p_loss_gradient + o_b * loss_gradient_stride, mask=m_b, other=0.0) * b_inverse
    b_gradient = (b_gradient - b_radial[:, None] * b_row) * b_factor[:, None]
    o_out = o_b[:, None] * (TOKENS * WIDTH) + o_d[None, :]
    tl.store(p_row_gradient + i_row * WIDTH + o_out, b_gradient, mask=m_b[:, None] & m_d[None, :])


@triton.jit
def _center_partial(
    i_split,
    i_token,
    i_n,
    i_d,
    p_rows,
    p_slopes,
    p_row_inverse,
    p_loss_gradient,
    p_partial,
    batch,
    split_rows,
    loss_gradient_stride,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of dloss/d(center / norm) = sum_b loss gradient_b slope_b row_b / norm_b over one part of the batch."""
    i_start = i_split.to(tl.int64) * split_rows
    i_row = i_start * TOKENS + i_token
    p_rows += i_row * WIDTH
    p_slopes += i_row * COLUMNS
    p_row_inverse += i_row
    p_loss_gradient += i_start * loss_gradient_stride
    p_partial += (i_split.to(tl.int64) * TOKENS + i_token) * (COLUMNS * WIDTH)
    rows = tl.minimum(split_rows, batch - i_start).to(tl.int32)
    o_b = tl.arange(0, BLOCK_B)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < COLUMNS
    b_partial = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for i_b in range(0, rows, BLOCK_B):
        m_b = o_b < rows - i_b
        b_factor = tl.load(p_row_inverse + o_b * TOKENS, mask=m_b, other=0.0)
        b_factor = tl.load(p_loss_gradient + o_b * loss_gradient_stride, mask=m_b, other=0.0) * b_factor
        b_slopes = load_block(p_slopes, o_b, m_b, o_n, m_n, TOKENS * COLUMNS) * b_factor[:, None]
        b_row = load_block(p_rows, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(OPERAND)
        b_partial = tl.dot(tl.trans(b_row), b_slopes.to(OPERAND), acc=b_partial, input_precision=PRECISION)
        p_rows += BLOCK_B * TOKENS * WIDTH
        p_slopes += BLOCK_B * TOKENS * COLUMNS
        p_row_inverse += BLOCK_B * TOKENS
        p_loss_gradient += BLOCK_B * loss_gradient_stride
    o_out = o_n[None, :] * WIDTH + o_d[:, None]
    tl.store(p_partial + o_out, b_partial, mask=m_n[None, :] & m_d[:, None])


@triton.jit(do_not_specialize=["batch", "loss_gradient_stride", "split_rows", "row_programs"])
def token_margin_backward(
    p_rows,  # (B, TOKENS, WIDTH)
    p_centers,  # (TOKENS, COLUMNS, WIDTH)
    p_slopes,  # (B, TOKENS, COLUMNS)
    p_row_inverse,  # (B, TOKENS)
    p_radial,  # (B, TOKENS)
    p_center_inverse,  # (TOKENS, COLUMNS)
    p_loss_gradient,  # (B,), any stride: 0 where every row counts the same
    p_row_gradient,  # (B, TOKENS, WIDTH)
    p_partial,  # (splits, TOKENS, COLUMNS, WIDTH)
    batch,
    loss_gradient_stride,
    split_rows,
    row_programs,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first row_programs programs take blocks of the row gradient, the others of the centre gradient's parts."""
    BLOCKS_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    i = tl.program_id(0)
    if i < row_programs:
        _row_gradient(
            i // (BLOCKS_D * TOKENS), i // BLOCKS_D % TOKENS, i % BLOCKS_D,
            p_rows, p_centers, p_slopes, p_row_inverse, p_radial, p_center_inverse, p_loss_gradient, p_row_gradient,
            batch, loss_gradient_stride,
            TOKENS, COLUMNS, WIDTH, OPERAND, PRECISION, BLOCK_B, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    else:
        i -= row_programs
        _center_partial(
            i // (BLOCKS_D * BLOCKS_N * TOKENS), i // (BLOCKS_D * BLOCKS_N) % TOKENS,
            i // BLOCKS_D % BLOCKS_N, i % BLOCKS_D,
            p_rows, p_slopes, p_row_inverse, p_loss_gradient, p_partial, batch, split_rows, loss_gradient_stride,
            TOKENS, COLUMNS, WIDTH, OPERAND, PRECISION, BLOCK_B, BLOCK_D, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def token_margin_centers(
    p_partial,  # (splits, CENTERS, WIDTH): dloss/d(center / norm), by part of the batch
    p_centers,  # (CENTERS, WIDTH)
    p_gradient,  # (CENTERS, WIDTH)
    splits,
    CENTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    i_center = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    b_direction = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(splits):
        b_direction += tl.load(p_partial + i_center * WIDTH + o_d, mask=m_d, other=0.0)
        p_partial += CENTERS * WIDTH
    b_center = tl.load(p_centers + i_center * WIDTH + o_d, mask=m_d, other=0.0).to(tl.float32)
    inverse = inverse_norm(tl.sum(b_center * b_center, 0))
    b_unit = b_center * inverse
    b_direction = (b_direction - tl.sum(b_direction * b_unit, 0) * b_unit) * inverse
    tl.store(p_gradient + i_center * WIDTH + o_d, b_direction, mask=m_d)


def token_margin_rows(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    weights: Tensor,
    margin: AngularMargin,
    scale: float,
) -> Tensor:
    """Loss of each row, (B,); 0 where the code is -1. Raises ValueError for more than MAX_VOCAB centres a token."""
    if centers.shape[1] > MAX_VOCAB:
        raise ValueError(
            f'token_margin_loss with impl="triton" takes at most {MAX_VOCAB} centers a token, got {centers.shape[1]}; '
            'use impl="blocked"'
        )
    losses: Tensor = _TokenMargin.apply(embeddings, centers, projections, codes, weights, margin, scale)
    return losses


class _TokenMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        projections: Tensor | None,
        codes: Tensor,
        weights: Tensor,
        margin: AngularMargin,
        scale: float,
    ) -> Tensor:
        rows = embeddings.unsqueeze(1) if projections is None else _project(embeddings, projections)
        save = any(ctx.needs_input_grad)
        compiling = torch.compiler.is_compiling()
        forward: Callable[..., Any] = torch.ops.gif_kernels.token_margin_forward if compiling else _forward
        losses, *saved = forward(rows, centers, codes, weights, *_margin_numbers(margin), scale, save)
        if save:
            ctx.save_for_backward(embeddings, projections, rows, centers, *saved)
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, projections, *saved = ctx.saved_tensors
        need_embeddings, need_centers, need_projections = ctx.needs_input_grad[:3]
        compiling = torch.compiler.is_compiling()
        backward: Callable[..., Any] = torch.ops.gif_kernels.token_margin_backward if compiling else _backward
        need_rows = need_embeddings or need_projections
        row_gradient, centers_gradient = backward(*saved, loss_gradient, need_rows, need_centers)
        embeddings_gradient = projections_gradient = None
        flat = row_gradient.flatten(1)  # (B, T d')
        if projections is None:
            embeddings_gradient = flat
        else:
            with full_precision(embeddings.device):
                if need_embeddings:
                    embeddings_gradient = (flat @ _flatten(projections, flat.dtype)).to(embeddings.dtype)
                if need_projections:
                    projections_gradient = (flat.T @ embeddings.to(flat.dtype)).to(projections.dtype)
                    projections_gradient = projections_gradient.view_as(projections)
        return (
            embeddings_gradient if need_embeddings else None,
            centers_gradient if need_centers else None,
            projections_gradient,
            *(None,) * 4,
        )


def _project(embeddings: Tensor, projections: Tensor) -> Tensor:
    """u_j = P_j z, (B, l, d'), in one product; its direction does not depend on the norm of z."""
    length, inner, _ = projections.shape
    dtype = operand_dtype(embeddings.dtype, projections.dtype)
    return (embeddings.to(dtype) @ _flatten(projections, dtype).T).view(-1, length, inner)


def _flatten(projections: Tensor, dtype: torch.dtype) -> Tensor:
    return projections.to(dtype).reshape(-1, projections.shape[-1])  # (l d', d)


def _margin_numbers(margin: AngularMargin) -> tuple[str, bool, float, float, float]:
    """How psi is computed, whether its slope is 1, and the three numbers it takes.

    "none": psi = cos - third.
    "shift", where m1 = 1, with m2 = turns pi + rest, 0 <= rest < pi: cos(rest), sin(rest), 2 turns + m3. The angle is
    never needed: cos(theta + rest) follows by the addition theorem, and passes pi where cos(theta) <= -cos(rest).
    "angle": m1, m2, m3.
    """
    straight_through = margin.gradient == "straight_through"
    if not margin.bends:
        return "none", straight_through, 0.0, 0.0, float(margin.m3)
    if margin.m1 == 1.0:
        turns = math.floor(margin.m2 / math.pi)
        rest = margin.m2 - turns * math.pi
        return "shift", straight_through, math.cos(rest), math.sin(rest), 2 * turns + margin.m3
    return "angle", straight_through, float(margin.m1), float(margin.m2), float(margin.m3)


# ---- launches


@functools.cache
def _forward_constants(
    row_dtype: torch.dtype,
    center_dtype: torch.dtype,
    tokens: int,
    length: int,
    vocab: int,
    width: int,
    save: bool,
    bend: str,
    straight_through: bool,
    tf32: bool,
    architecture: str,
) -> dict[str, Any]:
    operand = operand_dtype(row_dtype, center_dtype)
    limits = tile("token_margin_forward", operand, architecture)
    block_v = block_size(vocab, MAX_VOCAB)
    group = block_size(length, max(1, limits.columns // block_v), least=1) if tokens == 1 else 1
    columns = group * block_v
    return {
        "LENGTH": length,
        "VOCAB": vocab,
        "WIDTH": width,
        "SHARED": tokens == 1,
        "SAVE": save,
        "BEND": bend,
        "STRAIGHT_THROUGH": straight_through,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": "tf32" if tf32 and has_tf32(architecture) else "ieee",
        "BLOCK_B": limits.rows_beside(columns),
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_V": block_v,
        "GROUP": group,
        **limits.launch(columns),
    }


@functools.cache
def _backward_constants(
    row_dtype: torch.dtype,
    center_dtype: torch.dtype,
    tokens: int,
    columns: int,
    width: int,
    tf32: bool,
    architecture: str,
) -> dict[str, Any]:
    operand = operand_dtype(row_dtype, center_dtype)
    if operand == torch.float16:  # scaled gradients may leave its range; TF32 has its digits and float32's range
        operand, tf32 = torch.float32, True
    limits = tile("token_margin_backward", operand, architecture)
    block_n = block_size(columns, limits.columns)
    return {
        "TOKENS": tokens,
        "COLUMNS": columns,
        "WIDTH": width,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": "tf32" if tf32 and has_tf32(architecture) else "ieee",
        "BLOCK_B": limits.rows,
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_N": block_n,
        **limits.launch(block_n),
    }


def _center_constants(count: int, width: int) -> dict[str, Any]:
    return {"CENTERS": count, "WIDTH": width, "BLOCK_D": triton.next_power_of_2(width)}


def _forward_outputs(rows: Tensor, centers: Tensor, save: bool) -> tuple[Tensor, ...]:
    batch, tokens, _ = rows.shape
    length, vocab, _ = centers.shape
    sizes = [(batch,), (batch, length, vocab), (batch, tokens), (batch, tokens), (length, vocab)]
    return tuple(
        torch.empty(size if save or i == 0 else 0, dtype=torch.float32, device=rows.device)
        for i, size in enumerate(sizes)
    )


def _forward(
    rows: Tensor,
    centers: Tensor,
    codes: Tensor,
    weights: Tensor,
    bend: str,
    straight_through: bool,
    margin_first: float,
    margin_second: float,
    margin_third: float,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,), and what `_backward` takes: slopes (B, l, v), row inverse norms and radial parts (B, T), center
    inverse norms (l, v); empty unless ``save``."""
    outputs = _forward_outputs(rows, centers, save)
    batch, tokens, _ = rows.shape
    constants = _forward_constants(
        rows.dtype, centers.dtype, tokens, *centers.shape, save, bend, straight_through, tf32_allowed(),
        architecture(rows.device),
    )  # fmt: skip
    with torch.cuda.device_of(rows):
        token_margin_forward[(triton.cdiv(batch, constants["BLOCK_B"]),)](
            rows.contiguous(), centers.contiguous(), codes.contiguous(), weights.contiguous(), *outputs,
            batch, scale, margin_first, margin_second, margin_third, **constants,
        )  # fmt: skip
    return outputs  # type: ignore[return-value]


def _backward(
    rows: Tensor,
    centers: Tensor,
    slopes: Tensor,
    row_inverse: Tensor,
    radial: Tensor,
    center_inverse: Tensor,
    loss_gradient: Tensor,
    need_rows: bool,
    need_centers: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (B, T, d') and of the centres (l, v, d'), each in its dtype; empty if not needed."""
    rows, centers = rows.contiguous(), centers.contiguous()
    row_gradient, centers_gradient = empty_like_if(need_rows, rows), empty_like_if(need_centers, centers)
    batch, tokens, width = rows.shape
    count = centers.shape[0] * centers.shape[1]
    constants = _backward_constants(
        rows.dtype, centers.dtype, tokens, count // tokens, width, tf32_allowed(), architecture(rows.device)
    )
    blocks = triton.cdiv(batch, constants["BLOCK_B"])
    split_blocks = max(1, triton.cdiv(blocks, MAX_SPLITS))
    splits = triton.cdiv(blocks, split_blocks) if need_centers else 0
    partial = torch.empty((splits, count, width), dtype=torch.float32, device=rows.device)
    columns_of_programs = tokens * triton.cdiv(width, constants["BLOCK_D"])
    row_programs = blocks * columns_of_programs if need_rows else 0
    center_programs = splits * columns_of_programs * triton.cdiv(count // tokens, constants["BLOCK_N"])
    with torch.cuda.device_of(rows):
        token_margin_backward[(row_programs + center_programs,)](
            rows, centers, slopes, row_inverse, radial, center_inverse, loss_gradient, row_gradient, partial,
            batch, loss_gradient.stride(0), split_blocks * constants["BLOCK_B"], row_programs, **constants,
        )  # fmt: skip
        if need_centers:
            token_margin_centers[(count,)](
                partial, centers, centers_gradient, splits, **_center_constants(count, width)
            )
    return row_gradient, centers_gradient


_forward_op = torch.library.custom_op("gif_kernels::token_margin_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("gif_kernels::token_margin_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(rows: Tensor, centers: Tensor, codes: Tensor, weights: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    return _forward_outputs(rows, centers, save=numbers[-1])


@_backward_op.register_fake
def _(rows: Tensor, centers: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    need_rows, need_centers = saved[-2:]
    return empty_like_if(need_rows, rows), empty_like_if(need_centers, centers)


# ---- ahead of time


@dataclass(frozen=True)
class _Sizes:
    """Dtypes and sizes to compile for; ``projected`` gives each token a row of its own."""

    rows: torch.dtype
    centers: torch.dtype
    length: int
    vocab: int
    width: int
    projected: bool = False

    @property
    def tokens(self) -> int:
        return self.length if self.projected else 1

    def __str__(self) -> str:
        dtypes = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (self.rows, self.centers))
        sizes = f"{self.length} x {self.vocab} x {self.width}"
        return f"{sizes} {' and '.join(dtypes)}{', projected' if self.projected else ''}"


def shipped(architecture: str) -> list[Configuration]:
    """What `gif_kernels.aot` compiles for ``architecture``: usual sizes, and the largest and oddest of each kind."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual, projected = _Sizes(bf16, bf16, 5, 20, 512), _Sizes(bf16, bf16, 5, 20, 512, projected=True)
    mixed = _Sizes(bf16, fp32, 5, 20, 512)
    return [
        _shipped_forward(architecture, usual),
        _shipped_forward(architecture, projected),
        _shipped_forward(architecture, _Sizes(fp16, fp16, 7, 16, 768), bend="angle"),
        _shipped_forward(architecture, _Sizes(bf16, bf16, 4, MAX_VOCAB, 400)),
        _shipped_forward(architecture, mixed),
        _shipped_forward(architecture, _Sizes(fp32, fp32, 5, 20, 512), tf32=True),
        _shipped_forward(architecture, _Sizes(fp32, fp32, 4, MAX_VOCAB, 512, projected=True)),
        _shipped_backward(architecture, usual),
        _shipped_backward(architecture, projected),
        _shipped_backward(architecture, _Sizes(fp16, fp16, 5, 20, 512)),
        _shipped_backward(architecture, _Sizes(bf16, bf16, 7, 20, 400)),
        _shipped_backward(architecture, mixed),
        _shipped_backward(architecture, _Sizes(fp32, fp32, 5, 20, 512, projected=True)),
        _shipped_centers(usual),
    ]


def _shipped_forward(architecture: str, sizes: _Sizes, bend: str = "shift", tf32: bool = False) -> Configuration:
    shape = (sizes.length, sizes.vocab, sizes.width)
    constants = _forward_constants(
        sizes.rows, sizes.centers, sizes.tokens, *shape, True, bend, False, tf32, architecture
    )
    floats = ["p_weights", "p_losses", "p_slopes", "p_row_inverse", "p_radial", "p_center_inverse"]
    signature = {
        "p_rows": SIGNATURE[sizes.rows],
        "p_centers": SIGNATURE[sizes.centers],
        "p_codes": "*i64",
        **dict.fromkeys(floats, "*fp32"),
        "batch": "i32",
        **dict.fromkeys(["scale", "margin_first", "margin_second", "margin_third"], "fp32"),
    }
    label = f"{sizes}, {bend}{', TF32' if tf32 else ''}"
    return Configuration(label, token_margin_forward, signature, constants, _matrix_units(constants))


def _shipped_backward(architecture: str, sizes: _Sizes) -> Configuration:
    columns = sizes.length * sizes.vocab // sizes.tokens
    constants = _backward_constants(sizes.rows, sizes.centers, sizes.tokens, columns, sizes.width, False, architecture)
    floats = ["p_slopes", "p_row_inverse", "p_radial", "p_center_inverse", "p_loss_gradient", "p_partial"]
    signature = {
        "p_rows": SIGNATURE[sizes.rows],
        "p_centers": SIGNATURE[sizes.centers],
        "p_row_gradient": SIGNATURE[sizes.rows],
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(["batch", "loss_gradient_stride", "split_rows", "row_programs"], "i32"),
    }
    return Configuration(str(sizes), token_margin_backward, signature, constants, _matrix_units(constants))


def _shipped_centers(sizes: _Sizes) -> Configuration:
    pointers = dict.fromkeys(["p_centers", "p_gradient"], SIGNATURE[sizes.centers])
    signature = {"p_partial": "*fp32", **pointers, "splits": "i32"}
    constants = _center_constants(sizes.length * sizes.vocab, sizes.width)
    return Configuration(str(sizes), token_margin_centers, signature, constants)


def _matrix_units(constants: dict[str, Any]) -> MatrixUnits:
    """16-bit operands use matrix units; the widest take 64 rows, and a large vocabulary leaves no room for so many."""
    if constants["OPERAND"] == tl.float32:
        return "none"
    return "widest" if constants["BLOCK_B"] >= WIDEST_ROWS else "any"
