"""Code regression in Triton: one pass over both inputs forward, one backward. Bytes and choices in README.md."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.gathers import gathered_index, load_gathered
from gif_kernels.device.primitives import block_size, empty_like_if, inside, inverse_norm, load_block
from gif_kernels.device.reduction import incoming_stride, reduced, row_factor
from gif_kernels.device.tuning import architecture, tile


@triton.jit
def regression_cosine(
    p_rows,
    p_targets,
    b_index,
    o_b,
    m_b,
    m_target,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """1 / ||z||, 1 / ||h|| and zhat . hhat of a block of rows z and the rows ``b_index`` of a table of targets h."""
    b_zz = tl.zeros(o_b.shape, tl.float32)
    b_hh = tl.zeros(o_b.shape, tl.float32)
    b_zh = tl.zeros(o_b.shape, tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = inside(o_d, WIDTH, BLOCK_D)
        b_z = load_block(p_rows, o_b, m_b, o_d, m_d, WIDTH).to(tl.float32)
        b_h = load_gathered(p_targets, b_index, m_target, o_d, m_d, WIDTH).to(tl.float32)
        b_zz += tl.sum(b_z * b_z, 1)
        b_hh += tl.sum(b_h * b_h, 1)
        b_zh += tl.sum(b_z * b_h, 1)
    b_z_inverse = inverse_norm(b_zz)
    b_h_inverse = inverse_norm(b_hh)
    return b_z_inverse, b_h_inverse, b_zh * b_z_inverse * b_h_inverse


@triton.jit
def regression_loss(b_cosine, m_target, m_wrong):
    """1/2 (cosine - 1)^2; 0 without a target, NaN for a row of the table that does not exist."""
    b_loss = tl.where(m_target, 0.5 * (b_cosine - 1.0) * (b_cosine - 1.0), 0.0)
    return tl.where(m_wrong, float("nan"), b_loss)


@triton.jit(do_not_specialize=["batch", "target_count", "counted_stride"])
def code_regression_forward(
    p_embeddings,  # (B, WIDTH)
    p_targets,  # (target_count, WIDTH)
    p_target_rows,  # (B,), or None: row i is for row i
    p_counted,  # (B,), any stride: a row is ignored where this is < 0; None: none is
    p_losses,  # (B,)
    p_saved,  # (B, 3): 1 / ||z||, 1 / ||h||, cosine - 1; 0 where a row is ignored
    batch,
    target_count,
    counted_stride,
    WIDTH: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    b_index, m_target, m_wrong = gathered_index(p_target_rows, i_start, o_b, m_b, target_count, HAS_TARGET_ROWS)
    if HAS_COUNTED:
        m_target &= tl.load(p_counted + (i_start + o_b) * counted_stride, mask=m_b, other=-1) >= 0
    p_embeddings += i_start * WIDTH
    b_z_inverse, b_h_inverse, b_cosine = regression_cosine(
        p_embeddings, p_targets, b_index, o_b, m_b, m_target, WIDTH, BLOCK_D
    )
    tl.store(p_losses + i_start + o_b, regression_loss(b_cosine, m_target, m_wrong), mask=m_b)
    if SAVE:
        p_saved += i_start * 3 + o_b * 3
        tl.store(p_saved, b_z_inverse, mask=m_b)
        tl.store(p_saved + 1, b_h_inverse, mask=m_b)
        tl.store(p_saved + 2, tl.where(m_target, b_cosine - 1.0, 0.0), mask=m_b)


@triton.jit(do_not_specialize=["batch", "target_count", "incoming_stride"])
def code_regression_backward(
    p_embeddings,  # (B, WIDTH)
    p_targets,  # (target_count, WIDTH)
    p_target_rows,  # (B,) or None
    p_saved,  # (B, 3)
    p_incoming,  # (B,) or (): its stride is 0 where every row counts the same
    p_share,  # (): multiplies it, if MEAN
    p_embeddings_gradient,  # (B, WIDTH)
    p_targets_gradient,  # (B, WIDTH), without target rows alone
    batch,
    target_count,
    incoming_stride,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    NEED_EMBEDDINGS: tl.constexpr,
    NEED_TARGETS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    b_index, m_target, _ = gathered_index(p_target_rows, i_start, o_b, m_b, target_count, HAS_TARGET_ROWS)
    p_saved += i_start * 3 + o_b * 3
    b_z_inverse = tl.load(p_saved, mask=m_b, other=0.0)
    b_h_inverse = tl.load(p_saved + 1, mask=m_b, other=0.0)
    b_distance = tl.load(p_saved + 2, mask=m_b, other=0.0)
    b_cosine = b_distance + 1.0
    b_slope = b_distance * row_factor(p_incoming, incoming_stride, p_share, i_start, o_b, m_b, MEAN)
    b_z = load_block(p_embeddings + i_start * WIDTH, o_b, m_b, o_d, m_d, WIDTH).to(tl.float32) * b_z_inverse[:, None]
    b_h = load_gathered(p_targets, b_index, m_target, o_d, m_d, WIDTH).to(tl.float32) * b_h_inverse[:, None]
    o_out = o_b[:, None] * WIDTH + o_d[None, :]
    m_out = m_b[:, None] & m_d[None, :]
    if NEED_EMBEDDINGS:
        b_gradient = (b_h - b_cosine[:, None] * b_z) * (b_slope * b_z_inverse)[:, None]
        tl.store(p_embeddings_gradient + i_start * WIDTH + o_out, b_gradient, mask=m_out)
    if NEED_TARGETS:
        b_gradient = (b_z - b_cosine[:, None] * b_h) * (b_slope * b_h_inverse)[:, None]
        tl.store(p_targets_gradient + i_start * WIDTH + o_out, b_gradient, mask=m_out)


def forward(
    embeddings: Tensor,
    targets: Tensor,
    target_rows: Tensor | None,
    counted: Tensor | None,
    reduction: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and share of a row (see `reduced`); then, empty unless ``save``, the norms and the distance (B, 3)."""
    losses, norms_and_distance = memory(embeddings, save)
    batch, width = embeddings.shape
    constants = regression_constants(width, architecture(embeddings.device))
    target_rows = None if target_rows is None else target_rows.contiguous()
    with torch.cuda.device_of(embeddings):
        code_regression_forward[(triton.cdiv(batch, constants["BLOCK_B"]),)](
            p_embeddings=embeddings.contiguous(),
            p_targets=targets.contiguous(),
            p_target_rows=target_rows,
            p_counted=counted,
            p_losses=losses,
            p_saved=norms_and_distance,
            batch=batch,
            target_count=len(targets),
            counted_stride=0 if counted is None else counted.stride(0),
            HAS_TARGET_ROWS=target_rows is not None,
            HAS_COUNTED=counted is not None,
            SAVE=save,
            **constants,
        )
    return *reduced(losses, counted, reduction), norms_and_distance


def memory(embeddings: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Memory for the losses (B,), and, empty unless ``save``, for the norms and the distance (B, 3)."""
    batch, device = len(embeddings), embeddings.device
    losses = torch.empty(batch, dtype=torch.float32, device=device)
    return losses, torch.empty((batch if save else 0, 3), dtype=torch.float32, device=device)


def backward(
    embeddings: Tensor,
    targets: Tensor,
    target_rows: Tensor | None,
    share: Tensor,
    norms_and_distance: Tensor,
    incoming: Tensor,
    need_embeddings: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both (B, d), each in its dtype; empty if not needed."""
    embeddings_gradient = empty_like_if(need_embeddings, embeddings)
    targets_gradient = empty_like_if(need_targets, targets)
    batch, width = embeddings.shape
    constants = regression_constants(width, architecture(embeddings.device))
    grid = (triton.cdiv(batch, constants["BLOCK_B"]), triton.cdiv(width, constants["BLOCK_D"]))
    target_rows = None if target_rows is None else target_rows.contiguous()
    with torch.cuda.device_of(embeddings):
        code_regression_backward[grid](
            p_embeddings=embeddings.contiguous(),
            p_targets=targets.contiguous(),
            p_target_rows=target_rows,
            p_saved=norms_and_distance,
            p_incoming=incoming,
            p_share=share,
            p_embeddings_gradient=embeddings_gradient,
            p_targets_gradient=targets_gradient,
            batch=batch,
            target_count=len(targets),
            incoming_stride=incoming_stride(incoming),
            MEAN=share.ndim == 0,
            HAS_TARGET_ROWS=target_rows is not None,
            NEED_EMBEDDINGS=need_embeddings,
            NEED_TARGETS=need_targets,
            **constants,
        )
    return embeddings_gradient, targets_gradient


@functools.cache
def regression_constants(width: int, architecture: str) -> dict[str, Any]:
    """The constants that both kernels compile with, but for their switches."""
    limits = tile("code_regression", torch.float32, architecture)
    return {
        "WIDTH": width,
        "BLOCK_B": limits.rows,
        "BLOCK_D": block_size(width, limits.width),
        "num_warps": limits.warps,
        "num_stages": limits.stages,
    }
