"""Steps on real tables, to hold the plan against, and the supplement's Fig. 7 with both."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gif.planning.rates import measure_rates, sparse_table
from gif.planning.stages import spread_step_seconds
from gif.plotting import COLORS, figure, save_figure
from gif.progress import progress
from gif.vectors.distributed_table import DistributedTable
from gif_kernels import uniformity_step_

SECONDS_A_SIZE = 8.0
FEWEST, MOST = 5, 30  # steps
SMALLEST, LARGEST = 1_000_000, 64_000_000


@dataclass(frozen=True)
class StepMeasurement:
    """Steps of ``batch`` rows on a table of m rows: the table's bytes, and the median ``seconds`` of a step.

    ``planned``: the seconds by formula, from rates measured right before, when the machine had the same else to do.
    """

    m: int
    width: int
    batch: int
    table_bytes: int
    seconds: float
    planned: float


def measure_step(m: int, width: int, batch: int, folder: Path | None = None) -> StepMeasurement:
    """Steps on a float32 table (m, width) in a sparse file, in ``folder`` or a temporary one; about 15 seconds.

    Rows are random ones and so are their values, as they are when a table is spread; the file grows by the rows that
    are written, and is removed.
    """
    planned = spread_step_seconds(width, 4, batch, measure_rates(width, batch, folder), in_file=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".gif-step-") as place:
        shared = DistributedTable(sparse_table(Path(place) / "table", m, width), torch.device("cpu"), mapped=True)
        values = torch.nn.functional.normalize(torch.randn(batch, width), dim=1)
        every = torch.arange(batch)
        times: list[float] = []
        while len(times) < FEWEST or (sum(times) < SECONDS_A_SIZE and len(times) < MOST):
            index = torch.randint(m, (2 * batch + 64,)).unique()
            index = index[torch.randperm(len(index))[:batch]]
            begin = time.perf_counter()
            rows = shared.take(index)
            rows.add_(values)  # a sparse file holds zeros
            uniformity_step_(rows, every, lr=0.1)
            shared.put(index, rows)
            times.append(time.perf_counter() - begin)
    return StepMeasurement(m, width, batch, m * width * 4, statistics.median(times), planned)


def measure_steps(width: int, batch: int, largest: int, folder: Path | None = None) -> list[StepMeasurement]:
    """`measure_step` at 1M, 4M, 16M, 64M rows, up to ``largest``."""
    sizes = [m for m in (SMALLEST * 4**i for i in range(4)) if m <= largest]
    found = []
    with progress("measuring steps", len(sizes), "tables") as advance:
        for m in sizes:
            found.append(measure_step(m, width, batch, folder))
            advance(1, note=f"{m:,} rows: {1e3 * found[-1].seconds:.0f} ms")
    return found


def plot_spreading(
    planned: Sequence[tuple[int, float, float]], measured: Sequence[StepMeasurement], capacity: float, path: str | Path
) -> None:
    """Memory and speed of a step against m (the supplement's Fig. 7).

    ``planned``: (m, bytes, seconds of a step), drawn as lines; ``measured`` as points; ``capacity`` bytes as a line, if
    it is finite.
    """
    drawing, (memory, speed) = figure(9.5, 3.9, columns=2)
    m, size, seconds = (np.array(column) for column in zip(*planned, strict=True))
    memory.loglog(m, size / 2**30, color=COLORS[0], label="planned, with the workspace")
    speed.semilogx(m, 1 / seconds, color=COLORS[0], label="planned")
    if measured:
        at = [point.m for point in measured]
        memory.loglog(
            at,
            [point.table_bytes / 2**30 for point in measured],
            "o",
            color=COLORS[1],
            label="table of the measured steps",
        )
        speed.semilogx(at, [1 / point.seconds for point in measured], "o", color=COLORS[1], label="measured")
    if np.isfinite(capacity):
        memory.axhline(capacity / 2**30, color=COLORS[6], linestyle=":", label="the device's memory")
    memory.set(xlabel="identities", ylabel="GiB", title="Memory of spreading")
    speed.set(xlabel="identities", ylabel="steps a second", title="Speed of spreading", ylim=(0, None))
    for axes in (memory, speed):
        axes.legend(frameon=False)
    save_figure(drawing, path)
