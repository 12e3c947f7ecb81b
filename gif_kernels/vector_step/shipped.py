"""Vector step: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gif_kernels.device.rounding import rounded_row_constants
from gif_kernels.device.shipped import POINTER, Configuration, dtype_names
from gif_kernels.vector_step.kernels import vector_step


def configurations(architecture: str) -> Iterator[Configuration]:
    """Usual sizes, the widest rows, rows of a larger table, and no rounding; the same for every architecture."""
    common = {
        **dict.fromkeys(["p_rows", "p_places", "p_seed", "p_stayed"], "*i64"),
        **dict.fromkeys(["count", "table_rows", "table_stride", "gradient_stride", "row_ids_stride"], "i32"),
        "p_gradient": POINTER[torch.float32],
        "rate": "fp32",
    }
    sizes = ((512, torch.bfloat16, False), (2048, torch.bfloat16, False), (400, torch.float16, True))
    for width, dtype, named in sizes:
        signature = {**common, "p_table": POINTER[dtype], **({"p_row_ids": "*i64"} if named else {})}
        absent = {} if named else {"p_row_ids": None}
        constants = {**rounded_row_constants(dtype, width, 1), "GRADIENT_COLUMN_STRIDE": 1, "NAMED": named, **absent}
        yield Configuration(f"{width} {dtype_names(dtype)}", vector_step, signature, constants)
    exact = {name: kind for name, kind in common.items() if name != "p_seed"}
    constants = {**rounded_row_constants(torch.float32, 512, 1), "GRADIENT_COLUMN_STRIDE": 1, "NAMED": False}
    absent = {"p_row_ids": None, "p_seed": None}
    yield Configuration("512 float32", vector_step, {**exact, "p_table": "*fp32"}, {**constants, **absent})
