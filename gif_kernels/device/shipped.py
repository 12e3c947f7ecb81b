"""Configurations that are compiled ahead of time: how one is written, and those of the kernels in this folder.

Each op lists its own in its `shipped.py`, as `configurations`; `gif_kernels.aot` compiles all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton.language as tl

from gif_kernels.device.cosine_gradients import backward_constants, center_gradient, cosine_backward
from gif_kernels.device.reduction import REDUCED_AT_ONCE, reduce_losses
from gif_kernels.device.rows import inverse_norms_kernel, row_constants, row_gradients_kernel, unit_rows_kernel
from gif_kernels.device.tuning import WIDEST_ROWS

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
"""How Triton writes the type of a pointer."""

MatrixUnits = Literal["none", "any", "widest"]


@dataclass(frozen=True)
class Configuration:
    """One compilation of a kernel that is shipped, for `gif_kernels.aot`.

    Args:
        label: sizes and dtypes, one line.
        kernel: the jitted function.
        signature: Triton type by argument name; pointers are aligned to 16 bytes, as PyTorch's memory is.
        constants: value by constexpr argument name, and launch options.
        matrix: the matrix units that its products must use: the architecture's widest, any, or none.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    matrix: MatrixUnits = "none"


def dtype_names(*dtypes: torch.dtype) -> str:
    """The names of the dtypes, each once, as labels write them: "bfloat16 and float32"."""
    return " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def matrix_units(constants: dict[str, Any]) -> MatrixUnits:
    """The matrix units that products with these constants must use.

    Those of 16-bit operands use some; the widest take 64 rows, and wide columns leave no room for so many.
    """
    if constants["OPERAND"] == tl.float32:
        return "none"
    return "widest" if constants["BLOCK_B"] >= WIDEST_ROWS else "any"


def cosine_backward_configuration(
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
    pointers = {"p_pull": "*fp32", "p_targets": POINTER[centers], "p_target_rows": "*i64"}
    absent = {} if pulled else dict.fromkeys(pointers)
    floats = ["p_slopes", "p_row_inverse", "p_radial", "p_center_inverse", "p_incoming", "p_share", "p_partial"]
    integers = ["batch", "incoming_stride", "target_count", "split_rows", "row_programs"]
    signature = {
        "p_rows": POINTER[rows],
        "p_centers": POINTER[centers],
        "p_row_gradient": POINTER[rows],
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(integers, "i32"),
        **(pointers if pulled else {}),
    }
    constants = {**constants, **absent, "MEAN": True, "PULLED": pulled, "HAS_TARGET_ROWS": pulled}
    return Configuration(label, cosine_backward, signature, constants, matrix_units(constants))


def configurations(architecture: str) -> Iterator[Configuration]:
    """The reduction, the sum of a centre gradient's parts, and the kernels of a row a program; the same everywhere."""
    floats = dict.fromkeys(["p_losses", "p_value", "p_share"], "*fp32")
    reduction = {**floats, "p_counted": "*i64", "batch": "i32", "counted_stride": "i32"}
    constants = {"HAS_COUNTED": True, "MEAN": True, "BLOCK": REDUCED_AT_ONCE}
    yield Configuration("mean", reduce_losses, reduction, constants)
    pointers = {"p_partial": "*fp32", "p_centers": "*bf16", "p_gradient": "*bf16"}
    centers = {**pointers, "splits": "i32", "centers": "i32"}
    yield Configuration("512 bfloat16", center_gradient, centers, {"WIDTH": 512, "BLOCK_D": 512})
    label, constants = "768 bfloat16", row_constants(768, 1)
    rows = {"p_rows": "*bf16", "rows_stride": "i32"}
    gathered = {**rows, "p_index": "*i64", "p_unit": "*bf16"}
    yield Configuration(label, unit_rows_kernel, gathered, {**constants, "GATHER": True})
    norms = {**rows, "p_inverse": "*fp32"}
    yield Configuration(label, inverse_norms_kernel, norms, {**constants, "OPERAND": tl.bfloat16})
    floats = dict.fromkeys(["p_inverse", "p_numerators", "p_incoming", "p_share"], "*fp32")
    gradients = {**rows, **floats, "p_gradient": "*bf16", "scale": "fp32", "incoming_stride": "i32"}
    yield Configuration(label, row_gradients_kernel, gradients, {**constants, "MEAN": True})
