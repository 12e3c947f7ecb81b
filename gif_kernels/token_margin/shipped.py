"""Token-margin loss: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gif_kernels.device.shipped import (
    POINTER,
    Configuration,
    cosine_backward_configuration,
    dtype_names,
    matrix_units,
)
from gif_kernels.device.tuning import MAX_VOCAB
from gif_kernels.token_margin.kernels import forward_constants, token_margin_forward


@dataclass(frozen=True)
class _Sizes:
    """Dtypes and sizes to compile for; ``projected`` gives each token a row of its own."""

    rows: torch.dtype
    centers: torch.dtype
    operand: torch.dtype
    length: int
    vocab: int
    width: int
    projected: bool = False
    pulled: bool = False

    @property
    def tokens(self) -> int:
        return self.length if self.projected else 1

    def __str__(self) -> str:
        dtypes = dtype_names(self.rows, self.centers, self.operand)
        notes = [name for name in ("projected", "pulled") if getattr(self, name)]
        return ", ".join([f"{self.length} x {self.vocab} x {self.width} {dtypes}", *notes])


def configurations(architecture: str) -> Iterator[Configuration]:
    """Usual sizes, and the largest and oddest of each kind, for ``architecture``."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual = _Sizes(bf16, bf16, bf16, 5, 20, 512)
    projected = _Sizes(bf16, bf16, bf16, 5, 20, 512, projected=True)
    autocast = _Sizes(bf16, fp32, bf16, 5, 20, 512, pulled=True)
    mixed = _Sizes(bf16, fp32, fp32, 5, 20, 512)
    exact = _Sizes(fp32, fp32, fp32, 5, 20, 512)
    yield _forward(architecture, usual)
    yield _forward(architecture, projected)
    yield _forward(architecture, autocast)
    yield _forward(architecture, _Sizes(fp16, fp16, fp16, 7, 16, 768), margin="angle")
    yield _forward(architecture, _Sizes(bf16, bf16, bf16, 4, MAX_VOCAB, 400))
    yield _forward(architecture, mixed)
    yield _forward(architecture, exact, tf32=True)
    yield _forward(architecture, _Sizes(fp32, fp32, fp32, 4, MAX_VOCAB, 512, projected=True))
    for sizes in (
        usual,
        projected,
        autocast,
        _Sizes(fp16, fp16, fp16, 5, 20, 512),
        _Sizes(bf16, bf16, bf16, 7, 20, 400),
        mixed,
        _Sizes(fp32, fp32, fp32, 5, 20, 512, projected=True),
    ):
        yield cosine_backward_configuration(
            architecture,
            str(sizes),
            rows=sizes.rows,
            centers=sizes.centers,
            operand=sizes.operand,
            tokens=sizes.tokens,
            columns=sizes.length * sizes.vocab // sizes.tokens,
            width=sizes.width,
            pulled=sizes.pulled,
        )


def _forward(architecture: str, sizes: _Sizes, margin: str = "shift", tf32: bool = False) -> Configuration:
    shape = (sizes.length, sizes.vocab, sizes.width)
    constants = forward_constants(sizes.operand, sizes.tokens, *shape, tf32, architecture)
    pointers = {"p_targets": POINTER[sizes.centers], "p_target_rows": "*i64"}
    floats = ["p_weights", "p_losses", "p_slopes", "p_row_inverse", "p_radial", "p_center_inverse", "p_pull"]
    signature = {
        "p_rows": POINTER[sizes.rows],
        "p_centers": POINTER[sizes.centers],
        "p_codes": "*i64",
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(["batch", "target_count"], "i32"),
        **dict.fromkeys(["pull", "scale", "m1", "m2", "cos_m2", "sin_m2", "drop"], "fp32"),
        **(pointers if sizes.pulled else {}),
    }
    absent = {} if sizes.pulled else dict.fromkeys(pointers)
    switches = {
        "WEIGHED": True,
        "PULLED": sizes.pulled,
        "HAS_TARGET_ROWS": sizes.pulled,
        "SAVE": True,
        "MARGIN": margin,
        "STRAIGHT_THROUGH": False,
    }
    constants = {**constants, **absent, **switches}
    label = f"{sizes}, {margin}{', TF32' if tf32 else ''}"
    return Configuration(label, token_margin_forward, signature, constants, matrix_units(constants))
