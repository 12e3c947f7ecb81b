"""`python -m benchmarks.head_memory`: memory of a training step of each head, counted and by formula, into a CSV.

Nothing is timed, so that it takes minutes. The numbers are allocations, which no machine changes; it runs on a CPU.
"""

from __future__ import annotations

import csv
import io
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.heads import BATCH, FULL, HEADS, WIDTH, Head, Step, label_batches
from benchmarks.memory import free_bytes, kept_bytes, peak_bytes
from gif.files import write_text
from gif.progress import say

ROOM = 1.3
"""A head is measured where so many times its memory by formula is free."""


@dataclass(frozen=True)
class Point:
    """Bytes that one head keeps after a step, those that the next step takes beside them, and both by formula."""

    head: str
    identities: int
    batch: int
    kept_bytes: int
    peak_bytes: int
    planned_bytes: int


def head_memory(
    *,
    output: Path = Path("docs/benchmarks/head-memory.csv"),
    identities: tuple[int, ...] = FULL,
    batches: tuple[int, ...] = (BATCH, 1024),
) -> None:
    """Measure each head at each size where it fits.

    Args:
        output: the CSV.
        identities: the sizes.
        batches: of the first, all sizes; of the others those below a million.
    """
    found = []
    for m in identities:
        for batch in batches[: 1 if m >= 1_000_000 else None]:
            for head in (head for head in HEADS.values() if not head.missing):
                if ROOM * head.cost(m, batch).bytes > free_bytes("cpu"):
                    say(f"{head.name}, {m:,} identities: left out, since it does not fit")
                    continue
                found.append(measure(head, m, batch))
                say(str(found[-1]))
    write_text(output, as_csv(found))


def measure(head: Head, m: int, batch: int) -> Point:
    """Memory of a step that is not the first, on a CPU: the optimizer's momentum is there."""
    labels = label_batches(m, batch)
    embeddings = torch.randn(batch, WIDTH).requires_grad_()
    steps: list[Step] = []

    def call() -> None:
        steps[0](embeddings, labels[0])
        embeddings.grad = None

    def build() -> None:
        steps.append(head.build(m, labels, Path(folder)))
        call()

    with tempfile.TemporaryDirectory() as folder:
        kept = kept_bytes(build, "cpu")
        peak = peak_bytes(call, "cpu")
    return Point(head.name, m, batch, kept, peak, round(head.cost(m, batch).bytes))


def as_csv(found: list[Point]) -> str:
    """A line a point."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Point)])
    writer.writerows(vars(point).values() for point in found)
    return text.getvalue()


if __name__ == "__main__":
    auto_cli(head_memory, as_positional=False)
