"""The reduction in one launch of a loss a row to a mean or a sum, and the factor of each row in the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

REDUCED_AT_ONCE = 1024
"""Losses that the one program of the reduction holds at once."""


@triton.jit(do_not_specialize=["batch", "counted_stride"])
def reduce_losses(
    p_losses,  # (B,)
    p_counted,  # (B,), any stride: a row counts where this is >= 0; None: all count
    p_value,  # ()
    p_share,  # (): 1 / number of rows that count
    batch,
    counted_stride,
    HAS_COUNTED: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.arange(0, BLOCK)
    b_total = tl.zeros((BLOCK,), tl.float32)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for i in range(0, batch, BLOCK):
        m = o < batch - i
        b_total += tl.load(p_losses + o, mask=m, other=0.0)
        if MEAN:
            if HAS_COUNTED:
                m = tl.load(p_counted + o.to(tl.int64) * counted_stride, mask=m, other=-1) >= 0
                p_counted += BLOCK * counted_stride
            b_count += m.to(tl.int32)
        p_losses += BLOCK
    value = tl.sum(b_total, 0)
    if MEAN:
        share = 1.0 / tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32)
        tl.store(p_share, share)
        value = value * share
    tl.store(p_value, value)


def reduced(losses: Tensor, counted: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the share (), by which a mean multiplies each row's loss; empty for a sum or "none".

    Losses are added in a fixed order, in one launch; "none" launches nothing.
    """
    share = losses.new_empty(() if reduction == "mean" else 0)
    if reduction == "none":
        return losses, share
    value = losses.new_empty(())
    with torch.cuda.device_of(losses):
        reduce_losses[(1,)](
            p_losses=losses,
            p_counted=counted,
            p_value=value,
            p_share=share,
            batch=len(losses),
            counted_stride=0 if counted is None else counted.stride(0),
            HAS_COUNTED=counted is not None,
            MEAN=reduction == "mean",
            BLOCK=REDUCED_AT_ONCE,
        )
    return value, share


def reduced_like(losses: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that `reduced` returns, for a fake implementation."""
    share = losses.new_empty(() if reduction == "mean" else 0)
    return (losses if reduction == "none" else losses.new_empty(())), share


def incoming_stride(incoming: Tensor) -> int:
    """The stride between the gradients of two rows' losses: 0 where one gradient stands for all rows."""
    return incoming.stride(0) if incoming.ndim else 0


@triton.jit
def row_factor(p_incoming, incoming_stride, p_share, i_start, o_b, m_b, MEAN: tl.constexpr):
    """The factor dloss/d(loss of a row) of each row of a block."""
    b_factor = tl.load(p_incoming + (i_start + o_b) * incoming_stride, mask=m_b, other=0.0)
    if MEAN:
        b_factor = b_factor * tl.load(p_share)
    return b_factor
