"""How fast a machine does what the stages are made of: a table of cards, and a calibration of a few seconds."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from gif.codes.clustering import split
from gif.codes.config import TokenizeConfig
from gif.codes.nodes import Nodes
from gif.data.images import IdentityImages
from gif.encoders.pixels import SIDE, PixelEncoder
from gif.packages import needs
from gif.vectors.distributed_table import DistributedTable
from gif.vectors.neighbors import neighbor_order
from gif_kernels import uniformity_step_
from gif_kernels.gaussian_potential.blocked import TILE
from gif_kernels.precision import product
from gif_kernels.rounding import stochastic_round

Clock = Callable[[], float]
REPEATS = 7
EFFICIENCY = 0.6
"""Share of a card's peak that is planned with: what the potential is to reach at least."""
_STEP, _LAUNCH, _NAMES = 2.5e-4, 3.3e-5, 4e5
"""Of a card's host, that of an H200 (docs/gpu.md): a step of spreading took 0.28 ms where the card took 0.06, a head's
289 operations 9.6 ms, and the children of 3.4 million nodes of an estimated 8 s."""

PAGE = 4096
_COPY_BYTES = 1 << 27
_SPARSE_BYTES = 1 << 34
_SPARSE_ROWS = 2048
_BATCHES, _IMAGES = 4, 1024
_CUT_NODES, _ROWS_A_CHILD = 16, 16
_SORTED_ROWS, _SORTED_LEVELS = 1 << 18, 2


@dataclass(frozen=True)
class Rates:
    """Per second: ``products`` FLOPs in matrix products, ``exponentials``, ``memory`` bytes, ``pages`` of 4 KiB.

    A page is one that is read and written at random in a mapped file. ``overhead``: seconds of a step that does
    nothing; ``capacity``: bytes of memory, infinity where it is not looked at; ``roundings``: numbers rounded
    stochastically, infinity where the kernel that moves them does so.

    ``images`` are those of pixels, read from memory, encoded and summed, and ``cuts`` rows of nodes that balanced
    k-means cuts; infinity where they are not measured. ``sorts``: rows sorted by a level of random cuts, by a host.

    ``launch``: seconds in which a card's host launches an operation, and ``names``: nodes a second whose children it
    names; 0 and infinity on a CPU, whose ``cuts`` are measured.

    ``start``: seconds until a command's process begins its work, and ``resident``: bytes of Python and libraries that
    it holds then; 0 where they are not measured.
    """

    products: float
    exponentials: float
    memory: float
    pages: float
    overhead: float
    capacity: float
    roundings: float = torch.inf
    images: float = torch.inf
    cuts: float = torch.inf
    sorts: float = 6e6
    launch: float = 0.0
    names: float = torch.inf
    start: float = 0.0
    resident: float = 0.0


def _card(products: float, exponentials: float, memory: float, capacity: float) -> Rates:
    products, exponentials, memory = (EFFICIENCY * peak for peak in (products, exponentials, memory))
    return Rates(products, exponentials, memory, torch.inf, _STEP, capacity, launch=_LAUNCH, names=_NAMES)


CARDS = {
    "a100": _card(312e12, 3.0e12, 2.04e12, 80e9),
    "h100": _card(989e12, 3.9e12, 3.35e12, 80e9),
    "h200": _card(989e12, 3.9e12, 4.8e12, 141e9),
    "mi300x": _card(1307e12, 10e12, 5.3e12, 192e9),
}
"""Peaks of the vendors' data sheets: dense bf16 products, special functions (16 a multiprocessor a clock), memory."""


def measure_rates(
    width: int,
    batch: int,
    folder: Path | None = None,
    vocab_size: int = TokenizeConfig.vocab_size,
    clock: Clock = time.perf_counter,
) -> Rates:
    """This machine's rates on CPU for steps of ``batch`` rows of ``width`` and tokens of ``vocab_size`` values.

    It takes a few seconds.

    Products and exponentials are timed in the tiles that the potential is computed in, pages in a sparse file in
    ``folder`` (a temporary one where it is not given), which is removed. ``clock`` tells seconds; by the processor's,
    other work on the machine does not count.
    """
    resident = _resident_bytes()
    seconds = partial(median_seconds, clock=clock)
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
    sort = seconds(lambda: neighbor_order(torch.randn(_SORTED_ROWS, _SORTED_LEVELS)))
    return Rates(
        products=4 * size * size * width / products,
        exponentials=size * size / exponential,
        memory=2 * _COPY_BYTES / copy,
        pages=_page_rate(width, folder, clock),
        overhead=overhead,
        capacity=torch.inf,
        roundings=rows.numel() / rounding,
        images=_image_rate(clock),
        cuts=_cut_rate(width, vocab_size, clock),
        sorts=_SORTED_ROWS * _SORTED_LEVELS / sort,
        start=_start_seconds(),
        resident=resident,
    )


def _start_seconds() -> float:
    """Processor time of a command that says its help, which is what any takes before it begins."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "gif.cli", "vectors", "--help"], capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _resident_bytes() -> float:
    """What this process holds."""
    with needs("psutil", "looking at the memory that is held"):
        import psutil
    held: int = psutil.Process().memory_info().rss
    return held


def _image_rate(clock: Clock) -> float:
    """Images a second in memory, of 32 x 32, that a loader gives to `PixelEncoder` and whose features are summed."""
    images = torch.randint(256, (_BATCHES * _IMAGES, 1, SIDE, SIDE), dtype=torch.uint8)
    data = IdentityImages(images, torch.arange(len(images)), [str(number) for number in range(len(images))])
    encoder, sums = PixelEncoder(), torch.zeros(len(images), SIDE**2, dtype=torch.float64)
    loader = DataLoader(data, _IMAGES, collate_fn=data.collate, generator=torch.Generator())

    def read() -> None:
        for some, labels in loader:
            sums.index_add_(0, labels, encoder(some).double())

    return len(images) / median_seconds(read, clock)


def _cut_rate(width: int, vocab_size: int, clock: Clock) -> float:
    """Rows a second that `split` cuts, of nodes so large that it takes all of their rows."""
    rows, config = _ROWS_A_CHILD * vocab_size, TokenizeConfig()
    index = torch.arange(_CUT_NODES * rows).view(_CUT_NODES, rows)
    nodes = Nodes(torch.randn(index.numel(), width), index, torch.ones_like(index, dtype=torch.bool), full=True)
    seeds = np.arange(_CUT_NODES, dtype=np.uint64)

    def cut() -> None:
        factor, rounds = config.capacity_factor, config.iterations
        split(nodes, vocab_size, capacity_factor=factor, limit=rows, iterations=rounds, seeds=seeds)

    return index.numel() / median_seconds(cut, clock)


def _page_rate(width: int, folder: Path | None, clock: Clock) -> float:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".gif-rates-") as place:
        table = sparse_table(Path(place) / "pages", _SPARSE_BYTES // (4 * width), width)
        shared = DistributedTable(table, table.device, mapped=True)

        def touch() -> None:
            rows = torch.randint(len(table), (_SPARSE_ROWS,))
            shared.put(rows, shared.take(rows))

        return _SPARSE_ROWS * pages_of_a_row(4 * width) / median_seconds(touch, clock)


def pages_of_a_row(row_bytes: int) -> float:
    """Pages that a row of a table touches, on average."""
    return 1 + (row_bytes - 1) / PAGE


def sparse_table(path: Path, m: int, width: int) -> torch.Tensor:
    """A mapped table (m, width) float32 of zeros, whose file takes room on the disk only where it is written."""
    return torch.from_file(str(path), shared=True, size=m * width).view(m, width)


def median_seconds(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times)
