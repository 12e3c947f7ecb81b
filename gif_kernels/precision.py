"""Which dtype: of a computation, of a product's operands, and of gradients; and products in it.

Operands may be narrow, sums are wide: products accumulate in float32, or in float64 where an input is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "PREFERS_ONEDNN",
    "add_products",
    "compute_dtype",
    "float32_precision",
    "gradient_dtype",
    "in_range",
    "operand_dtype",
    "product",
    "range_factor",
    "rounded",
    "shared_dtype",
    "tf32_allowed",
]

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
"""Multiplications of a product below which what oneDNN does around it outweighs what it saves."""

_LARGEST_EXPONENT = 126
"""The largest exponent of a power of two that is a float32 and whose inverse is one too."""

_ONEDNN_WIDTH = 256
"""Columns of the right operand from which oneDNN is worth a copy of a left one that is transposed."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which an op sums, and takes norms and margins: float64 if any tensor is, float32 otherwise."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


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
    """The dtype of operands in products that make gradients: a loss scale drives those out of float16's range."""
    return torch.float32 if operand == torch.float16 else operand


def shared_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of a product's operands where nothing else says it: their own if they share one, else float32."""
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def float32_precision(tf32: bool, architecture: str) -> str:
    """Triton's name for how it multiplies float32 on ``architecture``.

    With ``tf32`` the operands may be rounded to TF32. Without, NVIDIA's matrix units multiply in three TF32 products,
    of the leading and the following digits: on an H100 three times as fast as multiply-adds, and with half of the error
    of PyTorch's own float32 products.
    """
    if tf32 and (architecture.startswith("sm_") or architecture == "gfx942"):
        return "tf32"
    return "tf32x3" if architecture.startswith("sm_") else "ieee"


def tf32_allowed() -> bool:
    """Whether the user lets float32 matrix products round their operands to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def in_range(rows: Tensor, operand: torch.dtype) -> Tensor:
    """``rows`` (..., d) times a power of two each, so that their largest coordinate is in [1/2, 1), for float16.

    For results that do not depend on the length of a row, in which float16 would lose rows beyond 65,504 and digits of
    those below 6e-5. Differentiable: the gradient is that of ``rows``. Rows that are float16 already, or for other
    operands, are returned as they are.
    """
    factor = range_factor(rows, operand)
    return rows if factor is None else rows * factor


def range_factor(rows: Tensor, operand: torch.dtype) -> Tensor | None:
    """The powers of two (..., 1) by which `in_range` multiplies; None where it leaves ``rows`` as they are."""
    if operand != torch.float16 or rows.dtype == torch.float16:
        return None
    largest = rows.detach().abs().amax(-1, keepdim=True)
    exponent = torch.frexp(largest.float()).exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.exp2(-exponent.to(rows.dtype))


def rounded(rows: Tensor, operand: torch.dtype) -> Tensor:
    """``rows`` as a product takes them, in their own dtype; so are their gradients."""
    return rows.to(operand).to(rows.dtype)


def product(left: Tensor, right: Tensor, operand: torch.dtype, *, wide: bool = False) -> Tensor:
    """left (n, k) @ right (k, m), or a batch of both, with operands rounded to ``operand``.

    Sums and result are float32, float64 if the operands are. A CPU that multiplies the dtype itself rounds its result,
    unless it is to be ``wide``, as logits are: a scale of 64 makes such a rounding 0.1. Then, and where a CPU lacks the
    dtype, the rounded operands are multiplied in float32, as a GPU does. Large float32 products go to oneDNN where
    `PREFERS_ONEDNN`, outside torch.compile.
    """
    left, right = _operands(left, right, operand, wide)
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
    left, right = _operands(left, right, operand, False)
    return total.baddbmm_(left, right) if left.dtype == total.dtype else total.add_(product(left, right, left.dtype))


def _operands(left: Tensor, right: Tensor, operand: torch.dtype, wide: bool) -> tuple[Tensor, Tensor]:
    """Rounded to ``operand``, in the dtype that they are multiplied in."""
    left, right = left.to(operand), right.to(operand)
    native = left.device.type == "cpu" and operand in _NATIVE_ON_CPU and not wide
    if native or left.is_cuda or operand.itemsize >= torch.float32.itemsize:
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
