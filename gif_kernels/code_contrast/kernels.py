"""Code contrast in Triton: tiles of logits, one softmax over all tiles of a row, gradients. Choices in README.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.cosine_kernels import (
    cosine_gradients,
    margin_numbers,
    margin_value_and_slope,
    matrix_units,
    reduced,
    reduced_like,
    shipped_backward,
)
from gif_kernels.margins import AngularMargin
from gif_kernels.primitives import (
    SIGNATURE,
    TRITON_DTYPE,
    block_size,
    empty_like_if,
    has_tf32,
    inside,
    inverse_norm,
    load_block,
    tf32_allowed,
)
from gif_kernels.reduction import Reduction
from gif_kernels.tuning import Configuration, architecture, tile


@triton.jit(do_not_specialize=["batch", "tiles"])
def code_contrast_tiles(
    p_embeddings,  # (B, WIDTH)
    p_vectors,  # (count, WIDTH)
    p_targets,  # (B,): the own row of vectors
    p_competes,  # (count,) bool, or None: all do
    p_logits,  # (B, count): scale times cosine; -inf for the own vector and for those that do not compete
    p_own,  # (B,): the own cosine
    p_tile_max,  # (B, tiles): of the tile's logits
    p_tile_sum,  # (B, tiles): of exp(logit - max)
    p_row_inverse,  # (B,): 1 / norm
    p_vector_inverse,  # (count,)
    batch,
    count,
    tiles,
    scale,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    SAVE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_b = tl.cdiv(batch, BLOCK_B)  # neighbours share a tile of vectors
    i_tile = tl.program_id(0) // blocks_b
    i_start = (tl.program_id(0) % blocks_b).to(tl.int64) * BLOCK_B
    i_column = i_tile.to(tl.int64) * BLOCK_N
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < count - i_column
    b_product = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    b_row_square = tl.zeros((BLOCK_B,), tl.float32)
    b_vector_square = tl.zeros((BLOCK_N,), tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = inside(o_d, WIDTH, BLOCK_D)
        b_row = load_block(p_embeddings + i_start * WIDTH, o_b, m_b, o_d, m_d, WIDTH).to(OPERAND)
        b_vector = load_block(p_vectors + i_column * WIDTH, o_n, m_n, o_d, m_d, WIDTH).to(OPERAND)
        b_product = tl.dot(b_row, tl.trans(b_vector), acc=b_product, input_precision=PRECISION)
        b_row_square += tl.sum(b_row.to(tl.float32) * b_row.to(tl.float32), 1)
        b_vector_square += tl.sum(b_vector.to(tl.float32) * b_vector.to(tl.float32), 1)
    b_row_inverse = inverse_norm(b_row_square)
    b_vector_inverse = inverse_norm(b_vector_square)
    b_cosine = b_product * b_row_inverse[:, None] * b_vector_inverse[None, :]

    b_target = tl.load(p_targets + i_start + o_b, mask=m_b, other=-1) - i_column
    m_own = o_n[None, :] == b_target[:, None]
    m_here = (b_target >= 0) & (b_target < tl.minimum(BLOCK_N, count - i_column))
    tl.store(p_own + i_start + o_b, tl.sum(tl.where(m_own, b_cosine, 0.0), 1), mask=m_here)
    m_other = m_n
    if MASKED:
        m_other &= tl.load(p_competes + i_column + o_n, mask=m_n, other=0).to(tl.int1)
    b_logit = tl.where(m_other[None, :] & ~m_own, b_cosine * scale, -float("inf"))
    b_max = tl.max(b_logit, 1)
    b_reference = tl.where(b_max == -float("inf"), 0.0, b_max)  # a tile where nothing competes adds exp(-inf)
    o_tile = (i_start + o_b) * tiles + i_tile
    tl.store(p_tile_max + o_tile, b_max, mask=m_b)
    tl.store(p_tile_sum + o_tile, tl.sum(tl.exp(b_logit - b_reference[:, None]), 1), mask=m_b)
    if SAVE:
        o_logit = o_b.to(tl.int64)[:, None] * count + o_n[None, :]
        tl.store(p_logits + i_start * count + i_column + o_logit, b_logit, mask=m_b[:, None] & m_n[None, :])
        if i_tile == 0:
            tl.store(p_row_inverse + i_start + o_b, b_row_inverse, mask=m_b)
        if i_start == 0:
            tl.store(p_vector_inverse + i_column + o_n, b_vector_inverse, mask=m_n)


@triton.jit(do_not_specialize=["batch", "tiles"])
def code_contrast_rows(
    p_logits,  # (B, count): becomes dloss/dcosine
    p_own,  # (B,)
    p_tile_max,  # (B, tiles)
    p_tile_sum,  # (B, tiles)
    p_targets,  # (B,)
    p_losses,  # (B,)
    p_radial,  # (B,): zhat . dloss/dzhat
    batch,
    count,
    tiles,
    scale,
    margin_first,
    margin_second,
    margin_third,
    SAVE: tl.constexpr,
    BEND: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK_B
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    b_target = tl.load(p_targets + i_start + o_b, mask=m_b, other=-1)
    m_target = (b_target >= 0) & (b_target < count)
    b_own = tl.load(p_own + i_start + o_b, mask=m_target, other=0.0)
    b_value, b_slope = margin_value_and_slope(b_own, margin_first, margin_second, margin_third, BEND, STRAIGHT_THROUGH)
    b_own_logit = b_value * scale
    b_weight = tl.where(m_target, 1.0, 0.0)
    b_weight = tl.where((b_target < -1) | (b_target >= count), float("nan"), b_weight)

    o_t = tl.arange(0, BLOCK_T)
    o_tile = (i_start + o_b)[:, None] * tiles + o_t[None, :]
    b_maxima = tl.full((BLOCK_B, BLOCK_T), -float("inf"), tl.float32)
    for i_t in range(0, tiles, BLOCK_T):
        m_tile = m_b[:, None] & (o_t < tiles - i_t)[None, :]
        b_maxima = tl.maximum(b_maxima, tl.load(p_tile_max + o_tile + i_t, mask=m_tile, other=-float("inf")))
    b_max = tl.maximum(tl.max(b_maxima, 1), b_own_logit)
    b_sums = tl.zeros((BLOCK_B, BLOCK_T), tl.float32)
    for i_t in range(0, tiles, BLOCK_T):
        m_tile = m_b[:, None] & (o_t < tiles - i_t)[None, :]
        b_tile_max = tl.load(p_tile_max + o_tile + i_t, mask=m_tile, other=-float("inf"))
        b_sums += tl.load(p_tile_sum + o_tile + i_t, mask=m_tile, other=0.0) * tl.exp(b_tile_max - b_max[:, None])
    b_others = tl.sum(b_sums, 1)
    b_own_exp = tl.exp(b_own_logit - b_max)
    b_sum = b_others + b_own_exp
    tl.store(p_losses + i_start + o_b, (tl.log(b_sum) + (b_max - b_own_logit)) * b_weight, mask=m_b)

    if SAVE:
        b_factor = b_weight * scale / b_sum
        b_own_slope = -b_others * b_slope * b_factor  # probability - 1, without a difference of near equals
        b_radials = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        o_n = tl.arange(0, BLOCK_N)
        p_block = p_logits + i_start * count + o_b.to(tl.int64)[:, None] * count + o_n[None, :]
        for i_n in range(0, count, BLOCK_N):
            m = m_b[:, None] & (o_n < count - i_n)[None, :]
            b_logit = tl.load(p_block, mask=m, other=-float("inf"))
            b_slopes = tl.exp(b_logit - b_max[:, None]) * b_factor[:, None]
            b_radials += b_slopes * tl.where(b_logit == -float("inf"), 0.0, b_logit)
            m_own = o_n[None, :] == (b_target - i_n)[:, None]
            tl.store(p_block, tl.where(m_own, b_own_slope[:, None], b_slopes), mask=m)
            p_block += BLOCK_N
        tl.store(p_radial + i_start + o_b, tl.sum(b_radials, 1) / scale + b_own_slope * b_own, mask=m_b)


def code_contrast(embeddings: Tensor, vectors: Tensor, *rest: Any) -> Tensor:
    """The reduced loss; arguments as of the specification."""
    loss: Tensor = _CodeContrast.apply(embeddings, vectors, *rest)
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
            ctx.operand = operand
            ctx.save_for_backward(embeddings, vectors, *saved)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        backward: Callable[..., Any] = torch.ops.gif_kernels.code_contrast_backward if compiling else _backward
        need_embeddings, need_vectors = ctx.needs_input_grad[:2]
        gradients = backward(*ctx.saved_tensors, incoming, ctx.operand, need_embeddings, need_vectors)
        return gradients[0] if need_embeddings else None, gradients[1] if need_vectors else None, *(None,) * 6


# ---- launches


@functools.cache
def _tile_constants(operand: torch.dtype, width: int, tf32: bool, architecture: str) -> dict[str, Any]:
    """What `code_contrast_tiles` compiles with, but for MASKED and SAVE."""
    limits = tile("code_contrast_tiles", operand, architecture)
    return {
        "WIDTH": width,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": "tf32" if tf32 and has_tf32(architecture) else "ieee",
        "BLOCK_B": limits.rows,
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_N": limits.columns,
        **limits.launch(limits.columns),
    }


def _row_constants(bend: str, straight_through: bool, architecture: str) -> dict[str, Any]:
    """What `code_contrast_rows` compiles with, but for SAVE."""
    limits = tile("code_contrast_rows", torch.float32, architecture)
    return {
        "BEND": bend,
        "STRAIGHT_THROUGH": straight_through,
        "BLOCK_B": limits.rows,
        "BLOCK_N": limits.columns,
        "BLOCK_T": limits.width,
        "num_warps": limits.warps,
        "num_stages": limits.stages,
    }


def _forward_outputs(embeddings: Tensor, vectors: Tensor, save: bool) -> tuple[Tensor, ...]:
    batch, count = len(embeddings), len(vectors)
    sizes = [(batch,), (batch, count), (batch,), (batch,), (count,)]
    return tuple(
        torch.empty(size if save or i == 0 else 0, dtype=torch.float32, device=embeddings.device)
        for i, size in enumerate(sizes)
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and share of a row (see `reduced`), and what `_backward` takes: slopes (B, C), inverse norms and radial
    parts of the rows (B,), inverse norms of the vectors (C,); empty unless ``save``."""
    losses, slopes, row_inverse, radial, vector_inverse = _forward_outputs(embeddings, vectors, save)
    (batch, width), count = embeddings.shape, len(vectors)
    target = architecture(embeddings.device)
    constants = _tile_constants(operand, width, tf32_allowed(), target)
    tiles = triton.cdiv(count, constants["BLOCK_N"])
    own = torch.empty_like(losses)
    tile_max, tile_sum = losses.new_empty(2, batch, tiles)
    row_constants = _row_constants(bend, straight_through, target)
    targets = targets.contiguous()
    with torch.cuda.device_of(embeddings):
        code_contrast_tiles[(triton.cdiv(batch, constants["BLOCK_B"]) * tiles,)](
            embeddings.contiguous(), vectors.contiguous(), targets, competes, slopes, own, tile_max, tile_sum,
            row_inverse, vector_inverse, batch, count, tiles, scale,
            MASKED=competes is not None, SAVE=save, **constants,
        )  # fmt: skip
        code_contrast_rows[(triton.cdiv(batch, row_constants["BLOCK_B"]),)](
            slopes, own, tile_max, tile_sum, targets, losses, radial, batch, count, tiles, scale,
            margin_first, margin_second, margin_third, SAVE=save, **row_constants,
        )  # fmt: skip
    return *reduced(losses, targets, reduction), slopes, row_inverse, radial, vector_inverse


def _backward(
    embeddings: Tensor,
    vectors: Tensor,
    share: Tensor,
    slopes: Tensor,
    row_inverse: Tensor,
    radial: Tensor,
    vector_inverse: Tensor,
    incoming: Tensor,
    operand: torch.dtype,
    need_embeddings: bool,
    need_vectors: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the embeddings (B, d) and of the vectors (C, d), each in its dtype; empty if not needed."""
    of_rows, of_vectors = cosine_gradients(
        embeddings.unsqueeze(1), vectors.unsqueeze(0), slopes, row_inverse, radial, vector_inverse, incoming, share,
        None, operand, need_embeddings, need_vectors,
    )  # fmt: skip
    return of_rows.flatten(0, 1), of_vectors.flatten(0, 1)


_forward_op = torch.library.custom_op("gif_kernels::code_contrast_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("gif_kernels::code_contrast_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(embeddings: Tensor, vectors: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    reduction, _, save = rest[-3:]
    losses, *saved = _forward_outputs(embeddings, vectors, save)
    return *reduced_like(losses, reduction), *saved


@_backward_op.register_fake
def _(embeddings: Tensor, vectors: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_embeddings, need_vectors = rest[-2:]
    return (
        empty_like_if(need_embeddings, embeddings.unsqueeze(1)).flatten(0, 1),
        empty_like_if(need_vectors, vectors.unsqueeze(0)).flatten(0, 1),
    )


# ---- ahead of time


def shipped(architecture: str) -> Iterator[Configuration]:
    """What `gif_kernels.aot` compiles for ``architecture``: usual dtypes and widths, the margins at both ends."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    candidates = 3072
    for embeddings, vectors, operand, width in (
        (bf16, fp32, bf16, 512),
        (bf16, bf16, bf16, 400),
        (fp16, fp32, fp16, 768),
        (fp32, fp32, fp32, 512),
    ):
        dtypes = dict.fromkeys(str(x).removeprefix("torch.") for x in (embeddings, vectors, operand))
        label = f"{candidates} x {width} {' and '.join(dtypes)}"
        constants = _tile_constants(operand, width, False, architecture)
        floats = ["p_logits", "p_own", "p_tile_max", "p_tile_sum", "p_row_inverse", "p_vector_inverse"]
        signature = {
            "p_embeddings": SIGNATURE[embeddings],
            "p_vectors": SIGNATURE[vectors],
            "p_targets": "*i64",
            "p_competes": "*i1",
            **dict.fromkeys(floats, "*fp32"),
            **dict.fromkeys(["batch", "count", "tiles"], "i32"),
            "scale": "fp32",
        }
        yield Configuration(
            label, code_contrast_tiles, signature, {**constants, "MASKED": True, "SAVE": True}, matrix_units(constants)
        )
        if width == 512:  # the others are compiled for the token-margin loss: columns are no constant
            yield shipped_backward(architecture, label, embeddings, vectors, operand, 1, candidates, width)
    for bend in ("none", "angle"):
        pointers = ["p_logits", "p_own", "p_tile_max", "p_tile_sum", "p_losses", "p_radial"]
        numbers = ["scale", "margin_first", "margin_second", "margin_third"]
        signature = {
            "p_targets": "*i64",
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(["batch", "count", "tiles"], "i32"),
            **dict.fromkeys(numbers, "fp32"),
        }
        constants = _row_constants(bend, False, architecture)
        yield Configuration(bend, code_contrast_rows, signature, {**constants, "SAVE": True})
