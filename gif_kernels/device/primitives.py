"""The smallest parts of the Triton kernels: blocks, masks and norms on the device; sizes and memory before a launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gif_kernels.device.tuning import SMALLEST_BLOCK

SMALLEST_SQUARE = tl.constexpr(1.1754944e-38)
"""The smallest normal float32: a sum of squares below it counts as 0, since hardware may flush it to 0 anyway."""

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What Triton calls the dtype of an operand; `gif_kernels.precision` says which one it is."""


@triton.jit
def inverse_norm(square):
    """1 / sqrt(square); 0 for a row of zeros, which has no direction; NaN where the square is."""
    short = square < SMALLEST_SQUARE
    return tl.where(short, 0.0, 1.0 / tl.sqrt_rn(tl.where(short, 1.0, square)))


@triton.jit
def inside(o_d, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which offsets are inside a row: all, and known when compiling, where the blocks divide the width."""
    return tl.full(o_d.shape, True, tl.int1) if WIDTH % BLOCK_D == 0 else o_d < WIDTH


@triton.jit
def load_block(p, o_row, m_row, o_column, m_column, STRIDE: tl.constexpr):
    """Block (rows, columns) of a row-major matrix; 0 outside the masks."""
    p += o_row[:, None] * STRIDE + o_column[None, :]
    return tl.load(p, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """``b_sum`` + ``b_left`` @ ``b_right``; of TF32 the nearest, since matrix units drop the digits that they lack."""
    if PRECISION == "tf32" and b_left.dtype == tl.float32:
        b_left, b_right = _nearest_tf32(b_left), _nearest_tf32(b_right)
    return tl.dot(b_left, b_right, acc=b_sum, input_precision=PRECISION)


@triton.jit
def _nearest_tf32(b):
    """float32 to the nearest of those with 10 digits after the point; NaN and infinities stay."""
    b_nearest = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(b == b, b_nearest, b)


def block_size(size: int, most: int, least: int = SMALLEST_BLOCK) -> int:
    """The power of two that covers ``size``, between ``least`` and ``most``, both powers of two."""
    return max(least, min(most, triton.next_power_of_2(size)))


def empty_like_if(needed: bool, tensor: Tensor) -> Tensor:
    """Memory for the gradient of ``tensor``, contiguous; of no element unless ``needed``."""
    return torch.empty(tensor.shape if needed else (0,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)
