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


def _prefers_onednn() -> bool:
    processor = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.9 has none
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and "AMD" in processor.get("cpu_name", "")
        and processor.get("avx512_f", False)
    )


PREFERS_ONEDNN = _prefers_onednn()
"""Whether this CPU multiplies float32 twice as fast in oneDNN as in MKL, which PyTorch calls.

MKL keeps to AVX2 on AMD's processors, oneDNN uses their AVX-512. Both come with PyTorch.
"""

_ONEDNN_MULTIPLICATIONS = 1 << 21
"""Below that what oneDNN does around a product outweighs what it saves."""

_ONEDNN_WIDTH = 256
"""A transposed left operand is copied first: worth it before a right one this wide."""


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


def product(left: Tensor, right: Tensor, operand: torch.dtype) -> Tensor:
    """left (n, k) @ right (k, m), or a batch of both, with operands rounded to ``operand``.

    Sums and result are float32, float64 if the operands are. A CPU that lacks the dtype multiplies the rounded operands
    in float32, which gives the same. Large float32 products go to oneDNN where `PREFERS_ONEDNN`, outside torch.compile.
    """
    left, right = _operands(left, right, operand)
    if _suits_onednn(left, right):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
        return found
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    if left.dtype.itemsize >= torch.float32.itemsize:
        return multiply(left, right)
    return multiply(left, right, out_dtype=torch.float32) if left.is_cuda else multiply(left, right).float()


def add_products(total: Tensor, left: Tensor, right: Tensor, operand: torch.dtype) -> Tensor:
    """``total`` (b, n, m) + left (b, n, k) @ right (b, k, m), as `product` multiplies, in the memory of ``total``.

    Not under torch.compile, which takes an in-place product on a transposed view for a contiguous one.
    """
    if torch.compiler.is_compiling():
        return total + product(left, right, operand)
    left, right = _operands(left, right, operand)
    return total.baddbmm_(left, right) if left.dtype == total.dtype else total.add_(product(left, right, left.dtype))


def _operands(left: Tensor, right: Tensor, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounded to ``operand``, in the dtype that they are multiplied in."""
    left, right = left.to(operand), right.to(operand)
    wide = operand.itemsize >= torch.float32.itemsize
    if wide or left.is_cuda or (left.device.type == "cpu" and operand in _NATIVE_ON_CPU):
        return left, right
    return left.float(), right.float()


def _suits_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        PREFERS_ONEDNN
        and left.ndim == 2
        and left.dtype == torch.float32
        and left.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and left.numel() * right.shape[1] >= _ONEDNN_MULTIPLICATIONS
        and (left.stride(1) == 1 or right.shape[1] >= _ONEDNN_WIDTH)
        and not torch.compiler.is_compiling()
    )
