"""Code contrast in Triton: library products, and between them a kernel for the softmax. Choices in README.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.cosine_kernels import incoming_stride, margin_numbers, margin_value_and_slope, reduced, reduced_like
from gif_kernels.dispatch import full_precision
from gif_kernels.margins import AngularMargin
from gif_kernels.precision import gradient_dtype, product
from gif_kernels.primitives import SIGNATURE, block_size, empty_like_if
from gif_kernels.reduction import Reduction
from gif_kernels.row_kernels import ONE_WARP, inverse_norms, row_gradients, shipped_row_kernels
from gif_kernels.tuning import Configuration

AT_ONCE = 4096
"""Candidates that a program holds at once."""
MOST_WARPS = 16
"""That hold them, 8 a thread: with 16 a thread sm_86 spills."""


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
    margin_first,
    margin_second,
    margin_third,
    MASKED: tl.constexpr,
    SAVE: tl.constexpr,
    BEND: tl.constexpr,
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
    value, slope = margin_value_and_slope(own, margin_first, margin_second, margin_third, BEND, STRAIGHT_THROUGH)
    own_logit = value * scale
    largest = own_logit
    others = 0.0  # sum of exp(logit - largest) over the others
    o_n = tl.arange(0, BLOCK_N)
    for i_n in range(0, count, BLOCK_N):
        b_logit, _ = _other_logits(
            p_products + i_n, p_vector_inverse + i_n, p_competes + i_n if MASKED else p_competes, o_n, count - i_n,
            target - i_n, row_inverse, scale, MASKED,
        )  # fmt: skip
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
                p_products + i_n, p_vector_inverse + i_n, p_competes + i_n if MASKED else p_competes, o_n,
                count - i_n, target - i_n, row_inverse, scale, MASKED,
            )  # fmt: skip
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


def code_contrast(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    margin: AngularMargin,
    scale: float,
    reduction: Reduction,
    operand: torch.dtype,
) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _CodeContrast.apply(embeddings, vectors, targets, competes, margin, scale, reduction, operand)
    return loss


class _CodeContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        vectors: Tensor,
        targets: Tensor,
        competes: Tensor | None,
        margin: AngularMargin,
        scale: float,
        reduction: Reduction,
        operand: torch.dtype,
    ) -> Tensor:
        save = any(ctx.needs_input_grad)
        compiling = torch.compiler.is_compiling()
        forward: Callable[..., Any] = torch.ops.gif_kernels.code_contrast_forward if compiling else _forward
        loss, *saved = forward(
            embeddings, vectors, targets, competes, *margin_numbers(margin), scale, reduction, operand, save
        )
        if save:
            ctx.scale, ctx.operand = scale, operand
            ctx.save_for_backward(embeddings, vectors, *saved)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        backward: Callable[..., Any] = torch.ops.gif_kernels.code_contrast_backward if compiling else _backward
        need_embeddings, need_vectors = ctx.needs_input_grad[:2]
        with full_precision(incoming.device):
            of_embeddings, of_vectors = backward(
                *ctx.saved_tensors, incoming, ctx.scale, ctx.operand, need_embeddings, need_vectors
            )
        return of_embeddings if need_embeddings else None, of_vectors if need_vectors else None, *(None,) * 6


# ---- launches


@functools.cache
def _softmax_constants(count: int, bend: str, straight_through: bool) -> dict[str, Any]:
    """What `code_contrast_softmax` compiles with, but for MASKED and SAVE."""
    block = block_size(count, AT_ONCE)
    warps = max(1, min(MOST_WARPS, block // ONE_WARP))
    return {"BEND": bend, "STRAIGHT_THROUGH": straight_through, "BLOCK_N": block, "num_warps": warps}


def _forward_outputs(embeddings: Tensor, vectors: Tensor, operand: torch.dtype, save: bool) -> tuple[Tensor, Tensor]:
    """Memory for the losses (B,), and, empty unless ``save``, for the weights (B, C)."""
    batch, count = len(embeddings), len(vectors)
    losses = torch.empty(batch, dtype=torch.float32, device=embeddings.device)
    weights = torch.empty((batch, count) if save else (0, 0), dtype=gradient_dtype(operand), device=embeddings.device)
    return losses, weights


def _forward(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    bend: str,
    straight_through: bool,
    margin_first: float,
    margin_second: float,
    margin_third: float,
    scale: float,
    reduction: str,
    operand: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and share of a row (see `reduced`), and what `_backward` takes: dloss/dcosine over both norms and the scale
    (B, C), 1 / norm of the rows (B,) and of the vectors (C,); empty unless ``save``."""
    losses, weights = _forward_outputs(embeddings, vectors, operand, save)
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
                scale=scale,
                margin_first=margin_first,
                margin_second=margin_second,
                margin_third=margin_third,
                MASKED=competes is not None,
                SAVE=save,
                **_softmax_constants(len(vectors), bend, straight_through),
            )
    kept = (row_inverse, vector_inverse) if save else (losses.new_empty(0), losses.new_empty(0))
    return *reduced(losses, targets, reduction), weights, *kept


def _backward(
    embeddings: Tensor,
    vectors: Tensor,
    share: Tensor,
    weights: Tensor,
    row_inverse: Tensor,
    vector_inverse: Tensor,
    incoming: Tensor,
    scale: float,
    operand: torch.dtype,
    need_embeddings: bool,
    need_vectors: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings (B, d) and of the vectors (C, d), each in its dtype; empty if not needed."""
    operand = gradient_dtype(operand)
    of_embeddings, of_vectors = empty_like_if(False, embeddings), empty_like_if(False, vectors)
    if need_embeddings:
        numerators = product(weights, vectors, operand)
        of_embeddings = row_gradients(embeddings, row_inverse, numerators, incoming, share, scale)
    if need_vectors:
        rows = embeddings
        if incoming_stride(incoming):  # the rows, which are summed here, count differently
            rows, incoming = embeddings * incoming.unsqueeze(1), incoming.new_ones(())
        numerators = product(weights.T, rows, operand)
        of_vectors = row_gradients(vectors, vector_inverse, numerators, incoming, share, scale)
    return of_embeddings, of_vectors


_forward_op = torch.library.custom_op("gif_kernels::code_contrast_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("gif_kernels::code_contrast_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(
    embeddings: Tensor,
    vectors: Tensor,
    targets: Tensor,
    competes: Tensor | None,
    bend: str,
    straight_through: bool,
    margin_first: float,
    margin_second: float,
    margin_third: float,
    scale: float,
    reduction: str,
    operand: torch.dtype,
    save: bool,
) -> tuple[Tensor, ...]:
    losses, weights = _forward_outputs(embeddings, vectors, operand, save)
    batch, count = (len(embeddings), len(vectors)) if save else (0, 0)
    return *reduced_like(losses, reduction), weights, losses.new_empty(batch), losses.new_empty(count)


@_backward_op.register_fake
def _(
    embeddings: Tensor,
    vectors: Tensor,
    share: Tensor,
    weights: Tensor,
    row_inverse: Tensor,
    vector_inverse: Tensor,
    incoming: Tensor,
    scale: float,
    operand: torch.dtype,
    need_embeddings: bool,
    need_vectors: bool,
) -> tuple[Tensor, Tensor]:
    return empty_like_if(need_embeddings, embeddings), empty_like_if(need_vectors, vectors)


# ---- ahead of time


def shipped(architecture: str) -> Iterator[Configuration]:
    """What `gif_kernels.aot` compiles for ``architecture``: both dtypes of the weights, the margins at both ends."""
    for dtype, bend, count in ((torch.bfloat16, "none", 3072), (torch.float32, "angle", 100_000)):
        signature = {
            **dict.fromkeys(["p_products", "p_row_inverse", "p_vector_inverse", "p_losses"], "*fp32"),
            "p_targets": "*i64",
            "p_competes": "*i1",
            "p_weights": SIGNATURE[dtype],
            "count": "i32",
            **dict.fromkeys(["scale", "margin_first", "margin_second", "margin_third"], "fp32"),
        }
        constants = _softmax_constants(count, bend, False)
        label = f"{count} {str(dtype).removeprefix('torch.')}, {bend}"
        yield Configuration(label, code_contrast_softmax, signature, {**constants, "MASKED": True, "SAVE": True})
    yield from shipped_row_kernels()
