"""A table of vectors that is distributed over the processes, and how the rows of a step come together.

Each process holds some of the rows: all of them where it is the only one.

The subsets of an epoch share no row, so the processes step one each at the same time, and the result is that of one
process stepping them in turn, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gif.distributed import exchange_rows, gather_rows, rank, sum_over_processes, world_size
from gif.files import check_mapped
from gif.vectors.paging import read_at_random, read_in_order, read_soon


@dataclass(frozen=True)
class Round:
    """What one process does while each steps a subset: gives rows of its own away, and gets those of one subset.

    number: of the round, from 0 in the run. rows: (k,) int64, own rows that take part, in the order they are sent in:
    ``send[q]`` go to rank q. ``receive[q]`` come from rank q; the rows received stand at ``place`` (n,) of the subset.
    subset: its number, and n = 0 where there is none left for this process.
    """

    number: int
    rows: Tensor
    send: list[int]
    receive: list[int]
    place: Tensor
    subset: int


class DistributedTable:
    """A table of m rows, of which this process holds its ``own`` (k, d); those of all lie in the order of the ranks.

    ``device``: where rows are worked on. ``mapped``: the own rows are a memory map of a file.
    """

    def __init__(self, own: Tensor, device: torch.device, *, mapped: bool = False) -> None:
        self.own = own
        self.device = device
        self.mapped = mapped
        if mapped:
            read_at_random(own)
        counts = gather_rows(torch.tensor([[len(own)]], device=device)).flatten().cpu()
        self.bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.largest = int(counts.max())

    @property
    def m(self) -> int:
        """Rows of all processes."""
        return int(self.bounds[-1])

    @property
    def width(self) -> int:
        """d, the width of a row."""
        return self.own.shape[1]

    def sample(self, rows: Tensor) -> Tensor:
        """The vectors ``rows`` (n,), increasing, of all processes, (n, d), on each."""
        begin, end = self.bounds[rank()], self.bounds[rank() + 1]
        own = rows[(rows >= begin) & (rows < end)] - begin
        return gather_rows(self.take(own).to(self.device))

    def own_blocks(self, size: int) -> Iterator[Tensor]:
        """All own rows in order, (``size``, d) at a time, where they are worked on."""
        check_mapped(self.own)
        if self.mapped:
            read_in_order(self.own)
        for block in self.own.split(size):
            yield block.to(self.device)
        if self.mapped:
            read_at_random(self.own)

    def take(self, rows: Tensor) -> Tensor:
        """A copy of own ``rows`` (n,), read in the order of the table: on a disk, neighbours are near."""
        order = rows.argsort()
        check_mapped(self.own)
        if self.mapped:
            read_soon(self.own, rows[order])
        taken = self.own.new_empty(len(rows), self.own.shape[1])
        taken[order.to(self.own.device)] = self.own[rows[order].to(self.own.device)]
        return taken

    def put(self, rows: Tensor, vectors: Tensor) -> None:
        """Overwrite own ``rows`` (n,)."""
        order = rows.argsort()
        check_mapped(self.own)
        self.own[rows[order].to(self.own.device)] = vectors[order.to(vectors.device)].to(self.own.device)

    def rounds(self, subsets: Sequence[Tensor], first: int, skip: int) -> Iterator[Round]:
        """The rounds, numbered from ``first``, that step all ``subsets``, each (n,) rows of [0, m).

        The first ``skip`` of them are left out.
        """
        world, this = world_size(), rank()
        for i in range(skip, rounds_of(len(subsets))):
            mine, send = [], [0] * world
            receive, place = [0] * world, torch.empty(0, dtype=torch.int64)
            for q, subset in enumerate(subsets[i * world : (i + 1) * world]):
                owner = torch.bucketize(subset, self.bounds[1:], right=True)
                mine.append(subset[owner == this] - self.bounds[this])
                send[q] = len(mine[-1])
                if q == this:
                    place = owner.argsort(stable=True)
                    receive = owner.bincount(minlength=world).tolist()
            yield Round(first + i, torch.cat(mine), send, receive, place, i * world + this)

    def collect(self, round: Round, rows: Tensor) -> Tensor:
        """The vectors (n, d) of the round's subset, given the rows that this process sends."""
        received = exchange_rows(rows, round.send, round.receive)
        subset = torch.empty_like(received)
        subset[round.place.to(subset.device)] = received
        return subset

    def give_back(self, round: Round, subset: Tensor) -> Tensor:
        """The inverse of `collect`: the rows that this process has sent, as their subsets' steps left them."""
        return exchange_rows(subset[round.place.to(subset.device)], round.receive, round.send)

    def blocks(self, size: int, first: int, skip: int) -> Iterator[Round]:
        """All own rows, about ``size`` at a time: as many rounds on each process, in which nothing is exchanged."""
        parts = torch.arange(len(self.own)).tensor_split(self.number_of_blocks(size))
        for i, rows in islice(enumerate(parts), skip, None):
            yield Round(first + i, rows, [], [], torch.arange(len(rows)), i)

    def number_of_blocks(self, size: int) -> int:
        """How many `blocks` there are."""
        return -(-self.largest // size)

    def mean(self, sums: Tensor) -> Tensor:
        """Sums over own rows, as the mean over all rows; the same bits on each process."""
        return sum_over_processes(sums) / self.m


def rounds_of(subsets: int) -> int:
    """Rounds that it takes the processes to step ``subsets`` subsets."""
    return -(-subsets // world_size())


def prefetched(
    rounds: Iterable[Round],
    load: Callable[[Round], Tensor],
    device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
) -> Generator[tuple[Round, Tensor], None, None]:
    """Each round with what ``load`` makes of it on ``device``, in a thread that is one round ahead.

    The rounds must share no row: the next one's are read before this one's are written.

    On CUDA a new thread is in the default stream of the first device, whatever stream its maker is in, and would read a
    table that the maker's stream has yet to write. So ``load`` gets the stream that the caller is in when it asks for
    the round before: what the caller has queued until then comes first, and rows are made, used and freed in one
    stream. A caller that is in another stream by the time it takes the rows has that one wait for them.
    """
    with ThreadPoolExecutor(1) as thread:
        ahead: tuple[Round, Future[_Loaded]] | None = None
        for round in rounds:
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            behind, ahead = ahead, (round, thread.submit(_Loaded.by, load, round, stream))
            if behind is not None:
                yield behind[0], behind[1].result().taken()
        if ahead is not None:
            yield ahead[0], ahead[1].result().taken()


@dataclass(frozen=True)
class _Loaded:
    """Rows, and the stream that they are made in."""

    rows: Tensor
    stream: torch.cuda.Stream | None

    @staticmethod
    def by(load: Callable[[Round], Tensor], round: Round, stream: torch.cuda.Stream | None) -> _Loaded:
        with torch.cuda.stream(stream):  # nothing where there is none
            return _Loaded(load(round), stream)

    def taken(self) -> Tensor:
        """The rows, for use in the stream that the caller is in."""
        if self.stream is not None and self.rows.is_cuda:
            current = torch.cuda.current_stream(self.rows.device)
            if current != self.stream:
                current.wait_stream(self.stream)
                self.rows.record_stream(current)  # their memory is not given away before it is done with them
        return self.rows
