"""`python -m benchmarks.negatives`: what shared random negatives cost in a step of the live head, into a CSV.

Steps with different numbers of negatives take turns, so that what else the machine does falls on all alike; the median
of their ratios to a step without negatives counts. The candidates are the batch's identities, their two siblings and
the negatives, so by its products a step costs what `gif.planning.heads` says.
"""

from __future__ import annotations

import csv
import io
import statistics
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from jsonargparse import auto_cli

from benchmarks.heads import BATCH, VOCAB, WIDTH, Step, gif_step, label_batches
from benchmarks.memory import peak_bytes
from gif.files import write_text
from gif.losses.recipes import RECIPES
from gif.planning.heads import gif_cost
from gif.progress import say

NEGATIVES = (0, 1024, 4096, 16384)


@dataclass(frozen=True)
class Point:
    """A step with some negatives: its time over that of one without, the same of its products, and its memory."""

    negatives: int
    candidates: int
    time_ratio: float
    products_ratio: float
    peak_mib: float


def negatives(
    *, output: Path = Path("docs/benchmarks/negatives.csv"), identities: int = 1_000_000, rounds: int = 15
) -> None:
    """Measure steps of the live head with different numbers of negatives, each on its own copy of the code vectors.

    Args:
        output: the CSV.
        identities: m.
        rounds: in each of which every head takes one step.
    """
    recipes = [replace(RECIPES["live"], negatives=count) for count in NEGATIVES]
    labels = label_batches(identities, BATCH)
    embeddings = torch.randn(BATCH, WIDTH).requires_grad_()
    with tempfile.TemporaryDirectory() as folder:
        steps = [gif_step(recipe)(identities, labels, Path(folder)) for recipe in recipes]
        seconds: list[list[float]] = [[] for _ in recipes]
        for number in range(rounds + 1):
            for step, found in zip(steps, seconds, strict=True):
                begin = time.process_time()
                step(embeddings, labels[number % len(labels)])
                found.append(time.process_time() - begin)
        peaks = [_peak(step, embeddings, labels[0]) for step in steps]
    costs = [gif_cost(identities, width=WIDTH, batch=BATCH, vocab_size=VOCAB, recipe=recipe) for recipe in recipes]
    points = [
        Point(
            recipe.negatives,
            BATCH * (1 + recipe.siblings) + recipe.negatives,
            statistics.median(one / without for one, without in zip(found[1:], seconds[0][1:], strict=True)),
            cost.flops / costs[0].flops,
            peak / 2**20,
        )
        for recipe, found, cost, peak in zip(recipes, seconds, costs, peaks, strict=True)
    ]
    for point in points:
        say(str(point))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Point)])
    for point in points:
        writer.writerow(f"{value:.3g}" if isinstance(value, float) else value for value in vars(point).values())
    write_text(output, text.getvalue())


def _peak(step: Step, embeddings: torch.Tensor, labels: torch.Tensor) -> int:
    return peak_bytes(lambda: step(embeddings, labels), "cpu")


if __name__ == "__main__":
    auto_cli(negatives, as_positional=False)
