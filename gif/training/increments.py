"""Checkpoints of a table too large to be copied each time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gif.errors import DamagedFileError
from gif.files import Blocks, check_file, locate_tensor, map_tensor, remove_temporaries, save_tensors

FORMAT = "gif.table_journal/1"
_ROWS_A_BLOCK = 1 << 18


class TableIncrements:
    """One whole copy of a table in ``folder``, then the rows that changed between one save and the next.

    When the rows written since the last whole copy would be as many as the table has, it is copied whole again. So all
    that is written is at most twice the rows that changed and one copy; and the files of one state hold fewer than two
    tables. A step changes rows of its batch alone: at 64M x 512 in bfloat16 (66 GB) and 3,072 rows a step, 1,000 steps
    are at most 3 GB.

    Args:
        folder: of the files, made when the first is written.
        table: (m, ...), changed in place by training and by `load`.

    Whoever changes rows sets ``changed`` (m,) bool there, on the table's device.
    """

    def __init__(self, folder: Path, table: Tensor) -> None:
        self.changed = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        self._folder = folder
        self._table = table
        self._files: list[str] = []
        self._rows = 0  # in self._files after the whole copy

    def save(self, step: int) -> list[str]:
        """Write what changed since the last save or load; returns the files whose order gives the table as it is."""
        rows = self.changed.nonzero()[:, 0]
        if not self._files or self._rows + len(rows) >= len(self._table):
            self._files, self._rows = [f"{step:09d}-all.safetensors"], 0
            self._write(self._files[-1], None)
        elif len(rows):
            self._files.append(f"{step:09d}-rows.safetensors")
            self._rows += len(rows)
            self._write(self._files[-1], rows.cpu())
        self.changed.zero_()
        return list(self._files)

    def check(self, files: Sequence[str]) -> None:
        """Raise FileNotFoundError or DamagedFileError unless ``files`` are whole and of this table; changes nothing."""
        if not files:
            raise DamagedFileError(f"a checkpoint names no files of the table in {self._folder}")
        for number, name in enumerate(files):
            path = self._folder / name
            if not re.fullmatch(r"\d{9}-(all|rows)\.safetensors", name):
                raise DamagedFileError(f"a checkpoint names {name!r} as a file of the table in {self._folder}")
            check_file(path)
            where = locate_tensor(path, "table", format=FORMAT)
            rows = torch.arange(len(self._table)) if number == 0 else map_tensor(path, "rows", format=FORMAT)
            fits = where.shape == (len(rows), *self._table.shape[1:]) and where.dtype == self._table.dtype
            if not fits or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self._table)):
                raise DamagedFileError(f"{path} is of another table than one of {tuple(self._table.shape)}")

    def load(self, files: Iterable[str]) -> None:
        """Make the table what it was when `save` returned ``files``."""
        self._files, self._rows = list(files), 0
        for name in self._files:
            path = self._folder / name
            values = map_tensor(path, "table", format=FORMAT)
            rows = None if name == self._files[0] else map_tensor(path, "rows", format=FORMAT)
            self._rows += 0 if rows is None else len(rows)
            for begin in range(0, len(values), _ROWS_A_BLOCK):
                block = slice(begin, begin + _ROWS_A_BLOCK)
                self._table[self._place(rows, block)] = values[block].to(self._table.device)
        self.changed.zero_()

    def remove_others(self, files: Iterable[str]) -> None:
        """Delete every file of the table but these, and what killed processes left of any."""
        for path in set(self._folder.glob("*.safetensors")) - {self._folder / name for name in files}:
            path.unlink()
        remove_temporaries(self._folder, held=True)

    def _write(self, name: str, rows: Tensor | None) -> None:
        """Write some rows of the table, or all, block by block: no copy of it is made in memory."""
        count = len(self._table) if rows is None else len(rows)
        blocks = (slice(begin, begin + _ROWS_A_BLOCK) for begin in range(0, count, _ROWS_A_BLOCK))
        parts = (self._table[self._place(rows, block)] for block in blocks)
        tensors: dict[str, Tensor | Blocks] = {} if rows is None else {"rows": rows}
        tensors["table"] = Blocks((count, *self._table.shape[1:]), self._table.dtype, parts)
        save_tensors(self._folder / name, tensors, format=FORMAT)

    def _place(self, rows: Tensor | None, block: slice) -> slice | Tensor:
        """Return the index at which the rows of a block lie in the table."""
        return block if rows is None else rows[block].to(self._table.device)
