"""Code regression: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from gif_kernels.code_regression.kernels import (
    code_regression_backward,
    code_regression_forward,
    regression_constants,
)
from gif_kernels.device.shipped import Configuration


def configurations(architecture: str) -> Iterator[Configuration]:
    """Inputs of two dtypes, both gradients and three chunks of the width, for ``architecture``."""
    width, label = 768, "768 bfloat16 and float32"
    constants = regression_constants(width, architecture)
    inputs = {
        "p_embeddings": "*bf16",
        "p_targets": "*fp32",
        "p_target_rows": "*i64",
        "p_saved": "*fp32",
        **dict.fromkeys(["batch", "target_count"], "i32"),
    }
    yield Configuration(
        label,
        code_regression_forward,
        {**inputs, "p_counted": "*i64", "p_losses": "*fp32", "counted_stride": "i32"},
        {**constants, "HAS_TARGET_ROWS": True, "HAS_COUNTED": True, "SAVE": True},
    )
    gradients = {"p_embeddings_gradient": "*bf16", "p_targets_gradient": "*fp32"}
    yield Configuration(
        label,
        code_regression_backward,
        {**inputs, **gradients, "p_incoming": "*fp32", "p_share": "*fp32", "incoming_stride": "i32"},
        {**constants, "MEAN": True, "HAS_TARGET_ROWS": True, "NEED_EMBEDDINGS": True, "NEED_TARGETS": True},
    )
