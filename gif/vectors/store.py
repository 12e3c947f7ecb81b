"""The table of code vectors h_y: one unit vector an identity, in memory or memory-mapped from disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from gif.data.identities import Identities, check_count
from gif.errors import InputError
from gif.files import Blocks, check_mapped, is_mapped, load_tensors, locate_tensor, map_tensor, save_tensors
from gif.spacing import evenly_spaced
from gif.vectors.rows import Rows, RowsInPlace, StagedRows
from gif.vectors.staging import Stage
from gif_kernels import checks, vector_step_

FORMAT = "gif.code_vectors/1"
ROWS_A_BLOCK = 1 << 18  # of a table, that are looked at together
_UNIT = 1e-6  # how far from 1 the norm of a unit row may be in float32, by its coordinates' rounding and by its own
_NORMALISED_ROWS = 1 << 14  # together: a few times that is held beside them
_DIGEST_BYTES = 1 << 28  # a table up to this is digested whole
_DIGEST_ROWS = 1 << 13  # and of a larger one so many rows


class CodeVectors:
    """Code vectors of m identities (METHOD: h_y): directions, of unit length until they move.

    Steps (`move_`) turn a row and make it longer, and the longer it is the less it turns; files hold unit rows.

    Args:
        table: (m, d) float32, bfloat16 or float16. Rows are normalised in place, unless ``normalized`` says they are.
        normalized: the rows already have unit length.
        identities: whose they are, where that is known; kept in files.

    ``table`` stays the very tensor given, where its dtype and layout allow: no second copy of a large table is made.
    ``file`` is where in-place changes of the table go by themselves: None but for a writable memory map.

    Raises ValueError if the table is not (m, d), holds NaN or infinity, has a row of zeros, or there are not as many
    identities.
    """

    def __init__(self, table: Tensor, *, normalized: bool = False, identities: Identities | None = None) -> None:
        if table.ndim != 2 or min(table.shape) < 1 or not table.is_floating_point():
            raise InputError(f"vectors must be (m, d) floating point, got {tuple(table.shape)} {table.dtype}")
        check_count("vectors", identities, len(table))
        self.table = table.detach()
        self._mapped = is_mapped(self.table)
        self.identities = identities
        self.file: Path | None = None
        self._stage: Stage | None = None
        if not normalized:
            for rows in self.table.split(_NORMALISED_ROWS):
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
            tensors, metadata = load_tensors(path, format=FORMAT)
            if "vectors" not in tensors:
                raise InputError(f"{path} has no tensor named vectors; it has {sorted(tensors)}")
            identities = Identities.read(path, tensors, metadata)
            return cls(tensors["vectors"], normalized=True, identities=identities)
        table = map_tensor(path, "vectors", format=FORMAT, writable=writable)
        identities = Identities.map(path, locate_tensor(path, "vectors", format=FORMAT).metadata, format=FORMAT)
        vectors = cls(table, normalized=True, identities=identities)
        vectors.file = Path(path) if writable else None
        return vectors

    def with_table(self, table: Tensor) -> CodeVectors:
        """The same code vectors in another ``table`` (m, d), such as a copy on a device; nothing is checked again."""
        return CodeVectors(table, normalized=True, identities=self.identities)

    def part(self, begin: int, end: int) -> CodeVectors:
        """Rows [begin, end), sharing the table's memory: what one of several processes works on."""
        self.settle()
        rows = CodeVectors(self.table[begin:end], normalized=True)
        rows.file = self.file
        return rows

    def save(self, path: str | Path) -> None:
        """Write the directions, and whose they are where that is known, as safetensors, atomically."""
        self.settle()
        who = self.identities
        names, metadata = ({}, {}) if who is None else (who.tensors(), who.metadata())
        units = Blocks(tuple(self.table.shape), self.table.dtype, map(unit_rows, self.table.split(_NORMALISED_ROWS)))
        save_tensors(path, {"vectors": units, **names}, format=FORMAT, **metadata)

    def lookup(self, labels: Tensor) -> Tensor:
        """Rows of identities ``labels`` (B,), of any integer dtype, as (B, d) on their device, in the table's dtype.

        Raises TypeError for labels that are not integers, ValueError for another shape or a label outside [0, m). Only
        the rows asked for are read or moved.
        """
        self.settle()
        rows = self._rows(labels)
        check_mapped(self.table)
        return self.table.index_select(0, rows).to(labels.device)  # faster on a CPU than table[rows]

    def rows(self, identities: Tensor, device: torch.device) -> Rows:
        """The rows of ``identities`` (C,) int64 for a step on ``device``, which may move them.

        They are read where the table is on ``device`` and in memory; else a thread reads them, and what is asked for
        while a step runs is there when the next one begins: the same bits as if that one had waited for it. Raises
        ValueError for an identity outside [0, m).
        """
        if self.table.device.type == device.type and not self._mapped:
            return RowsInPlace(self, identities.to(device))
        return StagedRows.ask(self.stage_on(device), self._rows(identities))

    def stage_on(self, device: torch.device) -> Stage:
        """What brings rows of a table on the host to ``device``."""
        if self._stage is None or self._stage.device != device:
            self.settle()
            self._stage = Stage(self.table, device, mapped=self._mapped)
        return self._stage

    def settle(self) -> None:
        """Return when the table holds all rows that steps have moved; raise what writing one has raised."""
        if self._stage is not None:
            self._stage.settle()

    def move_(self, labels: Tensor, gradient: Tensor, lr: float, *, seed: int | Tensor = 0) -> Tensor:
        """One step for the rows of ``labels`` (C,), in place: h <- h - lr g (`gif_kernels.vector_step_`).

        ``gradient`` (C, d) belongs to the labels row by row; an identity named more than once takes the sum of its
        gradients. A row whose step is not finite stays as it is: one overflow upstream must not outlive the step it
        spoils. A low-precision table is rounded stochastically, so that small steps survive on average; give a new
        ``seed`` in each step, a number or () int64, which no host reads where it is on the table's device.

        Returns how many rows stayed, () int64 on the table's device. Raises TypeError for labels that are not integers,
        ValueError for another shape or a label outside [0, m).
        """
        self.settle()
        rows = self._rows(labels)
        check_mapped(self.table)
        seed = seed.to(self.table.device) if isinstance(seed, Tensor) else seed
        return vector_step_(self.table, rows, gradient.to(self.table.device), lr=lr, seed=seed)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from the vectors as they are now, and from whose they are.

        They follow from all rows of a table up to 256 MiB, and from 8,192 rows at equal distances of a larger one.
        """
        self.settle()
        return self._digest(digest_rows(self.table))

    def _digest(self, of_rows: str) -> str:
        names = self.identities.names.fingerprint if self.identities is not None else ""
        return hashlib.sha256(f"{of_rows} {names}".encode()).hexdigest()[:16]

    @property
    def width(self) -> int:
        """d, the width of a vector."""
        return self.table.shape[1]

    def _rows(self, labels: Tensor) -> Tensor:
        """The labels (B,) as rows of the table, int64 on its device."""
        every, hint = torch.iinfo(torch.int64), "this table was made for other identities"
        rows = checks.integer("labels", labels, ("B",), low=every.min, high=every.max, hint=hint, asserted=False)
        rows = rows.to(self.table.device)
        checks.within("labels", rows, len(self), hint)
        return rows

    def __len__(self) -> int:
        return self.table.shape[0]

    def __repr__(self) -> str:
        return f"CodeVectors({len(self)} x {self.width}, {self.table.dtype}, {self.table.device})"


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (k, d) at unit length; those that have it already, within the rounding of their dtype, as they are."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32)
    moved = (norm - 1).abs() > max(torch.finfo(rows.dtype).eps, _UNIT)
    return torch.where(moved, (rows / norm).to(rows.dtype), rows)


def digest_rows(table: Tensor) -> str:
    """16 hexadecimal digits that follow from a ``table`` (m, d), as in `CodeVectors.fingerprint`."""
    digest = hashlib.sha256(f"{tuple(table.shape)} {table.dtype}".encode())
    rows = table
    if table.nbytes > _DIGEST_BYTES and len(table) > _DIGEST_ROWS:
        rows = table[torch.tensor(evenly_spaced(len(table), _DIGEST_ROWS), device=table.device)]
    digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
