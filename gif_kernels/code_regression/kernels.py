"""Code regression in Triton: one pass over both inputs forward, one backward. Bytes and choices in README.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.primitives import block_size, empty_like_if, inside, inverse_norm, load_block
from gif_kernels.tuning import Configuration, architecture, tile


@triton.jit(do_not_specialize=["batch"])
def code_regression_forward(
    p_embeddings,  # (B, WIDTH)
    p_targets,  # (B, WIDTH)
    p_losses,  # (B,)
    p_saved,  # (B, 3): 1 / ||z||, 1 / ||h||, cosine
    batch,
    WIDTH: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK_B
    p_embeddings += i_start * WIDTH
    p_targets += i_start * WIDTH
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    b_zz = tl.zeros((BLOCK_B,), tl.float32)
    b_hh = tl.zeros((BLOCK_B,), tl.float32)
    b_zh = tl.zeros((BLOCK_B,), tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = inside(o_d, WIDTH, BLOCK_D)
        b_z = load_block(p_embeddings, o_b, m_b, o_d, m_d, WIDTH).to(tl.float32)
        b_h = load_block(p_targets, o_b, m_b, o_d, m_d, WIDTH).to(tl.float32)
        b_zz += tl.sum(b_z * b_z, 1)
        b_hh += tl.sum(b_h * b_h, 1)
        b_zh += tl.sum(b_z * b_h, 1)
    b_z_inverse = inverse_norm(b_zz)
    b_h_inverse = inverse_norm(b_hh)
    b_cosine = b_zh * b_z_inverse * b_h_inverse
    tl.store(p_losses + i_start + o_b, 0.5 * (b_cosine - 1.0) * (b_cosine - 1.0), mask=m_b)
    if SAVE:
        p_saved += i_start * 3 + o_b * 3
        tl.store(p_saved, b_z_inverse, mask=m_b)
        tl.store(p_saved + 1, b_h_inverse, mask=m_b)
        tl.store(p_saved + 2, b_cosine, mask=m_b)


@triton.jit(do_not_specialize=["batch", "loss_gradient_stride"])
def code_regression_backward(
    p_embeddings,  # (B, WIDTH)
    p_targets,  # (B, WIDTH)
    p_saved,  # (B, 3)
    p_loss_gradient,  # (B,), any stride: 0 where every row counts the same
    p_embeddings_gradient,  # (B, WIDTH)
    p_targets_gradient,  # (B, WIDTH)
    batch,
    loss_gradient_stride,
    WIDTH: tl.constexpr,
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
    p_saved += i_start * 3 + o_b * 3
    b_z_inverse = tl.load(p_saved, mask=m_b, other=0.0)
    b_h_inverse = tl.load(p_saved + 1, mask=m_b, other=0.0)
    b_cosine = tl.load(p_saved + 2, mask=m_b, other=0.0)
    p_loss_gradient += i_start * loss_gradient_stride
    b_slope = (b_cosine - 1.0) * tl.load(p_loss_gradient + o_b * loss_gradient_stride, mask=m_b, other=0.0)
    b_z = load_block(p_embeddings + i_start * WIDTH, o_b, m_b, o_d, m_d, WIDTH).to(tl.float32) * b_z_inverse[:, None]
    b_h = load_block(p_targets + i_start * WIDTH, o_b, m_b, o_d, m_d, WIDTH).to(tl.float32) * b_h_inverse[:, None]
    o_out = o_b[:, None] * WIDTH + o_d[None, :]
    m_out = m_b[:, None] & m_d[None, :]
    if NEED_EMBEDDINGS:
        b_gradient = (b_h - b_cosine[:, None] * b_z) * (b_slope * b_z_inverse)[:, None]
        tl.store(p_embeddings_gradient + i_start * WIDTH + o_out, b_gradient, mask=m_out)
    if NEED_TARGETS:
        b_gradient = (b_z - b_cosine[:, None] * b_h) * (b_slope * b_h_inverse)[:, None]
        tl.store(p_targets_gradient + i_start * WIDTH + o_out, b_gradient, mask=m_out)


def code_regression_rows(embeddings: Tensor, targets: Tensor) -> Tensor:
    """1/2 (zhat . hhat - 1)^2 of each row, (B,)."""
    losses: Tensor = _CodeRegression.apply(embeddings, targets)
    return losses


class _CodeRegression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, targets: Tensor) -> Tensor:
        save = any(ctx.needs_input_grad)
        compiling = torch.compiler.is_compiling()
        forward: Callable[..., Any] = torch.ops.gif_kernels.code_regression_forward if compiling else _forward
        losses, saved = forward(embeddings, targets, save)
        if save:
            ctx.save_for_backward(embeddings, targets, saved)
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        compiling = torch.compiler.is_compiling()
        backward: Callable[..., Any] = torch.ops.gif_kernels.code_regression_backward if compiling else _backward
        need_embeddings, need_targets = ctx.needs_input_grad
        gradients = backward(*ctx.saved_tensors, loss_gradient, need_embeddings, need_targets)
        return gradients[0] if need_embeddings else None, gradients[1] if need_targets else None


# ---- launches


@functools.cache
def _constants(width: int, architecture: str) -> dict[str, Any]:
    limits = tile("code_regression", torch.float32, architecture)
    return {
        "WIDTH": width,
        "BLOCK_B": limits.rows,
        "BLOCK_D": block_size(width, limits.width),
        "num_warps": limits.warps,
        "num_stages": limits.stages,
    }


def _forward_outputs(embeddings: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    batch, device = len(embeddings), embeddings.device
    losses = torch.empty(batch, dtype=torch.float32, device=device)
    return losses, torch.empty((batch if save else 0, 3), dtype=torch.float32, device=device)


def _forward(embeddings: Tensor, targets: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Losses (B,); then, empty unless ``save``: inverse norms of both and cosine, (B, 3)."""
    losses, saved = _forward_outputs(embeddings, save)
    batch, width = embeddings.shape
    constants = _constants(width, architecture(embeddings.device))
    with torch.cuda.device_of(embeddings):
        code_regression_forward[(triton.cdiv(batch, constants["BLOCK_B"]),)](
            embeddings.contiguous(), targets.contiguous(), losses, saved, batch, SAVE=save, **constants
        )
    return losses, saved


def _backward(
    embeddings: Tensor, targets: Tensor, saved: Tensor, loss_gradient: Tensor, need_embeddings: bool, need_targets: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of both (B, d), each in its dtype; empty if not needed."""
    embeddings_gradient = empty_like_if(need_embeddings, embeddings)
    targets_gradient = empty_like_if(need_targets, targets)
    batch, width = embeddings.shape
    constants = _constants(width, architecture(embeddings.device))
    grid = (triton.cdiv(batch, constants["BLOCK_B"]), triton.cdiv(width, constants["BLOCK_D"]))
    with torch.cuda.device_of(embeddings):
        code_regression_backward[grid](
            embeddings.contiguous(), targets.contiguous(), saved, loss_gradient, embeddings_gradient, targets_gradient,
            batch, loss_gradient.stride(0), NEED_EMBEDDINGS=need_embeddings, NEED_TARGETS=need_targets, **constants,
        )  # fmt: skip
    return embeddings_gradient, targets_gradient


_forward_op = torch.library.custom_op("gif_kernels::code_regression_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("gif_kernels::code_regression_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(embeddings: Tensor, targets: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    return _forward_outputs(embeddings, save)


@_backward_op.register_fake
def _(
    embeddings: Tensor, targets: Tensor, saved: Tensor, loss_gradient: Tensor, need_embeddings: bool, need_targets: bool
) -> tuple[Tensor, Tensor]:
    return empty_like_if(need_embeddings, embeddings), empty_like_if(need_targets, targets)


def shipped(architecture: str) -> Iterator[Configuration]:
    """What `gif_kernels.aot` compiles for ``architecture``: two dtypes, both gradients, three chunks of the width."""
    width, label = 768, "768 bfloat16 and float32"
    constants = _constants(width, architecture)
    inputs = {"p_embeddings": "*bf16", "p_targets": "*fp32", "p_saved": "*fp32", "batch": "i32"}
    yield Configuration(label, code_regression_forward, {**inputs, "p_losses": "*fp32"}, {**constants, "SAVE": True})
    gradients = {"p_loss_gradient": "*fp32", "p_embeddings_gradient": "*bf16", "p_targets_gradient": "*fp32"}
    yield Configuration(
        label,
        code_regression_backward,
        {**inputs, **gradients, "loss_gradient_stride": "i32"},
        {**constants, "NEED_EMBEDDINGS": True, "NEED_TARGETS": True},
    )
