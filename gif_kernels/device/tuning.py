"""Tile sizes of the Triton kernels by kernel, architecture and size of an operand.

Each says how it was chosen. Derived: the largest blocks that compile without register spills on the architecture, and
within its shared memory, as `python -m gif_kernels.aot` reports. Measured: the fastest of some such blocks on a card
(`make gpu`, stage tune). The width d is walked in chunks, which it only bounds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

__all__ = [
    "FUSED_POTENTIAL",
    "MAX_VOCAB",
    "SMALLEST_BLOCK",
    "TILES",
    "Tile",
    "architecture",
    "fused_potential_tile",
    "multiprocessors",
    "tile",
]

H100 = "measured, NVIDIA H100 80GB HBM3, 2026-11-26"
INTERPRETED = "sm_80"
"""The architecture whose tiles a CPU interprets."""
SHARES_TILES_OF = {
    "sm_86": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_80",
    "sm_100": "sm_80",
    "sm_103": "sm_100",
    "sm_120": "sm_86",
}
"""The architecture whose row of `TILES` another one takes where it has none of its own, and so on from there."""
LAST = ("sm_80", "gfx942")
"""The architectures that have a row for every kernel and size, at which the search for one ends."""
SMALLEST_NVIDIA, SMALLEST_AMD = "sm_86", "gfx942"
"""Whose row an architecture takes that is not named above: that of its vendor's with the least shared memory."""
SMALLEST_BLOCK = 16
"""Rows or columns of the smallest block that Triton multiplies."""
FEWEST_WARPS = 4
"""Warps of a program, however small its block is."""
MAX_VOCAB = 256
"""The most centres a token for which there are token-margin kernels, which hold all of them at once."""
WIDE_VOCAB = 128
"""Centres a token beyond which those kernels have a tile of their own: fewer rows, or the epilogue spills."""
WIDEST_ROWS = 64
"""Rows that a warp group multiplies at once on sm_90 (and sm_100)."""


@dataclass(frozen=True)
class Tile:
    """The block of rows x columns that one program holds at a time, and the warps and pipeline stages that work on it.

    ``width`` is how much of d it takes in one step.
    """

    rows: int
    columns: int
    width: int
    warps: int
    stages: int
    source: str = field(default="derived", compare=False)
    """How it was chosen: "derived" from what compiles, or measured on a card, and when."""

    def rows_beside(self, columns: int) -> int:
        """Rows of a program that holds ``columns``: fewer where the columns are more than the tile's."""
        return max(SMALLEST_BLOCK, self.rows * self.columns // max(columns, self.columns))

    def launch(self, columns: int) -> dict[str, int]:
        """Triton's launch options for a program that holds ``columns``: warps as the block is small or large."""
        held, usual = self.rows_beside(columns) * columns, self.rows * self.columns
        warps = 2 * self.warps if held > usual else FEWEST_WARPS if held <= usual // 4 else self.warps
        return {"num_warps": warps, "num_stages": self.stages}


TILES = {
    "token_margin_forward": {
        ("sm_80", 2): Tile(rows=64, columns=64, width=64, warps=8, stages=2),
        ("sm_90", 2): Tile(rows=64, columns=256, width=64, warps=8, stages=3, source=H100),
        ("sm_90", 4): Tile(rows=16, columns=256, width=32, warps=8, stages=2, source=H100),
        ("sm_100", 2): Tile(rows=64, columns=128, width=32, warps=8, stages=3),
        ("gfx942", 2): Tile(rows=64, columns=128, width=64, warps=8, stages=2),
        ("sm_80", 4): Tile(rows=32, columns=32, width=32, warps=4, stages=2),
        ("gfx942", 4): Tile(rows=32, columns=32, width=32, warps=4, stages=2),
    },
    "token_margin_forward_wide": {
        ("sm_80", 2): Tile(rows=32, columns=256, width=64, warps=8, stages=2),
        ("sm_100", 2): Tile(rows=32, columns=256, width=32, warps=8, stages=3),
        ("gfx942", 2): Tile(rows=32, columns=256, width=64, warps=8, stages=2),
        ("sm_80", 4): Tile(rows=16, columns=256, width=32, warps=8, stages=2),
        ("sm_100", 4): Tile(rows=16, columns=256, width=16, warps=8, stages=2),
        ("gfx942", 4): Tile(rows=16, columns=256, width=32, warps=8, stages=2),
    },
    "cosine_backward": {
        ("sm_90", 2): Tile(rows=64, columns=128, width=128, warps=8, stages=2, source=H100),
        ("sm_80", 2): Tile(rows=64, columns=128, width=64, warps=8, stages=2),
        ("sm_120", 2): Tile(rows=64, columns=64, width=64, warps=8, stages=2),
        ("gfx942", 2): Tile(rows=32, columns=128, width=64, warps=4, stages=1),
        ("sm_80", 4): Tile(rows=32, columns=64, width=64, warps=8, stages=1),
        ("gfx942", 4): Tile(rows=32, columns=64, width=32, warps=4, stages=2),
    },
    "gaussian_potential_pairs": {
        ("sm_90", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=3, source=H100),
        ("sm_80", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=2),
        ("sm_100", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=3),
        ("gfx942", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=2),
        ("sm_80", 4): Tile(rows=64, columns=64, width=32, warps=8, stages=2),
        ("gfx942", 4): Tile(rows=64, columns=64, width=32, warps=8, stages=2),
    },
    "max_cosine": {
        ("sm_90", 2): Tile(rows=128, columns=128, width=64, warps=4, stages=3, source=H100),
        ("sm_80", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=3),
        ("gfx942", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=2),
        ("sm_80", 4): Tile(rows=64, columns=64, width=32, warps=8, stages=2),
        ("gfx942", 4): Tile(rows=64, columns=64, width=32, warps=8, stages=2),
    },
    "nearest_centroid": {
        ("sm_90", 2): Tile(rows=128, columns=256, width=64, warps=8, stages=3, source=H100),
        ("sm_80", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=3),
        ("gfx942", 2): Tile(rows=128, columns=128, width=64, warps=8, stages=2),
        ("sm_80", 4): Tile(rows=64, columns=64, width=32, warps=8, stages=2),
        ("gfx942", 4): Tile(rows=64, columns=64, width=32, warps=8, stages=2),
    },
    "code_regression": {
        ("sm_80", 4): Tile(rows=8, columns=1, width=256, warps=4, stages=2),
        ("gfx942", 4): Tile(rows=8, columns=1, width=256, warps=4, stages=2),
    },
}
"""By kernel, then by architecture and bytes of an operand of its products. The wide token-margin tile is for more than
`WIDE_VOCAB` centres a token."""


def tile(kernel: str, operand: torch.dtype, architecture: str) -> Tile:
    """The tile of ``kernel`` for products of ``operand`` on ``architecture`` ("sm_90", "gfx942").

    An architecture without a row of its own takes that of one whose tiles it shares: see `SHARES_TILES_OF`.
    """
    table, size = TILES[kernel], operand.itemsize
    for name in _lenders(architecture):
        if (name, size) in table:
            return table[name, size]
    raise KeyError(f"{kernel} has no tile for operands of {size} bytes")


def _lenders(architecture: str) -> Iterator[str]:
    """``architecture``, and those whose tiles it takes where it has none, the nearest first."""
    yield architecture
    smallest = SMALLEST_AMD if architecture.startswith("gfx") else SMALLEST_NVIDIA
    while architecture not in LAST:
        architecture = SHARES_TILES_OF.get(architecture, smallest)
        yield architecture


FUSED_POTENTIAL = {
    "sm_80": {
        384: Tile(rows=64, columns=64, width=128, warps=8, stages=2),
        512: Tile(rows=64, columns=32, width=128, warps=8, stages=2),
        1024: Tile(rows=32, columns=32, width=128, warps=8, stages=1),
    },
    "sm_90": {
        256: Tile(rows=128, columns=64, width=128, warps=8, stages=2),
        512: Tile(rows=64, columns=64, width=256, warps=8, stages=2, source=H100),
    },
    "sm_100": {384: Tile(rows=128, columns=32, width=128, warps=8, stages=2)},
}
"""By architecture, then by the largest d that a tile holds: rows x d of float32 beside the rows and columns."""


def fused_potential_tile(operand: torch.dtype, width: int, architecture: str) -> Tile | None:
    """The tile of `gaussian_potential_fused` for rows of ``width``; None where the design in blocks is the faster one.

    So it is for widths that no tile holds without spills or with 32 columns, or that its chunks do not divide, for an
    architecture without a row of its own, and for float32 and float16, whose terms are float32.
    """
    if operand != torch.bfloat16:
        return None
    tiles = FUSED_POTENTIAL.get(architecture, {})
    held = next((tiles[most] for most in sorted(tiles) if width <= most), None)
    return held if held is not None and width % held.width == 0 else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a CUDA or ROCm device runs side by side; 1 for a CPU, where kernels are interpreted."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a CUDA or ROCm device's architecture; for a CPU, where kernels are interpreted, the default."""
    if device.type == "cpu":
        return INTERPRETED
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
