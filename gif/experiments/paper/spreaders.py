"""A step of spreading code vectors to measure: this project's, and what a user would write; memory and time by formula.

All step random rows of a bfloat16 table, as the paper does. They differ in where it lies and what a step touches.
Autograd's results are rounded to nearest here, which loses small steps; ours are rounded at random.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gif.planning import CARDS, Rates, measure_rates, spread_memory, spread_step_seconds
from gif.planning.heads import FLOAT
from gif.vectors.distributed_table import DistributedTable
from gif_kernels import uniformity_step_

LR, T = 0.1, 2.0
HALF = 2
"""Bytes of a coordinate of the table, which is bfloat16."""
PAIRS_HELD, PAIRS_PASSES = 3, 14
"""Arrays of all pairs that autograd on `dense_potential` holds at once, and goes through, about."""
TABLE_PASSES = 5
"""A dense gradient is cleared, written, read; the table is read and written."""


@dataclass(frozen=True)
class Shape:
    """``width`` of a vector, rows of a step (``batch``), and the ``device`` that computes."""

    width: int = 512
    batch: int = 2048
    device: str = "cpu"

    def clock(self) -> float:
        """Seconds: of a CPU its own, of each thread, so that other work on the machine does not count."""
        if torch.device(self.device).type == "cuda":
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    def rates(self) -> Rates | None:
        """This machine's, by `clock`: measured on a CPU, from the data sheet for a card that `gif plan` knows."""
        if torch.device(self.device).type == "cpu":
            return measure_rates(self.width, self.batch, clock=self.clock)
        name = torch.cuda.get_device_name(self.device).lower()
        return next((known for card, known in CARDS.items() if card in name), None)

    def table(self, m: int) -> Tensor:
        """A table (m, width) bfloat16 of ones in the device's memory."""
        return torch.ones(m, self.width, dtype=torch.bfloat16, device=self.device)


def dense_potential(vectors: Tensor) -> Tensor:
    """All pairs in one product, autograd for the rest."""
    h = F.normalize(vectors.float())
    pairs = torch.exp(2 * T * (h @ h.T - 1))
    m = len(h)
    return ((pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1))).log()


@dataclass
class Spreading:
    """A ``table`` (m, width), and a ``step`` of its rows ``index`` (batch,) with a ``seed`` of the rounding.

    ``held``: bytes of memory that the table takes for good; the pages of a mapped file the system may drop.
    """

    table: Tensor
    step: Callable[[Tensor, int], None]
    held: int


def in_memory(m: int, shape: Shape, folder: Path) -> Spreading:
    """The table in the memory of the device."""
    table = shape.table(m)

    def step(index: Tensor, seed: int) -> None:
        uniformity_step_(table, index, lr=LR, seed=seed)

    return Spreading(table, step, table.nbytes)


def in_file(m: int, shape: Shape, folder: Path) -> Spreading:
    """The table in a sparse memory-mapped file, of which only the rows that are stepped take room on the disk."""
    flat = torch.from_file(str(folder / "table"), shared=True, size=m * shape.width, dtype=torch.bfloat16)
    table = flat.view(m, shape.width)
    shared = DistributedTable(table, torch.device(shape.device), mapped=True)
    every = torch.arange(shape.batch, device=shape.device)

    def step(index: Tensor, seed: int) -> None:
        rows = shared.take(index.cpu()).to(shape.device)
        uniformity_step_(rows, every, lr=LR, seed=seed)
        shared.put(index.cpu(), rows)

    return Spreading(table, step, 0)


def autograd_on_rows(m: int, shape: Shape, folder: Path) -> Spreading:
    """All pairs of the rows at once; only the rows get gradients and move."""
    table = shape.table(m)

    def step(index: Tensor, seed: int) -> None:
        rows = table[index].float().requires_grad_()
        dense_potential(rows).backward()
        assert rows.grad is not None
        table[index] = F.normalize(rows.detach().sub_(rows.grad, alpha=LR * shape.batch)).to(table.dtype)

    return Spreading(table, step, table.nbytes)


def autograd_on_table(m: int, shape: Shape, folder: Path) -> Spreading:
    """The table a parameter of torch.optim.SGD: its gradient is as large as itself."""
    table = nn.Parameter(shape.table(m))
    optimizer = torch.optim.SGD([table], LR * shape.batch, fused=True)

    def step(index: Tensor, seed: int) -> None:
        dense_potential(table[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[index] = F.normalize(table[index].float()).to(table.dtype)

    return Spreading(table.detach(), step, table.nbytes)


def _pairs_bytes(shape: Shape) -> int:
    """What autograd on `dense_potential` holds: arrays of all pairs, and the rows and their gradient."""
    return FLOAT * (PAIRS_HELD * shape.batch**2 + 2 * shape.batch * shape.width)


def _pairs_seconds(shape: Shape, known: Rates) -> float:
    """A step of autograd on `dense_potential`, of any table."""
    pairs = shape.batch**2
    products = 6 * pairs * shape.width / known.products
    return known.overhead + products + pairs / known.exponentials + PAIRS_PASSES * FLOAT * pairs / known.memory


def _table_bytes(m: int, shape: Shape) -> int:
    return m * shape.width * HALF


@dataclass(frozen=True, repr=False)
class Spreader:
    """A way to spread, to be measured.

    Args:
        name: in reports and pictures.
        build: a table of m rows and its step; the folder holds what lies in files.
        memory: bytes of the device for m rows, by formula: the table, and what a step holds beside it.
        seconds: of a step among m rows, by formula.
        moved: rows of which a step reads or writes the bytes, at least, among m.
        slow: whether a step takes seconds on a CPU, so that it is repeated less often.
    """

    name: str
    build: Callable[[int, Shape, Path], Spreading]
    memory: Callable[[int, Shape], float]
    seconds: Callable[[int, Shape, Rates], float]
    moved: Callable[[int, Shape], int] = lambda m, shape: 2 * shape.batch
    slow: bool = False

    def __repr__(self) -> str:
        return repr(self.name)

    def flops(self, shape: Shape) -> int:
        """How many the products take, by symmetry."""
        return 3 * shape.batch**2 * shape.width

    def traffic(self, m: int, shape: Shape) -> int:
        """Bytes that must move at least: of the rows, or of a table's gradient."""
        return self.moved(m, shape) * shape.width * HALF


OURS = Spreader(
    "ours",
    in_memory,
    memory=lambda m, shape: spread_memory(m, shape.width, HALF, shape.batch),
    seconds=lambda m, shape, known: spread_step_seconds(shape.width, HALF, shape.batch, known, in_file=False),
)
IN_FILE = Spreader(
    "ours, table in a file",
    in_file,
    memory=lambda m, shape: spread_memory(0, shape.width, HALF, shape.batch),
    seconds=lambda m, shape, known: spread_step_seconds(shape.width, HALF, shape.batch, known, in_file=True),
)
ON_ROWS = Spreader(
    "autograd on the rows",
    autograd_on_rows,
    memory=lambda m, shape: _table_bytes(m, shape) + _pairs_bytes(shape),
    seconds=lambda m, shape, known: _pairs_seconds(shape, known),
)
ON_TABLE = Spreader(
    "autograd on the table",
    autograd_on_table,
    # the pairs go before the table's gradient comes
    memory=lambda m, shape: _table_bytes(m, shape) + max(_table_bytes(m, shape), _pairs_bytes(shape)),
    seconds=lambda m, shape, known: _pairs_seconds(shape, known) + TABLE_PASSES * _table_bytes(m, shape) / known.memory,
    moved=lambda m, shape: 4 * m,
    slow=True,
)
SPREADERS = {spreader.name: spreader for spreader in (OURS, IN_FILE, ON_ROWS, ON_TABLE)}
