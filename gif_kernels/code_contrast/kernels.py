"""Code contrast in Triton: library products, and between them a kernel for the softmax. Choices in README.md."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.code_contrast.options import CodeContrastOptions
from gif_kernels.device.margins import margin_arguments, margin_value_and_slope
from gif_kernels.device.primitives import block_size, empty_like_if
from gif_kernels.device.reduction import incoming_stride, reduced
from gif_kernels.device.rows import inverse_norms, row_gradients, warps
from gif_kernels.precision import gradient_dtype, product

AT_ONCE = 4096
"""Candidates that a program holds at once."""
MOST_WARPS = 16
"""Warps that hold so many candidates, 8 a thread: with 16 a thread sm_86 spills."""


@triton.jit
def code_contrast_softmax(
    p_products,  # (B, count) float32: embedding . vector
    p_row_inverse,  # (B,): 1 / norm
    p_vector_inverse,  # (count,): 1 / norm
    p_targets,  # (B,): the own row of vectors
    p_competes,  # (count,) bool, or None: all do
    p_weights,  # (B, count), may be p_products: dloss/dcosine / scale, over both norms
    p_losses,  # (B,)
    count,
    scale,
    m1,  # of psi, as the four that follow: see `margin_arguments`
    m2,
    cos_m2,
    sin_m2,
    drop,
    MASKED: tl.constexpr,
    SAVE: tl.constexpr,
    MARGIN: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row: the softmax over its candidates with the margin on the own one."""
    i = tl.program_id(0).to(tl.int64)
    p_products += i * count
    p_weights += i * count
    target = tl.load(p_targets + i)
    has_target = (target >= 0) & (target < count)
    row_inverse = tl.load(p_row_inverse + i)
    own = tl.load(p_products + target, mask=has_target, other=0.0)
    own *= row_inverse * tl.load(p_vector_inverse + target, mask=has_target, other=0.0)
    value, slope = margin_value_and_slope(own, m1, m2, cos_m2, sin_m2, drop, MARGIN, STRAIGHT_THROUGH)
    own_logit = value * scale
    largest = own_logit
    others = 0.0  # sum of exp(logit - largest) over the others
    o_n = tl.arange(0, BLOCK_N)
    for i_n in range(0, count, BLOCK_N):
        b_logit, _ = _other_logits(
            p_products=p_products + i_n,
            p_vector_inverse=p_vector_inverse + i_n,
            p_competes=p_competes + i_n if MASKED else p_competes,
            o_n=o_n,
            count=count - i_n,
            target=target - i_n,
            row_inverse=row_inverse,
            scale=scale,
            MASKED=MASKED,
        )
        b_largest = tl.maximum(largest, tl.max(b_logit, 0))
        others = others * tl.exp(largest - b_largest) + tl.sum(tl.exp(b_logit - b_largest), 0)
        largest = b_largest
    total = others + tl.exp(own_logit - largest)
    loss = tl.where(has_target, tl.log(total) + (largest - own_logit), 0.0)
    tl.store(p_losses + i, tl.where((target < -1) | (target >= count), float("nan"), loss))
    if SAVE:
        factor = tl.where(has_target, row_inverse / total, 0.0)
        own_weight = -others * slope * factor  # probability - 1, without a difference of near equals
        for i_n in range(0, count, BLOCK_N):
            b_logit, b_inverse = _other_logits(
                p_products=p_products + i_n,
                p_vector_inverse=p_vector_inverse + i_n,
                p_competes=p_competes + i_n if MASKED else p_competes,
                o_n=o_n,
                count=count - i_n,
                target=target - i_n,
                row_inverse=row_inverse,
                scale=scale,
                MASKED=MASKED,
            )
            b_weight = tl.exp(b_logit - largest) * factor
            b_weight = tl.where(o_n == target - i_n, own_weight, b_weight) * b_inverse
            tl.store(p_weights + i_n + o_n, b_weight, mask=o_n < count - i_n)


@triton.jit
def _other_logits(
    p_products, p_vector_inverse, p_competes, o_n, count, target, row_inverse, scale, MASKED: tl.constexpr
):
    """A block of logits, -inf for the own candidate and those that do not compete; and 1 / norm of their vectors."""
    m_n = o_n < count
    b_inverse = tl.load(p_vector_inverse + o_n, mask=m_n, other=0.0)
    b_logit = tl.load(p_products + o_n, mask=m_n, other=0.0) * b_inverse * (row_inverse * scale)
    m_other = m_n & (o_n != target)
    if MASKED:
        m_other &= tl.load(p_competes + o_n, mask=m_n, other=0).to(tl.int1)
    return tl.where(m_other, b_logit, -float("inf")), b_inverse


class Saved(NamedTuple):
    """The tensors that the backward pass reads."""

    embeddings: Tensor
    vectors: Tensor
    share: Tensor
    """See `reduced`."""
    weights: Tensor
    """dloss/dcosine over both norms and the scale, (B, C)"""
    row_inverse: Tensor
    """1 / ||z||, (B,)"""
    vector_inverse: Tensor
    """1 / ||h||, (C,)"""


def forward(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    options: CodeContrastOptions,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the last four of `Saved`, of which all but the share are empty unless ``save``."""
    operand = options.operand
    losses, weights = memory(embeddings, vectors, operand, save)
    targets = targets.contiguous()
    row_inverse, vector_inverse = inverse_norms(embeddings, operand), inverse_norms(vectors, operand)
    if len(embeddings):
        products = product(embeddings, vectors.T, operand)
        if save and weights.dtype == products.dtype:
            weights = products
        with torch.cuda.device_of(embeddings):
            code_contrast_softmax[(len(embeddings),)](
                p_products=products,
                p_row_inverse=row_inverse,
                p_vector_inverse=vector_inverse,
                p_targets=targets,
                p_competes=competes,
                p_weights=weights,
                p_losses=losses,
                count=len(vectors),
                scale=options.scale,
                MASKED=competes is not None,
                SAVE=save,
                **margin_arguments(options.margin),
                **softmax_constants(len(vectors)),
            )
    loss, share = reduced(losses, targets, options.reduction)
    if not save:
        row_inverse, vector_inverse = losses.new_empty(0), losses.new_empty(0)
    return loss, share, weights, row_inverse, vector_inverse


def memory(embeddings: Tensor, vectors: Tensor, operand: torch.dtype, save: bool) -> tuple[Tensor, Tensor]:
    """Memory for the losses (B,), and, empty unless ``save``, for the weights (B, C)."""
    batch, count = len(embeddings), len(vectors)
    losses = torch.empty(batch, dtype=torch.float32, device=embeddings.device)
    weights = torch.empty((batch, count) if save else (0, 0), dtype=gradient_dtype(operand), device=embeddings.device)
    return losses, weights


@functools.cache
def softmax_constants(count: int) -> dict[str, Any]:
    """The constants that `code_contrast_softmax` compiles with, but for the margin's, MASKED and SAVE."""
    block = block_size(count, AT_ONCE)
    return {"BLOCK_N": block, "num_warps": warps(block, MOST_WARPS)}


def backward(
    saved: Saved,
    incoming: Tensor,
    scale: float,
    operand: torch.dtype,
    *,
    need_embeddings: bool,
    need_vectors: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings (B, d) and of the vectors (C, d), each in its dtype; empty if not needed."""
    operand = gradient_dtype(operand)
    embeddings, vectors, weights, share = saved.embeddings, saved.vectors, saved.weights, saved.share
    of_embeddings, of_vectors = empty_like_if(False, embeddings), empty_like_if(False, vectors)
    if need_embeddings:
        numerators = product(weights, vectors, operand)
        of_embeddings = row_gradients(embeddings, saved.row_inverse, numerators, incoming, share, scale)
    if need_vectors:
        rows = embeddings
        if incoming_stride(incoming):  # the rows, which are summed here, count differently
            rows, incoming = embeddings * incoming.unsqueeze(1), incoming.new_ones(())
        numerators = product(weights.T, rows, operand)
        of_vectors = row_gradients(vectors, saved.vector_inverse, numerators, incoming, share, scale)
    return of_embeddings, of_vectors
