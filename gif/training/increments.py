"""Checkpoints of a table too large to be copied each time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gif.distributed import gather_objects, rank
from gif.errors import DamagedFileError
from gif.files import Blocks, check_file, locate_tensor, map_tensor, remove_temporaries, save_tensors
from gif.head import TablePart
from gif.vectors.store import ROWS_A_BLOCK

FORMAT = "gif.table_journal/1"
_NAME = re.compile(r"\d{9}-(?P<what>all|rows)(?:-(?P<begin>\d{12}))?\.safetensors")  # where a part's rows begin


class TableIncrements:
    """One whole copy of a table in ``folder``, then the rows that changed between one save and the next.

    When the rows written since the last whole copy would be as many as the table has, it is copied whole again. So all
    that is written is at most twice the rows that changed and one copy; and the files of one state hold fewer than two
    tables. A step changes rows of its batch alone: at 64M x 512 in bfloat16 (66 GB) and 3,072 rows a step, 1,000 steps
    are at most 3 GB.

    A table may be divided among processes, each of which writes its own rows, and reads those of its own out of all
    that were written: by another number of processes too. Of a whole table the first process writes.

    Args:
        folder: of the files, made when the first is written.
        table: (m, ...), changed in place by training and by `load`; or the part of one that is this process's.

    Whoever changes rows sets ``changed`` (m,) bool there, of the rows that are here, on the table's device.
    """

    def __init__(self, folder: Path, table: Tensor | TablePart) -> None:
        part = table if isinstance(table, TablePart) else TablePart(table, 0, len(table))
        self._table, self._begin, self._total = part
        self._whole = self._total == len(self._table)
        self.changed = torch.zeros(len(self._table), dtype=torch.bool, device=self._table.device)
        self._folder = folder
        self._files: list[str] = []
        self._rows = 0  # in self._files after the whole copy

    def save(self, step: int) -> list[str]:
        """Write what changed since the last save or load; returns the files whose order gives the table as it is.

        All processes call it; of a divided table it returns the files of all.
        """
        rows = self.changed.nonzero()[:, 0]
        writes = not self._whole or rank() == 0
        ending = "" if self._whole else f"-{self._begin:012d}"
        if writes and (not self._files or self._rows + len(rows) >= len(self._table)):
            self._files, self._rows = [f"{step:09d}-all{ending}.safetensors"], 0
            self._write(self._files[-1], None)
        elif writes and len(rows):
            self._files.append(f"{step:09d}-rows{ending}.safetensors")
            self._rows += len(rows)
            self._write(self._files[-1], rows.cpu())
        self.changed.zero_()
        return list(self._files) if self._whole else [name for names in gather_objects(self._files) for name in names]

    def check(self, files: Sequence[str]) -> None:
        """Raise FileNotFoundError or DamagedFileError unless ``files`` are whole and of this table; changes nothing."""
        if not files:
            raise DamagedFileError(f"a checkpoint names no files of the table in {self._folder}")
        ends: dict[int, int] = {}  # of the rows of each part, by where they begin
        for name in files:
            path, found = self._folder / name, _NAME.fullmatch(name)
            if not found:
                raise DamagedFileError(f"a checkpoint names {name!r} as a file of the table in {self._folder}")
            check_file(path)
            where, begin = locate_tensor(path, "table", format=FORMAT), int(found["begin"] or 0)
            if found["what"] == "all":
                ends[begin] = begin + where.shape[0]
            rows = torch.arange(begin, ends[begin]) if found["what"] == "all" else _rows_in(path)
            fits = where.shape == (len(rows), *self._table.shape[1:]) and where.dtype == self._table.dtype
            end = min(ends.get(begin, 0), self._total)
            if not fits or (len(rows) and not begin <= int(rows.min()) <= int(rows.max()) < end):
                raise DamagedFileError(f"{path} is of another table than one of {self._shape}")
        if sum(end - begin for begin, end in ends.items()) != self._total:
            raise DamagedFileError(f"the files of a checkpoint in {self._folder} are not all of {self._shape}")

    def load(self, files: Iterable[str]) -> None:
        """Make the table what it was when `save` returned ``files``."""
        self._files, self._rows = [], 0
        for name in files:
            path, found = self._folder / name, _NAME.fullmatch(name)
            assert found is not None  # `check` has seen it
            values, begin = map_tensor(path, "table", format=FORMAT), int(found["begin"] or 0)
            everything = found["what"] == "all"
            if begin == self._begin and (self._files or (everything and len(values) == len(self._table))):
                self._rows = 0 if everything else self._rows + len(values)
                self._files.append(name)
            for block in torch.arange(len(values)).split(ROWS_A_BLOCK):
                rows = (block + begin if everything else _rows_in(path)[block]) - self._begin
                own = (rows >= 0) & (rows < len(self._table))
                self._table[rows[own].to(self._table.device)] = values[block[own]].to(self._table.device)
        self.changed.zero_()

    def remove_others(self, files: Iterable[str]) -> None:
        """Delete every file of the table but these, and what killed processes left of any."""
        for path in set(self._folder.glob("*.safetensors")) - {self._folder / name for name in files}:
            path.unlink()
        remove_temporaries(self._folder, held=True)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self._total, *self._table.shape[1:])

    def _write(self, name: str, rows: Tensor | None) -> None:
        """Write some own rows of the table, or all, block by block: no copy of it is made in memory."""
        count = len(self._table) if rows is None else len(rows)
        blocks = (slice(begin, begin + ROWS_A_BLOCK) for begin in range(0, count, ROWS_A_BLOCK))
        parts = (self._table[self._place(rows, block)] for block in blocks)
        tensors: dict[str, Tensor | Blocks] = {} if rows is None else {"rows": rows + self._begin}
        tensors["table"] = Blocks((count, *self._table.shape[1:]), self._table.dtype, parts)
        save_tensors(self._folder / name, tensors, format=FORMAT)

    def _place(self, rows: Tensor | None, block: slice) -> slice | Tensor:
        """Return the index at which the rows of a block lie in the table."""
        return block if rows is None else rows[block].to(self._table.device)


def _rows_in(path: Path) -> Tensor:
    """Which rows of the whole table a file has, (n,) int64, mapped."""
    return map_tensor(path, "rows", format=FORMAT)
