"""Code vectors that the processes of a group divide among them: no process holds the table."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gif.data.identities import Identities, check_count
from gif.distributed import first_decides, gather_objects, rank, sum_over_processes, wait_for_all, world_size
from gif.errors import InputError
from gif.files import allocate_tensors, fsync, map_tensor, seal, writing
from gif.vectors.store import FORMAT, CodeVectors, digest_rows


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

    def lookup(self, labels: Tensor) -> Tensor:
        """Rows of identities ``labels`` (C,), the same on every process, as (C, d) on their device.

        Each process gives its own rows and zeros for the others'; their sum, taken byte by byte, is exact.
        """
        rows, own = self._own(labels)
        found = torch.where(own[:, None], self.table[rows], 0)
        return sum_over_processes(found.view(torch.uint8)).view(found.dtype).to(labels.device)

    def save(self, path: str | Path) -> None:
        """Write the whole table to one file that every process can reach, each its own rows, atomically."""
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
        whole[self.begin : self.begin + len(self.table)] = self.table.cpu()
        wait_for_all()
        first_decides(finish)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from the vectors, as the processes divide them, and from whose they are."""
        digests = gather_objects(digest_rows(self.table))
        return self._digest("".join(digests))

    def _own(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of ``labels`` (C,) are in this process's table, and which of them (C,) it has at all."""
        rows = self._rows(labels) - self.begin
        own = (rows >= 0) & (rows < len(self.table))
        return torch.where(own, rows, 0), own

    def __len__(self) -> int:
        return self._m
