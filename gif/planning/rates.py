"""How fast a machine does what the stages are made of: a table of cards, and a calibration of a few seconds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gif.vectors.distributed_table import DistributedTable
from gif_kernels import uniformity_step_
from gif_kernels.gaussian_potential.blocked import TILE
from gif_kernels.precision import product
from gif_kernels.rounding import stochastic_round

REPEATS = 7
EFFICIENCY = 0.6
"""Share of a card's peak that is planned with: what the potential is to reach at least."""

PAGE = 4096
_COPY_BYTES = 1 << 27
_SPARSE_BYTES = 1 << 34
_SPARSE_ROWS = 2048


@dataclass(frozen=True)
class Rates:
    """Per second: ``products`` FLOPs in matrix products, ``exponentials``, ``memory`` bytes, ``pages`` of 4 KiB.

    A page is one that is read and written at random in a mapped file. ``overhead``: seconds of a step that does
    nothing; ``capacity``: bytes of memory, infinity where it is not looked at; ``roundings``: numbers rounded
    stochastically, infinity where the kernel that moves them does so.
    """

    products: float
    exponentials: float
    memory: float
    pages: float
    overhead: float
    capacity: float
    roundings: float = torch.inf


def _card(products: float, exponentials: float, memory: float, capacity: float) -> Rates:
    return Rates(EFFICIENCY * products, EFFICIENCY * exponentials, EFFICIENCY * memory, torch.inf, 1e-4, capacity)


# peaks of the vendors' data sheets: dense bf16 products, special functions (16 a multiprocessor a clock), memory
CARDS = {
    "a100": _card(312e12, 3.0e12, 2.04e12, 80e9),
    "h100": _card(989e12, 3.9e12, 3.35e12, 80e9),
    "h200": _card(989e12, 3.9e12, 4.8e12, 141e9),
    "mi300x": _card(1307e12, 10e12, 5.3e12, 192e9),
}


def measure_rates(width: int, batch: int, folder: Path | None = None) -> Rates:
    """This machine's rates on CPU for steps of ``batch`` rows of ``width``, in a few seconds.

    Products and exponentials are timed in the tiles that the potential is computed in, pages in a sparse file in
    ``folder`` (a temporary one where it is not given), which is removed.
    """
    size = min(batch, TILE)
    rows = torch.nn.functional.normalize(torch.randn(size, width), dim=1)
    pairs, gradient = torch.zeros(size, size), torch.zeros(size, width)
    products = seconds(lambda: (product(rows, rows.T, rows.dtype), gradient.add_(product(pairs, rows, rows.dtype))))
    exponential = seconds(lambda: (pairs.fill_(0.0).sub_(1).mul_(4).exp_(), pairs.sum(1)))
    rounding = seconds(lambda: stochastic_round(rows, torch.bfloat16, torch.arange(size), 0))
    source, target = torch.zeros(_COPY_BYTES, dtype=torch.uint8), torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    copy = seconds(lambda: target.copy_(source))
    two = torch.nn.functional.normalize(torch.randn(2, width), dim=1)
    overhead = seconds(lambda: uniformity_step_(two, torch.arange(2), lr=0.1))
    return Rates(
        products=4 * size * size * width / products,
        exponentials=size * size / exponential,
        memory=2 * _COPY_BYTES / copy,
        pages=_page_rate(width, folder),
        overhead=overhead,
        capacity=torch.inf,
        roundings=rows.numel() / rounding,
    )


def _page_rate(width: int, folder: Path | None) -> float:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".gif-rates-") as place:
        table = sparse_table(Path(place) / "pages", _SPARSE_BYTES // (4 * width), width)
        shared = DistributedTable(table, table.device, mapped=True)

        def touch() -> None:
            rows = torch.randint(len(table), (_SPARSE_ROWS,))
            shared.put(rows, shared.take(rows))

        return _SPARSE_ROWS * pages_of_a_row(4 * width) / seconds(touch)


def pages_of_a_row(row_bytes: int) -> float:
    """Pages that a row of a table touches, on average."""
    return 1 + (row_bytes - 1) / PAGE


def sparse_table(path: Path, m: int, width: int) -> torch.Tensor:
    """A mapped table (m, width) float32 of zeros, whose file takes room on the disk only where it is written."""
    return torch.from_file(str(path), shared=True, size=m * width).view(m, width)


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
