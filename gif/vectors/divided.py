"""Code vectors that the processes of a group divide among them: no process holds the table."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gif.data.identities import Identities, check_count
from gif.devices import to_device
from gif.distributed import first_decides, gather_objects, rank, sum_over_processes, wait_for_all, world_size
from gif.errors import InputError
from gif.files import allocate_tensors, fsync, map_tensor, seal, writing
from gif.vectors.rows import Rows
from gif.vectors.staging import Stage
from gif.vectors.store import FORMAT, ROWS_A_BLOCK, CodeVectors, digest_rows, unit_rows
from gif_kernels import vector_step_
from gif_kernels.runs import first_places


class DividedCodeVectors(CodeVectors):
    """Code vectors of m identities, of which this process holds the rows [begin, begin + k).

    The ranges of the processes follow each other in the order of the ranks. `lookup`, `move_`, `fingerprint` and `save`
    are done together: **every process calls them, with the same labels**, as those that train together have the same
    candidates. What they give is what one process with the whole table would have.

    Args:
        rows: (k, d) of this process, float32, bfloat16 or float16, of unit length.
        identities: whose all the vectors are, (m,), where that is known.

    ``table`` is ``rows``, the very tensor given.

    Raises ValueError where the processes' rows differ in width or dtype, a process has none, or there are not as many
    identities as rows in all.
    """

    def __init__(self, rows: Tensor, *, identities: Identities | None = None) -> None:
        super().__init__(rows, normalized=True)
        shapes = gather_objects((len(rows), self.width, str(rows.dtype)))
        if len({shape[1:] for shape in shapes}) > 1:
            raise InputError(f"the processes' rows are {shapes}, wanted one width and dtype")
        counts = [shape[0] for shape in shapes]
        self.begin, self._m = sum(counts[: rank()]), sum(counts)
        check_count("vectors", identities, self._m)
        self.identities = identities

    @classmethod
    def of(cls, vectors: CodeVectors) -> DividedCodeVectors:
        """``vectors`` divided evenly, where each process can read all of them: from a file, best memory-mapped.

        Each process's rows are copied into its memory, or stay where they are in a file that changes reach.

        Raises ValueError where there are fewer identities than processes.
        """
        m = len(vectors)
        if m < world_size():
            raise InputError(f"{world_size()} processes divide {m} code vectors; start at most one process a vector")
        begin, end = (m * share // world_size() for share in (rank(), rank() + 1))
        rows = vectors.table[begin:end]
        divided = cls(rows if vectors.file else rows.clone(), identities=vectors.identities)
        divided.file = vectors.file
        return divided

    def with_table(self, table: Tensor) -> DividedCodeVectors:
        """The same rows in another ``table`` (k, d)."""
        return DividedCodeVectors(table, identities=self.identities)

    def lookup(self, labels: Tensor) -> Tensor:
        """Rows of identities ``labels`` (C,), the same on every process, as (C, d) on their device."""
        self.settle()
        rows, own = self._own(labels)
        return _together(torch.where(own[:, None], self.table[rows], 0)).to(labels.device)

    def move_(self, labels: Tensor, gradient: Tensor, lr: float, *, seed: int | Tensor = 0) -> Tensor:
        """`CodeVectors.move_`, of the same ``labels`` (C,) and ``gradient`` (C, d) on every process."""
        return self.rows(labels, self.table.device).move_(gradient.to(self.table.device), lr, seed)

    def rows(self, identities: Tensor, device: torch.device) -> Rows:
        """`CodeVectors.rows`, of the same identities on every process."""
        rows, own = self._own(identities)
        if self.table.device.type == device.type and not self._mapped:
            return _RowsOfAll(identities.to(device), _OwnInPlace(self, rows, own))
        return _RowsOfAll(to_device(identities, device), _OwnStaged(self.stage_on(device), rows, own))

    def save(self, path: str | Path) -> None:
        """Write the directions to one file that every process can reach, each its own rows, atomically."""
        self.settle()
        working = Path(path).with_name(f"{Path(path).name}.partial")
        who = self.identities
        names, metadata = ({}, {}) if who is None else (who.tensors(), who.metadata())
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in names.items()}
        layout["vectors"] = ((len(self), self.width), self.table.dtype)

        def make() -> None:
            allocate_tensors(working, layout, format=FORMAT, **metadata)
            for name, tensor in names.items():
                map_tensor(working, name, format=FORMAT, writable=True).copy_(tensor)

        def finish() -> None:
            seal(working)
            with writing(path):
                working.replace(path)
                fsync(Path(path).parent)

        first_decides(make)
        whole = map_tensor(working, "vectors", format=FORMAT, writable=True)
        for done in range(0, len(self.table), ROWS_A_BLOCK):
            units = unit_rows(self.table[done : done + ROWS_A_BLOCK])
            whole[self.begin + done : self.begin + done + len(units)] = units.cpu()
        wait_for_all()
        first_decides(finish)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from the vectors, as the processes divide them, and from whose they are."""
        self.settle()
        digests = gather_objects(digest_rows(self.table))
        return self._digest("".join(digests))

    def _own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of ``labels`` (C,) are in this process's table, and which of them (C,) it has at all."""
        rows = self._rows(labels) - self.begin
        own = (rows >= 0) & (rows < len(self.table))
        return torch.where(own, rows, 0), own

    def __len__(self) -> int:
        return self._m


class _Own(Protocol):
    """What a process has of the rows (C, d) that all look up."""

    def values(self) -> Tensor:
        """Its rows (C, d) where the step is, and zeros for the others'."""

    def put(self, moved: Tensor, first: Tensor) -> None:
        """Take its rows out of ``moved`` (C, d), in which those that stand for the ``first`` time (C,) bool count."""

    def mark(self, moved: Tensor) -> None:
        """Set ``moved`` (k,) bool for its rows."""


class _OwnInPlace:
    """In a table that is where the step is: ``rows`` (C,) of it, which count where they are its ``own`` (C,)."""

    def __init__(self, vectors: DividedCodeVectors, rows: Tensor, own: Tensor) -> None:
        self._vectors, self._rows, self._is_own = vectors, rows, own

    def values(self) -> Tensor:
        return torch.where(self._is_own[:, None], self._vectors.table[self._rows], 0)

    def put(self, moved: Tensor, first: Tensor) -> None:
        # No host waits for how many there are: all others write what one of these writes too, or what is there.
        table, counts = self._vectors.table, self._is_own & first
        one = counts.int().argmax()
        rows = torch.where(counts, self._rows, self._rows[one])
        table[rows] = torch.where(counts[:, None], moved, torch.where(counts.any(), moved[one], table[rows[one]]))

    def mark(self, moved: Tensor) -> None:
        one = self._is_own.int().argmax()
        rows = torch.where(self._is_own, self._rows, self._rows[one])
        moved[rows] |= self._is_own.any()


class _OwnStaged:
    """On the host or in a file: the distinct rows are staged."""

    def __init__(self, stage: Stage, rows: Tensor, own: Tensor) -> None:
        places = own.nonzero()[:, 0]
        distinct, of_distinct = rows[places].unique(return_inverse=True)
        first = torch.full_like(distinct, len(rows)).scatter_reduce_(0, of_distinct, places, "amin")
        self._count, self._staged = len(rows), stage.stage(distinct)
        device = stage.device
        self._places, self._of_distinct, self._first = (to_device(x, device) for x in (places, of_distinct, first))

    def values(self) -> Tensor:
        own = self._staged.values()
        found = own.new_zeros(self._count, own.shape[1])
        found[self._places] = own[self._of_distinct]
        return found

    def put(self, moved: Tensor, first: Tensor) -> None:
        self._staged.give_back(moved[self._first])

    def mark(self, moved: Tensor) -> None:
        moved.index_fill_(0, self._staged.rows, True)


class _RowsOfAll:
    """`Rows` of which each process has its own: their sum is what all work on, and each keeps what is its."""

    def __init__(self, identities: Tensor, own: _Own) -> None:
        self._identities, self._of_own = identities, own

    @cached_property
    def values(self) -> Tensor:
        """The rows of all processes (C, d); the first to ask must be all of them."""
        return _together(self._of_own.values())

    def move_(self, gradient: Tensor, lr: float, seed: int | Tensor) -> Tensor:
        """Every process makes the whole step, and keeps its own rows of it."""
        moved, first = self.values.clone(), first_places(self._identities)
        stayed = vector_step_(moved, first, gradient, lr=lr, seed=seed, row_ids=self._identities)
        self._of_own.put(moved, first == torch.arange(len(first), device=first.device))
        return stayed

    def mark(self, moved: Tensor) -> None:
        """Set ``moved`` (k,) bool for the rows that are this process's."""
        self._of_own.mark(moved)


def _together(own: Tensor) -> Tensor:
    """Rows (C, d) of which each process has its own, and zeros else: byte by byte, so that their sum is exact."""
    return sum_over_processes(own.contiguous().view(torch.uint8)).view(own.dtype)
