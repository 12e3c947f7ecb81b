"""Code contrast: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gif_kernels.code_contrast.kernels import code_contrast_softmax, softmax_constants
from gif_kernels.device.shipped import POINTER, Configuration, dtype_names


def configurations(architecture: str) -> Iterator[Configuration]:
    """Both dtypes of the weights, and the margins at both ends; the same for every architecture."""
    for dtype, margin, count in ((torch.bfloat16, "none", 3072), (torch.float32, "angle", 100_000)):
        signature = {
            **dict.fromkeys(["p_products", "p_row_inverse", "p_vector_inverse", "p_losses"], "*fp32"),
            "p_targets": "*i64",
            "p_competes": "*i1",
            "p_weights": POINTER[dtype],
            "count": "i32",
            **dict.fromkeys(["scale", "m1", "m2", "cos_m2", "sin_m2", "drop"], "fp32"),
        }
        switches = {"MARGIN": margin, "STRAIGHT_THROUGH": False, "MASKED": True, "SAVE": True}
        label = f"{count} {dtype_names(dtype)}, {margin}"
        yield Configuration(label, code_contrast_softmax, signature, {**softmax_constants(count), **switches})
