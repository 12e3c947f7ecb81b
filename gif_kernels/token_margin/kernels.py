"""Token-margin loss in Triton: three launches forward and backward, and one for a mean. Choices in README.md.

Without projections all tokens of a sample compare one row, z; with projections each token has its own, u_j = P_j z.
Both are rows (B, T, d'), T = 1 or l. Norms, margins, logits and sums are float32 whatever the operands are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.autograd import differentiable_once
from gif_kernels.code_regression.kernels import code_regression, regression_cosine, regression_loss
from gif_kernels.cosine_kernels import (
    Pulled,
    cosine_gradients,
    gathered_index,
    margin_numbers,
    margin_value_and_slope,
    matrix_units,
    reduced,
    reduced_like,
    shipped_backward,
    shipped_shared,
    slopes_stride,
)
from gif_kernels.dispatch import full_precision
from gif_kernels.margins import AngularMargin
from gif_kernels.primitives import (
    SIGNATURE,
    TRITON_DTYPE,
    block_size,
    empty_like_if,
    float32_precision,
    inside,
    inverse_norm,
    load_block,
    tf32_allowed,
)
from gif_kernels.reduction import Reduction
from gif_kernels.tuning import MAX_VOCAB, WIDE_VOCAB, Configuration, architecture, tile


@triton.jit
def block_inverse_norms(
    p, o_row, m_row, STRIDE: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr, BLOCK_D: tl.constexpr
):
    """1 / norm of a block of rows rounded to OPERAND: a loop of its own, for what row_kernels.py says of products."""
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
    margin_first,
    margin_second,
    margin_third,
    LENGTH: tl.constexpr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOPES: tl.constexpr,
    SHARED: tl.constexpr,
    WEIGHED: tl.constexpr,
    PULLED: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
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
            b_product = tl.dot(b_row, tl.trans(b_center), acc=b_product, input_precision=PRECISION)
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
        b_value, b_slope = margin_value_and_slope(
            b_own, margin_first, margin_second, margin_third, BEND, STRAIGHT_THROUGH
        )
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


def token_margin(
    embeddings: Tensor,
    centers: Tensor,
    projections: Tensor | None,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    pull: float,
    margin: AngularMargin,
    scale: float,
    reduction: Reduction,
    operand: torch.dtype,
) -> Tensor:
    """The reduced loss; arguments as of the specification. At most MAX_VOCAB centres a token.

    With projections the kernels never see z, so the pull has its own two launches beside the products.
    """
    loss: Tensor
    if targets is None or projections is None:
        loss = _TokenMargin.apply(
            embeddings, centers, projections, codes, token_weights, targets, target_rows, pull, margin, scale,
            reduction, operand,
        )  # fmt: skip
        return loss
    loss = _TokenMargin.apply(
        embeddings, centers, projections, codes, token_weights, None, None, 0.0, margin, scale, reduction, operand
    )
    return loss + pull * code_regression(embeddings, targets, target_rows, reduction, codes[:, 0])


class _TokenMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        projections: Tensor | None,
        codes: Tensor,
        token_weights: Tensor | None,
        targets: Tensor | None,
        target_rows: Tensor | None,
        pull: float,
        margin: AngularMargin,
        scale: float,
        reduction: Reduction,
        operand: torch.dtype,
    ) -> Tensor:
        rows = embeddings.unsqueeze(1) if projections is None else _project(embeddings, projections, operand)
        save = any(ctx.needs_input_grad)
        compiling = torch.compiler.is_compiling()
        forward: Callable[..., Any] = torch.ops.gif_kernels.token_margin_forward if compiling else _forward
        loss, *saved = forward(
            rows, centers, codes, token_weights, targets, target_rows, pull, *margin_numbers(margin), scale,
            reduction, operand, save,
        )  # fmt: skip
        if save:
            ctx.operand = operand
            ctx.save_for_backward(embeddings, projections, rows, centers, targets, target_rows, *saved)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, projections, *saved = ctx.saved_tensors
        need_embeddings, need_centers, need_projections = ctx.needs_input_grad[:3]
        compiling = torch.compiler.is_compiling()
        backward: Callable[..., Any] = torch.ops.gif_kernels.token_margin_backward if compiling else _backward
        need_rows = need_embeddings or need_projections
        row_gradient, centers_gradient = backward(*saved, incoming, ctx.operand, need_rows, need_centers)
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
            *(None,) * 9,
        )


def _project(embeddings: Tensor, projections: Tensor, operand: torch.dtype) -> Tensor:
    """u_j = P_j z, (B, l, d'), in one product; its direction does not depend on the norm of z."""
    length, inner, _ = projections.shape
    return (embeddings.to(operand) @ _flatten(projections, operand).T).view(-1, length, inner)


def _flatten(projections: Tensor, dtype: torch.dtype) -> Tensor:
    return projections.to(dtype).reshape(-1, projections.shape[-1])  # (l d', d)


# ---- launches


@functools.cache
def _forward_constants(
    operand: torch.dtype,
    tokens: int,
    length: int,
    vocab: int,
    width: int,
    bend: str,
    straight_through: bool,
    tf32: bool,
    architecture: str,
) -> dict[str, Any]:
    """What the kernel compiles with, but for WEIGHED, PULLED, HAS_TARGET_ROWS and SAVE."""
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
        "BEND": bend,
        "STRAIGHT_THROUGH": straight_through,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": float32_precision(tf32, architecture),
        "BLOCK_B": limits.rows_beside(columns),
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_V": block_v,
        "GROUP": group,
        **limits.launch(columns),
    }


def _forward_outputs(rows: Tensor, centers: Tensor, pulled: bool, save: bool) -> tuple[Tensor, ...]:
    batch, tokens, _ = rows.shape
    length, vocab, _ = centers.shape
    slopes = (batch, tokens, slopes_stride(length * vocab // tokens))
    sizes = [(batch,), slopes, (batch, tokens), (batch, tokens), (length, vocab)]
    sizes.append((batch if pulled else 0,))
    return tuple(
        torch.empty(size if save or i == 0 else 0, dtype=torch.float32, device=rows.device)
        for i, size in enumerate(sizes)
    )


def _forward(
    rows: Tensor,
    centers: Tensor,
    codes: Tensor,
    token_weights: Tensor | None,
    targets: Tensor | None,
    target_rows: Tensor | None,
    pull: float,
    bend: str,
    straight_through: bool,
    margin_first: float,
    margin_second: float,
    margin_third: float,
    scale: float,
    reduction: str,
    operand: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss and share of a row (see `reduced`), and what `_backward` takes: slopes (B, T, stride), row inverse norms
    and radial parts (B, T), center inverse norms (l, v), pull (B,); empty unless ``save``."""
    losses, *saved = _forward_outputs(rows, centers, targets is not None, save)
    batch, tokens, _ = rows.shape
    constants = _forward_constants(
        operand, tokens, *centers.shape, bend, straight_through, tf32_allowed(), architecture(rows.device)
    )
    codes = codes.contiguous()
    token_weights, targets, target_rows = (
        x if x is None else x.contiguous() for x in (token_weights, targets, target_rows)
    )
    with torch.cuda.device_of(losses):
        token_margin_forward[(triton.cdiv(batch, constants["BLOCK_B"]),)](
            rows.contiguous(), centers.contiguous(), codes, token_weights, targets, target_rows, losses, *saved,
            batch, 0 if targets is None else len(targets), pull, scale, margin_first, margin_second, margin_third,
            WEIGHED=token_weights is not None, PULLED=targets is not None, HAS_TARGET_ROWS=target_rows is not None,
            SAVE=save, **constants,
        )  # fmt: skip
    return *reduced(losses, codes[:, 0], reduction), *saved  # type: ignore[return-value]


def _backward(
    rows: Tensor,
    centers: Tensor,
    targets: Tensor | None,
    target_rows: Tensor | None,
    share: Tensor,
    slopes: Tensor,
    row_inverse: Tensor,
    radial: Tensor,
    center_inverse: Tensor,
    pull: Tensor,
    incoming: Tensor,
    operand: torch.dtype,
    need_rows: bool,
    need_centers: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (B, T, d') and of the centres (l, v, d'), each in its dtype; empty if not needed."""
    pulled = None
    if targets is not None:
        pulled = Pulled(pull, targets.contiguous(), None if target_rows is None else target_rows.contiguous())
    return cosine_gradients(
        rows, centers, slopes, row_inverse, radial, center_inverse, incoming, share, pulled, operand, need_rows,
        need_centers,
    )  # fmt: skip


_forward_op = torch.library.custom_op("gif_kernels::token_margin_forward", _forward, mutates_args=())
_backward_op = torch.library.custom_op("gif_kernels::token_margin_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(
    rows: Tensor, centers: Tensor, codes: Tensor, token_weights: Tensor | None, targets: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    reduction, _, save = rest[-3:]
    losses, *saved = _forward_outputs(rows, centers, targets is not None, save)
    return *reduced_like(losses, reduction), *saved


@_backward_op.register_fake
def _(rows: Tensor, centers: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_rows, need_centers = rest[-2:]
    return empty_like_if(need_rows, rows), empty_like_if(need_centers, centers)


# ---- ahead of time


@dataclass(frozen=True)
class _Sizes:
    """Dtypes and sizes to compile for; ``projected`` gives each token a row of its own."""

    rows: torch.dtype
    centers: torch.dtype
    operand: torch.dtype
    length: int
    vocab: int
    width: int
    projected: bool = False
    pulled: bool = False

    @property
    def tokens(self) -> int:
        return self.length if self.projected else 1

    def __str__(self) -> str:
        dtypes = dict.fromkeys(str(x).removeprefix("torch.") for x in (self.rows, self.centers, self.operand))
        notes = [name for name in ("projected", "pulled") if getattr(self, name)]
        return ", ".join([f"{self.length} x {self.vocab} x {self.width} {' and '.join(dtypes)}", *notes])


def shipped(architecture: str) -> Iterator[Configuration]:
    """What `gif_kernels.aot` compiles for ``architecture``: usual sizes, and the largest and oddest of each kind."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual = _Sizes(bf16, bf16, bf16, 5, 20, 512)
    projected = _Sizes(bf16, bf16, bf16, 5, 20, 512, projected=True)
    autocast = _Sizes(bf16, fp32, bf16, 5, 20, 512, pulled=True)
    mixed = _Sizes(bf16, fp32, fp32, 5, 20, 512)
    exact = _Sizes(fp32, fp32, fp32, 5, 20, 512)
    yield _shipped_forward(architecture, usual)
    yield _shipped_forward(architecture, projected)
    yield _shipped_forward(architecture, autocast)
    yield _shipped_forward(architecture, _Sizes(fp16, fp16, fp16, 7, 16, 768), bend="angle")
    yield _shipped_forward(architecture, _Sizes(bf16, bf16, bf16, 4, MAX_VOCAB, 400))
    yield _shipped_forward(architecture, mixed)
    yield _shipped_forward(architecture, exact, tf32=True)
    yield _shipped_forward(architecture, _Sizes(fp32, fp32, fp32, 4, MAX_VOCAB, 512, projected=True))
    for sizes in (
        usual,
        projected,
        autocast,
        _Sizes(fp16, fp16, fp16, 5, 20, 512),
        _Sizes(bf16, bf16, bf16, 7, 20, 400),
        mixed,
        _Sizes(fp32, fp32, fp32, 5, 20, 512, projected=True),
    ):
        columns = sizes.length * sizes.vocab // sizes.tokens
        yield shipped_backward(
            architecture, str(sizes), sizes.rows, sizes.centers, sizes.operand, sizes.tokens, columns, sizes.width,
            pulled=sizes.pulled,
        )  # fmt: skip
    yield from shipped_shared()


def _shipped_forward(architecture: str, sizes: _Sizes, bend: str = "shift", tf32: bool = False) -> Configuration:
    shape = (sizes.length, sizes.vocab, sizes.width)
    constants = _forward_constants(sizes.operand, sizes.tokens, *shape, bend, False, tf32, architecture)
    pointers = {"p_targets": SIGNATURE[sizes.centers], "p_target_rows": "*i64"}
    floats = ["p_weights", "p_losses", "p_slopes", "p_row_inverse", "p_radial", "p_center_inverse", "p_pull"]
    signature = {
        "p_rows": SIGNATURE[sizes.rows],
        "p_centers": SIGNATURE[sizes.centers],
        "p_codes": "*i64",
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(["batch", "target_count"], "i32"),
        **dict.fromkeys(["pull", "scale", "margin_first", "margin_second", "margin_third"], "fp32"),
        **(pointers if sizes.pulled else {}),
    }
    absent = {} if sizes.pulled else dict.fromkeys(pointers)
    switches = {"WEIGHED": True, "PULLED": sizes.pulled, "HAS_TARGET_ROWS": sizes.pulled, "SAVE": True}
    constants = {**constants, **absent, **switches}
    label = f"{sizes}, {bend}{', TF32' if tf32 else ''}"
    return Configuration(label, token_margin_forward, signature, constants, matrix_units(constants))
