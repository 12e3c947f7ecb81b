"""How much is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_FLOATS = 1 << 22  # rows gathered at a time on a CPU, in floats: 16 MiB, which the C library keeps and reuses
DEVICE_BLOCKS = 32  # gathered at once on an accelerator, where an operation takes longer to start than to do a block


def blocks_at_once(device: torch.device) -> int:
    """How many blocks make one on ``device``. What is computed does not depend on it, but for the order of sums."""
    return 1 if device.type == "cpu" else DEVICE_BLOCKS


def block_floats(device: torch.device | None = None) -> int:
    """How many floats are worked on at a time on ``device``; by default a CPU's, for what must not depend on it."""
    return BLOCK_FLOATS if device is None else BLOCK_FLOATS * blocks_at_once(device)


def column_blocks(mask: Tensor) -> Iterator[slice]:
    """Slices of the columns of ``mask`` (g, M) that hold about a block of entries."""
    step = max(1, block_floats(mask.device) // max(1, len(mask)))
    return (slice(begin, begin + step) for begin in range(0, mask.shape[1], step))


def take(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (...) of ``table`` (m, d), wherever that is, as (..., d) float32 where the index is."""
    rows = table.index_select(0, index.flatten().to(table.device))
    return rows.view(*index.shape, table.shape[1]).to(index.device).float()
