"""Vectors as encoders make them of identities: clusters within clusters, of uneven sizes, and noise around them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gif.files import allocate_tensors, map_tensor
from gif.vectors.store import FORMAT
from gif_kernels.sphere import unit

BRANCHES = 20
SCALES = (1.0, 0.8, 0.7)
"""Length of the offsets of a cluster's children, level by level."""
NOISE = 0.8
ROWS_A_BLOCK = 1 << 20


def clustered_blocks(m: int, d: int, seed: int = 0) -> Iterator[Tensor]:
    """Unit rows (m, d) float32 in three levels of clusters, a block at a time."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.rand(BRANCHES, generator=generator) + 0.3 for _ in SCALES]
    offsets = [
        scale * unit(torch.randn(BRANCHES**depth, d, generator=generator)) for depth, scale in enumerate(SCALES, 1)
    ]
    for start in range(0, m, ROWS_A_BLOCK):
        n = min(ROWS_A_BLOCK, m - start)
        rows, node = torch.zeros(n, d), torch.zeros(n, dtype=torch.int64)
        for weight, offset in zip(weights, offsets, strict=True):
            node = BRANCHES * node + torch.multinomial(weight, n, replacement=True, generator=generator)
            rows += offset[node]
        yield unit(rows + NOISE * unit(torch.randn(n, d, generator=generator)))


def clustered(m: int, d: int, seed: int = 0) -> Tensor:
    """The rows of `clustered_blocks` (m, d), in memory."""
    return torch.cat(list(clustered_blocks(m, d, seed)))


def write_clustered(path: Path, m: int, d: int, seed: int = 0) -> None:
    """Write the rows of `clustered_blocks` as float16 code vectors, without holding them in memory."""
    unfinished = path.with_suffix(".unfinished")
    allocate_tensors(unfinished, {"vectors": ((m, d), torch.float16)}, format=FORMAT)
    table = map_tensor(unfinished, "vectors", format=FORMAT, writable=True)
    for block, rows in zip(table.split(ROWS_A_BLOCK), clustered_blocks(m, d, seed), strict=True):
        block.copy_(rows)
    unfinished.rename(path)
