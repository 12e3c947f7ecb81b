"""Token-margin loss in Triton: three launches forward and backward, and one for a mean. Choices in README.md.

Without projections all tokens of a sample compare one row, z; with projections each token has its own, u_j = P_j z.
Both are rows (B, T, d'), T = 1 or l. Norms, margins, logits and sums are float32 whatever the operands are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.code_regression.kernels import regression_cosine, regression_loss
from gif_kernels.device.cosine_gradients import slopes_stride
from gif_kernels.device.gathers import gathered_index
from gif_kernels.device.margins import margin_arguments, margin_value_and_slope
from gif_kernels.device.primitives import TRITON_DTYPE, block_size, dot, inside, inverse_norm, load_block
from gif_kernels.device.reduction import reduced
from gif_kernels.device.tuning import MAX_VOCAB, WIDE_VOCAB, architecture, tile
from gif_kernels.precision import float32_precision, tf32_allowed
from gif_kernels.token_margin.options import TokenMarginOptions


@triton.jit
def block_inverse_norms(
    p, o_row, m_row, STRIDE: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr, BLOCK_D: tl.constexpr
):
    """1 / norm of each row of a block, rounded to OPERAND; in a loop of its own, for the reason that rows.py gives."""
    b_square = tl.zeros((o_row.shape[0], BLOCK_D), tl.float32)
    for i_d in tl.static_range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_row = load_block(p, o_row, m_row, o_d, inside(o_d, WIDTH, BLOCK_D), STRIDE).to(OPERAND).to(tl.float32)
        b_square += b_row * b_row
    return inverse_norm(tl.sum(b_square, 1))


@triton.jit(do_not_specialize=["batch", "target_count"])
def token_margin_forward(
    p_rows,  # (B, T, WIDTH), T = 1 if SHARED else LENGTH
    p_centers,  # (LENGTH, VOCAB, WIDTH)
    p_codes,  # (B, LENGTH)
    p_weights,  # (LENGTH,), or None: 1 / LENGTH each
    p_targets,  # (target_count, WIDTH), if PULLED (and SHARED)
    p_target_rows,  # (B,), or None: row i is for row i
    p_losses,  # (B,)
    p_slopes,  # (B, T, SLOPES), SLOPES >= VOCAB of each of its tokens: dloss/dcosine
    p_row_inverse,  # (B, T): 1 / norm
    p_radial,  # (B, T): row / norm . dloss/d(row / norm)
    p_center_inverse,  # (LENGTH, VOCAB)
    p_pull,  # (B,): dloss/dcosine with the target, over the target's norm
    batch,
    target_count,
    pull,
    scale,
    m1,  # of psi, as the four that follow: see `margin_arguments`
    m2,
    cos_m2,
    sin_m2,
    drop,
    LENGTH: tl.constexpr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOPES: tl.constexpr,
    SHARED: tl.constexpr,
    WEIGHED: tl.constexpr,
    PULLED: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    SAVE: tl.constexpr,
    MARGIN: tl.constexpr,
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
    p_slopes += i_start * (TOKENS * SLOPES)
    p_row_inverse += i_start * TOKENS
    p_radial += i_start * TOKENS

    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_v = tl.arange(0, BLOCK_V)
    m_v = (o_v < VOCAB)[None, None, :]
    o_column = tl.arange(0, GROUP * BLOCK_V)
    m_counted = tl.load(p_codes + o_b * LENGTH, mask=m_b, other=-1) >= 0
    b_losses = tl.zeros((BLOCK_B,), tl.float32)
    b_radial = tl.zeros((BLOCK_B,), tl.float32)
    if PULLED:
        b_index, m_target, m_wrong = gathered_index(p_target_rows, i_start, o_b, m_b, target_count, HAS_TARGET_ROWS)
        m_target &= m_counted
        _, b_target_inverse, b_target_cosine = regression_cosine(
            p_rows, p_targets, b_index, o_b, m_b, m_target, WIDTH, BLOCK_D
        )
        b_losses += pull * regression_loss(b_target_cosine, m_target, m_wrong)
        if SAVE:
            b_pull = tl.where(m_target, pull * (b_target_cosine - 1.0), 0.0)
            b_radial += b_pull * b_target_cosine
            tl.store(p_pull + i_start + o_b, b_pull * b_target_inverse, mask=m_b)
    for i_token in range(0, LENGTH, GROUP):
        i_row = 0 if SHARED else i_token
        o_token = i_token + tl.arange(0, GROUP)
        m_token = o_token < LENGTH
        o_column_token = i_token + o_column // BLOCK_V
        o_center = o_column_token * VOCAB + o_column % BLOCK_V
        m_center = (o_column_token < LENGTH) & (o_column % BLOCK_V < VOCAB)

        b_row_inverse = block_inverse_norms(p_rows + i_row * WIDTH, o_b, m_b, TOKENS * WIDTH, WIDTH, OPERAND, BLOCK_D)
        b_center_inverse = block_inverse_norms(p_centers, o_center, m_center, WIDTH, WIDTH, OPERAND, BLOCK_D)
        b_product = tl.zeros((BLOCK_B, GROUP * BLOCK_V), tl.float32)
        for i_d in range(0, WIDTH, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = inside(o_d, WIDTH, BLOCK_D)
            b_row = load_block(p_rows + i_row * WIDTH, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(OPERAND)
            b_center = load_block(p_centers, o_center, m_center, o_d, m_d, WIDTH).to(OPERAND)
            b_product = dot(b_row, tl.trans(b_center), b_product, PRECISION)
        b_cosine = b_product * b_row_inverse[:, None] * b_center_inverse[None, :]
        b_cosine = tl.reshape(b_cosine, (BLOCK_B, GROUP, BLOCK_V))

        m_code = m_b[:, None] & m_token[None, :]
        b_code = tl.load(p_codes + o_b[:, None] * LENGTH + o_token[None, :], mask=m_code, other=-1)
        b_code = tl.minimum(tl.maximum(b_code, -2), VOCAB).to(tl.int32)
        if WEIGHED:
            b_weight = tl.load(p_weights + o_token, mask=m_token, other=0.0).to(tl.float32)
        else:
            b_weight = tl.where(m_token, 1.0 / LENGTH, 0.0)
        b_weight = tl.where(m_counted[:, None], b_weight[None, :], 0.0)  # (BLOCK_B, GROUP)
        m_wrong_code = (b_code == -2) | (b_code == VOCAB) | ((b_code >= 0) != m_counted[:, None])
        b_weight = tl.where(m_wrong_code & m_code, float("nan"), b_weight)
        m_own = o_v[None, None, :] == b_code[:, :, None]
        b_own = tl.sum(tl.where(m_own, b_cosine, 0.0), 2)
        b_value, b_slope = margin_value_and_slope(b_own, m1, m2, cos_m2, sin_m2, drop, MARGIN, STRAIGHT_THROUGH)
        b_logit = tl.where(m_v, tl.where(m_own, b_value[:, :, None], b_cosine) * scale, -float("inf"))
        b_max = tl.max(b_logit, 2)
        b_exp = tl.exp(b_logit - b_max[:, :, None])
        b_sum = tl.sum(b_exp, 2)
        b_losses += tl.sum((tl.log(b_sum) + (b_max - b_value * scale)) * b_weight, 1)

        if SAVE:
            b_slopes = b_exp / b_sum[:, :, None]  # softmax; then dloss/dcosine
            b_slopes = tl.where(m_own, (b_slopes - 1.0) * b_slope[:, :, None], b_slopes)
            b_slopes = b_slopes * (b_weight * scale)[:, :, None]
            o_slope = o_b[:, None, None] * (TOKENS * SLOPES) + o_v[None, None, :]
            o_slope += o_token[None, :, None] * (VOCAB if SHARED else SLOPES)
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


class Found(NamedTuple):
    """The results of the forward launches: the loss, and what a backward pass reads, empty where there is none."""

    loss: Tensor
    share: Tensor
    """See `reduced`."""
    slopes: Tensor
    """(B, T, `slopes_stride`)"""
    row_inverse: Tensor
    """(B, T)"""
    radial: Tensor
    """(B, T)"""
    center_inverse: Tensor
    """(l, v)"""
    pull: Tensor
    """(B,)"""


def forward(
    rows: Tensor,
    centers: Tensor,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    options: TokenMarginOptions,
    save: bool,
) -> Found:
    """Launch the forward kernel and the reduction; with ``save`` for a backward pass too."""
    found = memory(rows, centers, targets is not None, save)
    batch, tokens, _ = rows.shape
    constants = forward_constants(options.operand, tokens, *centers.shape, tf32_allowed(), architecture(rows.device))
    codes = codes.contiguous()
    token_weights, targets, target_rows = (
        x if x is None else x.contiguous() for x in (token_weights, targets, target_rows)
    )
    with torch.cuda.device_of(rows):
        token_margin_forward[(triton.cdiv(batch, constants["BLOCK_B"]),)](
            p_rows=rows.contiguous(),
            p_centers=centers.contiguous(),
            p_codes=codes,
            p_weights=token_weights,
            p_targets=targets,
            p_target_rows=target_rows,
            p_losses=found.loss,
            p_slopes=found.slopes,
            p_row_inverse=found.row_inverse,
            p_radial=found.radial,
            p_center_inverse=found.center_inverse,
            p_pull=found.pull,
            batch=batch,
            target_count=0 if targets is None else len(targets),
            pull=options.pull,
            scale=options.scale,
            WEIGHED=token_weights is not None,
            PULLED=targets is not None,
            HAS_TARGET_ROWS=target_rows is not None,
            SAVE=save,
            **margin_arguments(options.margin),
            **constants,
        )
    loss, share = reduced(found.loss, codes[:, 0], options.reduction)
    return found._replace(loss=loss, share=share)


def memory(rows: Tensor, centers: Tensor, pulled: bool, save: bool) -> Found:
    """Memory for what the forward kernel writes, the losses not reduced yet; empty, but for those, unless ``save``."""
    batch, tokens, _ = rows.shape
    length, vocab, _ = centers.shape

    def numbers(*shape: int, wanted: bool = save) -> Tensor:
        return torch.empty(shape if wanted else 0, dtype=torch.float32, device=rows.device)

    return Found(
        loss=numbers(batch, wanted=True),
        share=numbers(wanted=False),
        slopes=numbers(batch, tokens, slopes_stride(length * vocab // tokens)),
        row_inverse=numbers(batch, tokens),
        radial=numbers(batch, tokens),
        center_inverse=numbers(length, vocab),
        pull=numbers(batch, wanted=save and pulled),
    )


@functools.cache
def forward_constants(
    operand: torch.dtype, tokens: int, length: int, vocab: int, width: int, tf32: bool, architecture: str
) -> dict[str, Any]:
    """The constants that the kernel compiles with, but for the margin's and its switches."""
    limits = tile("token_margin_forward_wide" if vocab > WIDE_VOCAB else "token_margin_forward", operand, architecture)
    block_v = block_size(vocab, MAX_VOCAB)
    group = block_size(length, max(1, limits.columns // block_v), least=1) if tokens == 1 else 1
    columns = group * block_v
    return {
        "LENGTH": length,
        "VOCAB": vocab,
        "WIDTH": width,
        "SLOPES": slopes_stride(length * vocab // tokens),
        "SHARED": tokens == 1,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": float32_precision(tf32, architecture),
        "BLOCK_B": limits.rows_beside(columns),
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_V": block_v,
        "GROUP": group,
        **limits.launch(columns),
    }
