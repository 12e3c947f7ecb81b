"""Largest cosine: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gif_kernels.device.shipped import POINTER, Configuration, MatrixUnits, dtype_names
from gif_kernels.max_cosine.kernels import max_cosine_search, search_constants


def configurations(architecture: str) -> Iterator[Configuration]:
    """Products in matrix units and exact ones, for ``architecture``."""
    common = {
        **dict.fromkeys(["p_vectors_inverse", "p_others_inverse", "p_cosine"], "*fp32"),
        "p_index": "*i32",
        **dict.fromkeys(["rows", "columns", "split_columns"], "i32"),
    }
    for dtype, width in ((torch.bfloat16, 768), (torch.float32, 400)):
        signature = {**common, **dict.fromkeys(["p_vectors", "p_others"], POINTER[dtype])}
        constants = search_constants(dtype, width, dtype == torch.bfloat16, False, architecture)
        units: MatrixUnits = "widest" if dtype == torch.bfloat16 else "none"
        label = f"{width} {dtype_names(dtype)}"
        yield Configuration(label, max_cosine_search, signature, constants, units)
