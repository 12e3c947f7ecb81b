"""A step of spreading code vectors to measure: this project's, and what a user would write; memory and time by formula.

All step random rows of a bfloat16 table, as the paper does. They differ in where it lies and what a step touches.
Autograd's results are rounded to nearest here, which loses small steps; ours are rounded at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE
from gif.planning import CARDS, Rates, measure_rates, spread_memory, spread_step_seconds
from gif.vectors.distributed_table import DistributedTable
from gif_kernels import uniformity_step_

D, N, LR, T = 512, 2048, 0.1, 2.0
HALF, FLOAT = 2, 4  # bytes of a coordinate
PAIRS_HELD, PAIRS_PASSES = 3, 14
"""Arrays of all pairs that autograd on `dense_potential` holds at once, and goes through, about."""
TABLE_PASSES = 5
"""A dense gradient is cleared, written, read; the table is read and written."""


def dense_potential(vectors: Tensor) -> Tensor:
    """All pairs in one product, autograd for the rest."""
    h = F.normalize(vectors.float())
    pairs = torch.exp(2 * T * (h @ h.T - 1))
    m = len(h)
    return ((pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1))).log()


@dataclass
class Spreading:
    """A ``table`` (m, D), and a ``step`` of its rows ``index`` (N,) with a ``seed`` of the rounding.

    ``held``: bytes of memory that the table takes for good; the pages of a mapped file the system may drop.
    """

    table: Tensor
    step: Callable[[Tensor, int], None]
    held: int


def in_memory(m: int, folder: Path) -> Spreading:
    """The table in the memory of the device."""
    table = torch.ones(m, D, dtype=torch.bfloat16, device=DEVICE)

    def step(index: Tensor, seed: int) -> None:
        uniformity_step_(table, index, lr=LR, seed=seed)

    return Spreading(table, step, table.nbytes)


def in_file(m: int, folder: Path) -> Spreading:
    """The table in a sparse memory-mapped file, of which only the rows that are stepped take room on the disk."""
    table = torch.from_file(str(folder / "table"), shared=True, size=m * D, dtype=torch.bfloat16).view(m, D)
    shared = DistributedTable(table, torch.device(DEVICE), mapped=True)
    every = torch.arange(N, device=DEVICE)

    def step(index: Tensor, seed: int) -> None:
        rows = shared.take(index.cpu()).to(DEVICE)
        uniformity_step_(rows, every, lr=LR, seed=seed)
        shared.put(index.cpu(), rows)

    return Spreading(table, step, 0)


def autograd_on_rows(m: int, folder: Path) -> Spreading:
    """All pairs of the rows at once; only the rows get gradients and move."""
    table = torch.ones(m, D, dtype=torch.bfloat16, device=DEVICE)

    def step(index: Tensor, seed: int) -> None:
        rows = table[index].float().requires_grad_()
        dense_potential(rows).backward()
        table[index] = F.normalize(rows.detach().sub_(rows.grad, alpha=LR * N)).to(table.dtype)

    return Spreading(table, step, table.nbytes)


def autograd_on_table(m: int, folder: Path) -> Spreading:
    """The table a parameter of torch.optim.SGD: its gradient is as large as itself."""
    table = nn.Parameter(torch.ones(m, D, dtype=torch.bfloat16, device=DEVICE))
    optimizer = torch.optim.SGD([table], LR * N, fused=True)

    def step(index: Tensor, seed: int) -> None:
        dense_potential(table[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[index] = F.normalize(table[index].float()).to(table.dtype)

    return Spreading(table.detach(), step, table.nbytes)


PROVIDERS: dict[str, Callable[[int, Path], Spreading]] = {
    "ours": in_memory,
    "ours, table in a file": in_file,
    "autograd on the rows": autograd_on_rows,
    "autograd on the table": autograd_on_table,
}


def planned_bytes(provider: str, m: int) -> float:
    """Memory of the device by formula: the table, and what a step holds beside it."""
    if provider == "ours":
        return spread_memory(m, D, HALF, N)
    if provider == "ours, table in a file":
        return spread_memory(0, D, HALF, N)
    table, pairs = m * D * HALF, FLOAT * (PAIRS_HELD * N * N + 2 * N * D)
    return table + (max(table, pairs) if provider == "autograd on the table" else pairs)  # pairs go before its gradient


def planned_seconds(provider: str, m: int, rates: Rates) -> float:
    """Time of a step by formula; only with the gradient of a whole table does it know m."""
    if provider.startswith("ours"):
        return spread_step_seconds(D, HALF, N, rates, in_file=provider.endswith("file"))
    pairs = 6 * N * N * D / rates.products + N * N / rates.exponentials + PAIRS_PASSES * FLOAT * N * N / rates.memory
    table = TABLE_PASSES * HALF * m * D / rates.memory if provider == "autograd on the table" else 0.0
    return rates.overhead + pairs + table


def step_work(provider: str, m: int) -> dict[str, float]:
    """FLOPs of the products, by symmetry, and bytes that must move at least: of the rows, or of a table's gradient."""
    moved = 4 * m if provider == "autograd on the table" else 2 * N  # rows
    return {"flops": 3 * N * N * D, "bytes": moved * D * HALF}


def rates() -> Rates | None:
    """This machine's, now: measured on a CPU, from the data sheet for a card that `gif plan` knows."""
    if DEVICE == "cpu":
        return measure_rates(D, N)
    name = torch.cuda.get_device_name().lower()
    return next((known for card, known in CARDS.items() if card in name), None)
