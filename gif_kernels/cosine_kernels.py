"""What the losses over cosines share in Triton: margins, gathered rows, the reduction, and gradients through cosines.

A row x and a centre w meet in c = (x / ||x||) . (w / ||w||). A loss leaves dloss/dc, the slopes (B, T, N), for each of
T rows a sample and N centres a row; from there both gradients follow. Choices in token_margin/README.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.margins import COSINE_LIMIT, AngularMargin
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
from gif_kernels.tuning import WIDEST_ROWS, Configuration, MatrixUnits, architecture, tile

PROGRAMS = 256
"""That the centre gradient is shared among, by splitting the batch, where there are fewer blocks of it."""

REDUCED_AT_ONCE = 1024

ALIGNED = 16
"""Numbers that Triton looks for in a stride before it loads 16 bytes at once."""

LIMIT = tl.constexpr(COSINE_LIMIT)
PI = tl.constexpr(math.pi)


# ---- margins


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
def margin_value_and_slope(cosine, first, second, third, BEND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """psi and dpsi/dcos; `margin_numbers` says what the three numbers are for each BEND."""
    slope = tl.full(cosine.shape, 1.0, tl.float32)
    if BEND == "none":
        value = cosine - third
    else:
        c = tl.clamp(cosine, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
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


def margin_numbers(margin: AngularMargin) -> tuple[str, bool, float, float, float]:
    """How psi is computed, whether its slope is 1, and the three numbers it takes.

    "none": psi = cos - third.
    "shift", where m1 = 1: `AngularMargin.shift`.
    "angle": m1, m2, m3.
    """
    straight_through = margin.gradient == "straight_through"
    if not margin.bends:
        return "none", straight_through, 0.0, 0.0, float(margin.m3)
    if margin.m1 == 1.0:
        return "shift", straight_through, *margin.shift
    return "angle", straight_through, float(margin.m1), float(margin.m2), float(margin.m3)


# ---- gathered rows


@triton.jit
def gathered_index(p_index, i_start, o_b, m_b, count, HAS_INDEX: tl.constexpr):
    """Row of a table of ``count`` rows for each row of a block; which have one, and which are not valid: int64, masks.

    Without an index row i is for row i; -1 is valid and has none.
    """
    b_index = i_start + o_b
    if HAS_INDEX:
        b_index = tl.load(p_index + b_index, mask=m_b, other=-1)
    m_valid = (b_index >= -1) & (b_index < count)
    return b_index, m_b & m_valid & (b_index >= 0), m_b & ~m_valid


@triton.jit
def load_gathered(p, b_index, m_row, o_column, m_column, STRIDE: tl.constexpr):
    """Block (rows, columns) of the rows at ``b_index`` int64 of a row-major matrix; 0 outside the masks."""
    p += b_index[:, None] * STRIDE + o_column[None, :]
    return tl.load(p, mask=m_row[:, None] & m_column[None, :], other=0.0)


# ---- the reduction


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
    """The reduced loss, and what each row weighs in it, (); that is empty unless the reduction is a mean.

    Adds in a fixed order, in one launch; none for "none".
    """
    share = losses.new_empty(() if reduction == "mean" else 0)
    if reduction == "none":
        return losses, share
    value = losses.new_empty(())
    stride = 0 if counted is None else counted.stride(0)
    with torch.cuda.device_of(losses):
        reduce_losses[(1,)](
            losses, counted, value, share, len(losses), stride, counted is not None, reduction == "mean",
            REDUCED_AT_ONCE,
        )  # fmt: skip
    return value, share


def reduced_like(losses: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Tensors as `reduced` returns them."""
    share = losses.new_empty(() if reduction == "mean" else 0)
    return (losses if reduction == "none" else losses.new_empty(())), share


def incoming_stride(incoming: Tensor) -> int:
    """Between the gradients of two rows' losses: 0 where one gradient is for all."""
    return incoming.stride(0) if incoming.ndim else 0


@triton.jit
def row_factor(p_incoming, incoming_stride, p_share, i_start, o_b, m_b, MEAN: tl.constexpr):
    """dloss/d(loss of a row) for a block of rows."""
    b_factor = tl.load(p_incoming + (i_start + o_b) * incoming_stride, mask=m_b, other=0.0)
    if MEAN:
        b_factor = b_factor * tl.load(p_share)
    return b_factor


# ---- gradients through cosines


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
    p_incoming,
    p_share,
    p_pull,
    p_targets,
    p_target_rows,
    p_row_gradient,
    batch,
    incoming_stride,
    target_count,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    PULLED: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of dloss/drow = factor / norm (sum_n slope_n center_n / norm_n - radial row / norm + pull target)."""
    i_start = i_block.to(tl.int64) * BLOCK_B
    i_row = i_start * TOKENS + i_token
    i_column = i_token.to(tl.int64) * COLUMNS
    p_slopes += i_row * SLOPES
    p_centers += i_column * WIDTH
    p_center_inverse += i_column
    o_b = tl.arange(0, BLOCK_B)
    m_b = o_b < batch - i_start
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    b_gradient = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for i_n in range(0, COLUMNS, BLOCK_N):
        m_n = o_n < COLUMNS - i_n
        o_slopes = o_b[:, None] * (TOKENS * SLOPES) + o_n[None, :]
        b_slopes = tl.load(p_slopes + o_slopes, mask=m_b[:, None] & m_n[None, :], other=0.0)
        b_slopes = b_slopes * tl.load(p_center_inverse + o_n, mask=m_n, other=0.0)[None, :]
        b_center = load_block(p_centers, o_n, m_n, o_d, m_d, WIDTH).to(OPERAND)
        b_gradient = tl.dot(b_slopes.to(OPERAND), b_center, acc=b_gradient, input_precision=PRECISION)
        p_slopes += BLOCK_N
        p_centers += BLOCK_N * WIDTH
        p_center_inverse += BLOCK_N
    b_row = load_block(p_rows + i_row * WIDTH, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(tl.float32)
    b_inverse = tl.load(p_row_inverse + i_row + o_b * TOKENS, mask=m_b, other=0.0)
    b_radial = tl.load(p_radial + i_row + o_b * TOKENS, mask=m_b, other=0.0) * b_inverse
    b_gradient -= b_radial[:, None] * b_row
    if PULLED:
        b_index, m_target, _ = gathered_index(p_target_rows, i_start, o_b, m_b, target_count, HAS_TARGET_ROWS)
        b_pull = tl.load(p_pull + i_start + o_b, mask=m_b, other=0.0)
        b_gradient += b_pull[:, None] * load_gathered(p_targets, b_index, m_target, o_d, m_d, WIDTH).to(tl.float32)
    b_factor = row_factor(p_incoming, incoming_stride, p_share, i_start, o_b, m_b, MEAN) * b_inverse
    o_out = o_b[:, None] * (TOKENS * WIDTH) + o_d[None, :]
    tl.store(p_row_gradient + i_row * WIDTH + o_out, b_gradient * b_factor[:, None], mask=m_b[:, None] & m_d[None, :])


@triton.jit
def _center_partial(
    i_split,
    i_token,
    i_n,
    i_d,
    p_rows,
    p_slopes,
    p_row_inverse,
    p_incoming,
    p_share,
    p_partial,
    batch,
    incoming_stride,
    split_rows,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of dloss/d(center / norm) = sum_b factor_b slope_b row_b / norm_b over one part of the batch."""
    i_start = i_split.to(tl.int64) * split_rows
    i_row = i_start * TOKENS + i_token
    i_column = i_n.to(tl.int64) * BLOCK_N
    p_rows += i_row * WIDTH
    p_slopes += i_row * SLOPES + i_column
    p_row_inverse += i_row
    p_partial += ((i_split.to(tl.int64) * TOKENS + i_token) * COLUMNS + i_column) * WIDTH
    rows = tl.minimum(split_rows, batch - i_start).to(tl.int32)
    o_b = tl.arange(0, BLOCK_B)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = inside(o_d, WIDTH, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < COLUMNS - i_column
    b_partial = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for i_b in range(0, rows, BLOCK_B):
        m_b = o_b < rows - i_b
        b_factor = tl.load(p_row_inverse + o_b * TOKENS, mask=m_b, other=0.0)
        b_factor *= row_factor(p_incoming, incoming_stride, p_share, i_start + i_b, o_b, m_b, MEAN)
        o_slopes = o_b[:, None] * (TOKENS * SLOPES) + o_n[None, :]
        b_slopes = tl.load(p_slopes + o_slopes, mask=m_b[:, None] & m_n[None, :], other=0.0) * b_factor[:, None]
        b_row = load_block(p_rows, o_b, m_b, o_d, m_d, TOKENS * WIDTH).to(OPERAND)
        b_partial = tl.dot(tl.trans(b_row), b_slopes.to(OPERAND), acc=b_partial, input_precision=PRECISION)
        p_rows += BLOCK_B * TOKENS * WIDTH
        p_slopes += BLOCK_B * TOKENS * SLOPES
        p_row_inverse += BLOCK_B * TOKENS
    o_out = o_n[None, :] * WIDTH + o_d[:, None]
    tl.store(p_partial + o_out, b_partial, mask=m_n[None, :] & m_d[:, None])


@triton.jit(do_not_specialize=["batch", "incoming_stride", "target_count", "split_rows", "row_programs"])
def cosine_backward(
    p_rows,  # (B, TOKENS, WIDTH)
    p_centers,  # (TOKENS, COLUMNS, WIDTH)
    p_slopes,  # (B, TOKENS, SLOPES), SLOPES >= COLUMNS: dloss/dcosine
    p_row_inverse,  # (B, TOKENS): 1 / norm
    p_radial,  # (B, TOKENS): row / norm . dloss/d(row / norm)
    p_center_inverse,  # (TOKENS, COLUMNS)
    p_incoming,  # (B,) or (): its stride is 0 where every row counts the same
    p_share,  # (): multiplies it, if MEAN
    p_pull,  # (B,): the pull of `code_regression`, if PULLED (and TOKENS is 1)
    p_targets,  # (target_count, WIDTH)
    p_target_rows,  # (B,)
    p_row_gradient,  # (B, TOKENS, WIDTH)
    p_partial,  # (splits, TOKENS, COLUMNS, WIDTH)
    batch,
    incoming_stride,
    target_count,
    split_rows,
    row_programs,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    PULLED: tl.constexpr,
    HAS_TARGET_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first row_programs programs take blocks of the row gradient, the others of the centre gradient's parts."""
    BLOCKS_D: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i = tl.program_id(0)
    if i < row_programs:
        _row_gradient(
            i // (BLOCKS_D * TOKENS), i // BLOCKS_D % TOKENS, i % BLOCKS_D,
            p_rows, p_centers, p_slopes, p_row_inverse, p_radial, p_center_inverse, p_incoming, p_share,
            p_pull, p_targets, p_target_rows, p_row_gradient,
            batch, incoming_stride, target_count,
            TOKENS, COLUMNS, SLOPES, WIDTH, MEAN, PULLED, HAS_TARGET_ROWS, OPERAND, PRECISION,
            BLOCK_B, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    else:
        i -= row_programs
        BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
        _center_partial(
            i // (BLOCKS_D * BLOCKS_N * TOKENS), i // (BLOCKS_D * BLOCKS_N) % TOKENS,
            i // BLOCKS_D % BLOCKS_N, i % BLOCKS_D,
            p_rows, p_slopes, p_row_inverse, p_incoming, p_share, p_partial,
            batch, incoming_stride, split_rows,
            TOKENS, COLUMNS, SLOPES, WIDTH, MEAN, OPERAND, PRECISION, BLOCK_B, BLOCK_D, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "centers"])
def center_gradient(
    p_partial,  # (splits, centers, WIDTH): dloss/d(center / norm), by part of the batch
    p_centers,  # (centers, WIDTH)
    p_gradient,  # (centers, WIDTH)
    splits,
    centers,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= WIDTH
):
    i_center = tl.program_id(0).to(tl.int64) * WIDTH
    part = centers.to(tl.int64) * WIDTH
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    b_direction = tl.zeros((BLOCK_D,), tl.float32)
    for _ in range(splits):
        b_direction += tl.load(p_partial + i_center + o_d, mask=m_d, other=0.0)
        p_partial += part
    b_center = tl.load(p_centers + i_center + o_d, mask=m_d, other=0.0).to(tl.float32)
    inverse = inverse_norm(tl.sum(b_center * b_center, 0))
    b_unit = b_center * inverse
    b_direction = (b_direction - tl.sum(b_direction * b_unit, 0) * b_unit) * inverse
    tl.store(p_gradient + i_center + o_d, b_direction, mask=m_d)


class Pulled(NamedTuple):
    """The term of `code_regression` that joins the row gradient: pull (B,), targets (m, d) and rows of them (B,)."""

    pull: Tensor
    targets: Tensor
    target_rows: Tensor | None


def cosine_gradients(
    rows: Tensor,
    centers: Tensor,
    slopes: Tensor,
    row_inverse: Tensor,
    radial: Tensor,
    center_inverse: Tensor,
    incoming: Tensor,
    share: Tensor,
    pulled: Pulled | None,
    operand: torch.dtype,
    need_rows: bool,
    need_centers: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows (B, T, d') and of centers (T, N, d') or (l, v, d'), each in its dtype; empty if not needed.

    ``share`` is empty unless the loss is a mean (see `reduced`).
    """
    rows, centers = rows.contiguous(), centers.contiguous()
    row_gradient, centers_gradient = empty_like_if(need_rows, rows), empty_like_if(need_centers, centers)
    batch, tokens, width = rows.shape
    count = centers.shape[0] * centers.shape[1]
    columns = count // tokens
    constants = backward_constants(operand, tokens, columns, width, tf32_allowed(), architecture(rows.device))
    block_b, block_n = constants["BLOCK_B"], constants["BLOCK_N"]
    blocks, blocks_d = triton.cdiv(batch, block_b), triton.cdiv(width, constants["BLOCK_D"])
    split_programs = tokens * blocks_d * triton.cdiv(columns, block_n)
    split_blocks = max(1, triton.cdiv(blocks * split_programs, max(PROGRAMS, split_programs)))
    splits = triton.cdiv(blocks, split_blocks) if need_centers else 0
    partial = torch.empty((splits, count, width), dtype=torch.float32, device=rows.device)
    row_programs = blocks * blocks_d * tokens if need_rows else 0
    pull, targets, target_rows = pulled or (None, None, None)
    with torch.cuda.device_of(rows):
        cosine_backward[(row_programs + splits * split_programs,)](
            rows, centers, slopes, row_inverse, radial, center_inverse, incoming, share,
            pull, targets, target_rows, row_gradient, partial,
            batch, incoming_stride(incoming), 0 if targets is None else len(targets),
            split_blocks * block_b, row_programs, MEAN=share.ndim == 0, PULLED=pulled is not None,
            HAS_TARGET_ROWS=target_rows is not None, **constants,
        )  # fmt: skip
        if need_centers:
            block_d = triton.next_power_of_2(width)
            center_gradient[(count,)](partial, centers, centers_gradient, splits, count, WIDTH=width, BLOCK_D=block_d)
    return row_gradient, centers_gradient


def slopes_stride(columns: int) -> int:
    """Numbers from one row of slopes to the next: rounded up, so that rows begin where whole vectors are loaded."""
    return triton.cdiv(columns, ALIGNED) * ALIGNED


@functools.cache
def backward_constants(
    operand: torch.dtype, tokens: int, columns: int, width: int, tf32: bool, architecture: str
) -> dict[str, Any]:
    """What `cosine_backward` compiles with, but for MEAN, PULLED and HAS_TARGET_ROWS."""
    if operand == torch.float16:  # scaled gradients may leave its range; TF32 has its digits and float32's range
        operand, tf32 = torch.float32, True
    limits = tile("cosine_backward", operand, architecture)
    block_n = block_size(columns, limits.columns)
    return {
        "TOKENS": tokens,
        "COLUMNS": columns,
        "SLOPES": slopes_stride(columns),
        "WIDTH": width,
        "OPERAND": TRITON_DTYPE[operand],
        "PRECISION": float32_precision(tf32, architecture),
        "BLOCK_B": limits.rows,
        "BLOCK_D": block_size(width, limits.width),
        "BLOCK_N": block_n,
        **limits.launch(block_n),
    }


# ---- ahead of time


def shipped_backward(
    architecture: str,
    label: str,
    rows: torch.dtype,
    centers: torch.dtype,
    operand: torch.dtype,
    tokens: int,
    columns: int,
    width: int,
    *,
    pulled: bool = False,
) -> Configuration:
    """`cosine_backward` for these dtypes and sizes, of a mean."""
    constants = backward_constants(operand, tokens, columns, width, False, architecture)
    pointers = {"p_pull": "*fp32", "p_targets": SIGNATURE[centers], "p_target_rows": "*i64"}
    absent = {} if pulled else dict.fromkeys(pointers)
    floats = ["p_slopes", "p_row_inverse", "p_radial", "p_center_inverse", "p_incoming", "p_share", "p_partial"]
    integers = ["batch", "incoming_stride", "target_count", "split_rows", "row_programs"]
    signature = {
        "p_rows": SIGNATURE[rows],
        "p_centers": SIGNATURE[centers],
        "p_row_gradient": SIGNATURE[rows],
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(integers, "i32"),
        **(pointers if pulled else {}),
    }
    constants = {**constants, **absent, "MEAN": True, "PULLED": pulled, "HAS_TARGET_ROWS": pulled}
    return Configuration(label, cosine_backward, signature, constants, matrix_units(constants))


def shipped_shared() -> list[Configuration]:
    """The reduction, and the sum of a centre gradient's parts."""
    floats = dict.fromkeys(["p_losses", "p_value", "p_share"], "*fp32")
    reduction = {**floats, "p_counted": "*i64", "batch": "i32", "counted_stride": "i32"}
    constants = {"HAS_COUNTED": True, "MEAN": True, "BLOCK": REDUCED_AT_ONCE}
    pointers = {"p_partial": "*fp32", "p_centers": "*bf16", "p_gradient": "*bf16"}
    centers = {**pointers, "splits": "i32", "centers": "i32"}
    return [
        Configuration("mean", reduce_losses, reduction, constants),
        Configuration("512 bfloat16", center_gradient, centers, {"WIDTH": 512, "BLOCK_D": 512}),
    ]


def matrix_units(constants: dict[str, Any]) -> MatrixUnits:
    """16-bit operands use matrix units; the widest take 64 rows, and wide columns leave no room for so many."""
    if constants["OPERAND"] == tl.float32:
        return "none"
    return "widest" if constants["BLOCK_B"] >= WIDEST_ROWS else "any"
