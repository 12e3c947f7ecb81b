"""Nearest centroid: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl

from gif_kernels.device.shipped import POINTER, Configuration, MatrixUnits, dtype_names
from gif_kernels.nearest_centroid.kernels import nearest_centroid_search, search_constants
from gif_kernels.precision import shared_dtype


def configurations(architecture: str) -> Iterator[Configuration]:
    """Usual sizes, many centroids and exact products, for ``architecture``."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rows, centroids, count, width in (
        (bf16, bf16, 20, 512),
        (fp16, fp16, 256, 768),
        (bf16, fp32, 20, 512),
        (fp32, fp32, 20, 400),
        (fp32, fp32, 256, 512),
    ):
        constants = search_constants(shared_dtype(rows, centroids), count, width, False, architecture)
        signature = {
            "p_vectors": POINTER[rows],
            "p_centroids": POINTER[centroids],
            **dict.fromkeys(["p_offsets", "p_segment", "p_first", "p_index"], "*i64"),
            **dict.fromkeys(["p_row_inverse", "p_centroid_inverse", "p_cosine"], "*fp32"),
            "segments": "i32",
        }
        label = f"{count} x {width} {dtype_names(rows, centroids)}"
        units: MatrixUnits = "none" if constants["OPERAND"] == tl.float32 else "widest"
        yield Configuration(label, nearest_centroid_search, signature, constants, units)
