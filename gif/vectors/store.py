"""The table of code vectors h_y: one unit vector an identity, in memory or memory-mapped from disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gif.errors import InputError
from gif.files import check_mapped, load_tensors, map_tensor, save_tensors
from gif_kernels.rounding import stochastic_round

FORMAT = "gif.code_vectors/1"
_ROWS_A_BLOCK = 1 << 18


class CodeVectors:
    """Code vectors of m identities, each of unit length (METHOD: h_y).

    Args:
        table: (m, d) float32, bfloat16 or float16. Rows are normalised in place, unless ``normalized`` says they are.
        normalized: the rows already have unit length.

    ``table`` stays the very tensor given, where its dtype and layout allow: no second copy of a large table is made.
    ``file`` is where in-place changes of the table go by themselves: None but for a writable memory map.

    Raises ValueError if the table is not (m, d), holds NaN or infinity, or has a row of zeros.
    """

    def __init__(self, table: Tensor, *, normalized: bool = False) -> None:
        if table.ndim != 2 or min(table.shape) < 1 or not table.is_floating_point():
            raise InputError(f"vectors must be (m, d) floating point, got {tuple(table.shape)} {table.dtype}")
        self.table = table.detach()
        self.file: Path | None = None
        if not normalized:
            for rows in self.table.split(_ROWS_A_BLOCK):
                norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
                if not bool(norm.isfinite().all()):
                    raise InputError("vectors hold NaN or infinity; check the encoder and the images it was given")
                if bool((norm == 0).any()):
                    raise InputError("a vector is all zeros and has no direction; drop that identity or its images")
                rows.copy_(rows / norm.to(torch.promote_types(rows.dtype, torch.float32)))

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False, writable: bool = False) -> CodeVectors:
        """Read a table from ``path``.

        ``mmap`` leaves it on disk and reads the rows that are asked for. ``writable`` (with ``mmap``) lets in-place
        updates reach the file; otherwise they stay private to this process.

        Raises FileNotFoundError, or ValueError if the file is truncated, damaged or of another kind.
        """
        if not mmap:
            tensors, _ = load_tensors(path, format=FORMAT)
            if "vectors" not in tensors:
                raise InputError(f"{path} has no tensor named vectors; it has {sorted(tensors)}")
            return cls(tensors["vectors"], normalized=True)
        vectors = cls(map_tensor(path, "vectors", format=FORMAT, writable=writable), normalized=True)
        vectors.file = Path(path) if writable else None
        return vectors

    def part(self, begin: int, end: int) -> CodeVectors:
        """Rows [begin, end), sharing the table's memory: what one of several processes works on."""
        rows = CodeVectors(self.table[begin:end], normalized=True)
        rows.file = self.file
        return rows

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, atomically."""
        save_tensors(path, {"vectors": self.table}, format=FORMAT)

    def lookup(self, labels: Tensor) -> Tensor:
        """Rows of identities ``labels`` (B,) as (B, d), on the labels' device, in the table's dtype.

        Raises ValueError for a label outside [0, m). Only the rows asked for are read or moved.
        """
        self._check(labels)
        check_mapped(self.table)
        return self.table[labels.to(self.table.device)].to(labels.device)

    @torch.no_grad()
    def move_(self, labels: Tensor, gradient: Tensor, lr: float, *, seed: int = 0) -> None:
        """One step for the rows of ``labels`` (C,), in place: h <- normalise(h - lr g).

        ``gradient`` (C, d) belongs to the labels row by row; an identity named more than once takes the sum of its
        gradients. A low-precision table is rounded stochastically, so that small steps survive on average; give a new
        ``seed`` in each step.

        Raises ValueError for a label outside [0, m).
        """
        self._check(labels)
        check_mapped(self.table)
        rows, place = labels.to(self.table.device).unique(return_inverse=True)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        step = torch.zeros(len(rows), self.width, dtype=dtype, device=self.table.device)
        step.index_add_(0, place, gradient.to(step))
        moved = torch.nn.functional.normalize(self.table[rows].to(dtype).add_(step, alpha=-lr), dim=1)
        self.table[rows] = stochastic_round(moved, self.table.dtype, rows, seed)

    @property
    def width(self) -> int:
        """d, the width of a vector."""
        return self.table.shape[1]

    def _check(self, labels: Tensor) -> None:
        if len(labels):
            low, high = (int(x) for x in torch.aminmax(labels))
            if low < 0 or high >= len(self):
                raise InputError(
                    f"labels must lie in [0, {len(self)}), got [{low}, {high}]; "
                    "this table was made for other identities"
                )

    def __len__(self) -> int:
        return self.table.shape[0]

    def __repr__(self) -> str:
        return f"CodeVectors({len(self)} x {self.width}, {self.table.dtype}, {self.table.device})"
