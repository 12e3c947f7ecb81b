"""Gaussian potential: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gif_kernels.device.rows import row_constants
from gif_kernels.device.shipped import POINTER, Configuration, MatrixUnits, dtype_names
from gif_kernels.device.tuning import FUSED_POTENTIAL, WIDEST_ROWS
from gif_kernels.gaussian_potential.kernels import (
    gaussian_potential_fused,
    gaussian_potential_gradient,
    gaussian_potential_pairs,
    pairs_constants,
    product_constants,
)
from gif_kernels.precision import float32_precision


def configurations(architecture: str) -> Iterator[Configuration]:
    """Every fused tile of ``architecture`` at its largest width, and the products in blocks."""
    sizes = dict.fromkeys(["rows", "columns", "offset", "split_columns", "splits", "vectors_stride"], "i32")
    common = {
        **sizes,
        **dict.fromkeys(["sharpness", "weight", "slope"], "fp32"),
        "p_sums": "*fp32",
        "p_numerators": "*fp32",
    }
    bf16 = {**common, **dict.fromkeys(["p_rows", "p_columns", "p_vectors"], POINTER[torch.bfloat16])}
    for width, limits in FUSED_POTENTIAL.get(architecture, {}).items():
        constants = product_constants(limits, width, limits.width, float32_precision(False, architecture))
        units: MatrixUnits = "widest" if limits.rows >= WIDEST_ROWS else "any"
        yield Configuration(f"{width} bfloat16", gaussian_potential_fused, bf16, constants, units)
    for dtype, width in ((torch.bfloat16, 768), (torch.float32, 400)):
        pointers = dict.fromkeys(["p_rows", "p_columns", "p_pairs"], POINTER[dtype])
        constants = pairs_constants(dtype, width, True, float32_precision(False, architecture), architecture)
        units = "widest" if dtype == torch.bfloat16 else "none"
        label = f"{width} {dtype_names(dtype)}"
        for even in (True, False):
            name = label if even else f"{label}, masked"
            switches = {**constants, "EVEN": even}
            yield Configuration(name, gaussian_potential_pairs, {**common, **pointers}, switches, units)
    rows = row_constants(768, 1)
    signature = {**bf16, "p_total": "*fp64", "p_gradient": "*fp32"}
    yield Configuration("768 bfloat16", gaussian_potential_gradient, signature, rows)
