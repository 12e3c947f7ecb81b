"""`python -m benchmarks.partial_fc`: steps of Partial FC by rows, and by an optimizer of the whole table, into a CSV.

The optimizer's is what autograd gives where the centres are a parameter: a gradient, a decay and a step of all rows for
a sample of them, drawn by a random number a class. Both take turns, so that what else the machine does falls on both
alike; medians of their ratios count.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.heads import MARGIN, SAMPLES, SCALE, label_batches
from benchmarks.memory import peak_bytes
from gif import PartialFC
from gif.files import write_text
from gif.progress import say
from gif_kernels import code_contrast_loss

WIDTH, BATCH, RATE = 128, 128, 0.1
IDENTITIES = (100_000, 1_000_000)

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Point:
    """A step by rows of so many ``samples``: the optimizer's time over its, its time over the first point's, memory."""

    identities: int
    samples: int
    dense_over_rows: float
    over_first: float
    dense_peak_mib: int
    rows_peak_mib: int


def partial_fc(*, output: Path = Path("docs/benchmarks/partial-fc.csv"), rounds: int = 15) -> None:
    """Measure a tenth of the identities and 10,000 of them, among 100 thousand and a million.

    Args:
        output: the CSV.
        rounds: in each of which every step is taken once.
    """
    points: list[Point] = []
    first: float | None = None
    for m in IDENTITIES:
        for samples in dict.fromkeys((SAMPLES, int(RATE * m))):
            dense, rows, peaks = _measure(m, samples, rounds)
            first = first or statistics.median(rows)
            ratio = statistics.median(a / b for a, b in zip(dense, rows, strict=True))
            points.append(Point(m, samples, ratio, statistics.median(rows) / first, *peaks))
            say(str(points[-1]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Point)])
    for point in points:
        writer.writerow(f"{value:.3g}" if isinstance(value, float) else value for value in vars(point).values())
    write_text(output, text.getvalue())


def _measure(m: int, samples: int, rounds: int) -> tuple[list[float], list[float], list[int]]:
    """Seconds of the optimizer's steps and of those by rows, and both peaks in MiB."""
    steps, labels = (_dense(m, samples), _by_rows(m, samples)), label_batches(m, BATCH)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        embeddings = torch.randn(BATCH, WIDTH, requires_grad=True)
        for step, found in zip(steps, seconds, strict=True):
            begin = time.process_time()
            step(embeddings, labels[number % len(labels)])
            found.append(time.process_time() - begin)
    embeddings = torch.randn(BATCH, WIDTH, requires_grad=True)
    peaks = [round(peak_bytes(partial(step, embeddings, labels[0]), "cpu") / 2**20) for step in steps]
    return seconds[0][2:], seconds[1][2:], peaks


def _by_rows(m: int, samples: int) -> Step:
    head = PartialFC(m, WIDTH, samples=samples, margin=MARGIN, scale=SCALE)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        head(embeddings, labels).backward()

    return step


def _dense(m: int, samples: int) -> Step:
    weight = nn.Parameter(torch.randn(m, WIDTH) / 100)
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=5e-4)

    def step(embeddings: Tensor, labels: Tensor) -> None:
        priority = torch.rand(m)
        priority[labels] = 2.0
        classes = priority.topk(samples).indices.sort().values
        optimizer.zero_grad()
        rows = weight[classes]
        code_contrast_loss(embeddings, rows, labels, candidates=classes, margin=MARGIN, scale=SCALE).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    auto_cli(partial_fc, as_positional=False)
