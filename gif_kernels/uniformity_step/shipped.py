"""Uniformity step: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gif_kernels.device.rounding import rounded_row_constants
from gif_kernels.device.shipped import POINTER, Configuration
from gif_kernels.uniformity_step.kernels import uniformity_step


def configurations(architecture: str) -> Iterator[Configuration]:
    """A usual size; the same for every architecture."""
    signature = {
        "p_table": POINTER[torch.bfloat16],
        "p_index": "*i64",
        "p_numerators": "*fp32",
        "p_total": "*fp64",
        **dict.fromkeys(["rows", "splits", "mixed_seed", "table_stride"], "i32"),
        **dict.fromkeys(["slope", "rate"], "fp32"),
    }
    yield Configuration("768 bfloat16", uniformity_step, signature, rounded_row_constants(torch.bfloat16, 768, 1))
