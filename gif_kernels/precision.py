"""The dtype of a product's operands, and products in it: narrow operands, wide sums."""

from __future__ import annotations

import torch
from torch import Tensor

_NATIVE_ON_CPU = frozenset(
    dtype
    for dtype, supported in {
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        torch.float16: torch.cpu._is_amx_fp16_supported(),
    }.items()
    if supported
)
"""Dtypes narrower than float32 that this CPU multiplies itself: emulated, they take several times a float32 product."""


def operand_dtype(*inputs: Tensor | None) -> torch.dtype:
    """The dtype in which the products of an op take their operands.

    float64 if an input is; autocast's dtype where it is on; else the one that all inputs share, or float32.
    """
    dtypes = {x.dtype for x in inputs if x is not None}
    if torch.float64 in dtypes:
        return torch.float64
    device = next(x.device.type for x in inputs if x is not None)
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def gradient_dtype(operand: torch.dtype) -> torch.dtype:
    """The dtype of operands in products that make gradients: a loss scale can drive those out of float16's range."""
    return torch.float32 if operand == torch.float16 else operand


def rounded(rows: Tensor, operand: torch.dtype) -> Tensor:
    """``rows`` as a product takes them, in their own dtype; so are their gradients."""
    return rows.to(operand).to(rows.dtype)


def product(left: Tensor, right: Tensor, operand: torch.dtype, *, add_to: Tensor | None = None) -> Tensor:
    """left (n, k) @ right (k, m), or a batch of both, with operands rounded to ``operand``.

    Sums and result are float32, float64 if the operands are. The result is added to ``add_to``, in its memory but for
    torch.compile, which takes an in-place product on a transposed view for a contiguous one. A CPU that lacks the dtype
    multiplies the rounded operands in float32, which gives the same.
    """
    left, right = left.to(operand), right.to(operand)
    wide = operand if operand.itemsize >= torch.float32.itemsize else torch.float32
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    if operand != wide and left.is_cuda:
        found = multiply(left, right, out_dtype=wide)
    elif operand != wide and left.device.type == "cpu" and operand in _NATIVE_ON_CPU:
        found = multiply(left, right).to(wide)
    elif add_to is None:
        return multiply(left.to(wide), right.to(wide))
    elif torch.compiler.is_compiling():
        found = multiply(left.to(wide), right.to(wide))
    else:
        add = add_to.addmm_ if left.ndim == 2 else add_to.baddbmm_
        return add(left.to(wide), right.to(wide))
    if add_to is None:
        return found
    return add_to + found if torch.compiler.is_compiling() else add_to.add_(found)
