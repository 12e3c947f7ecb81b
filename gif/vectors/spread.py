"""Spread code vectors over the sphere: SGD on the Gaussian potential of random subsets, then of neighbours."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gif.distributed import gather_rows, world_size
from gif.errors import InputError
from gif.progress import progress
from gif.vectors.closed_form import ROWS_A_BLOCK
from gif.vectors.config import SpreadConfig
from gif.vectors.distributed_table import DistributedTable, prefetched
from gif.vectors.neighbors import NeighborSubsets
from gif.vectors.quality import SAMPLE, VectorQuality, judge_vectors, largest_uniform_cosine, sample_rows
from gif.vectors.recovery import recovery
from gif.vectors.stages import ClosedFormPass, Driver, NeighborEpochs, RandomEpochs
from gif.vectors.store import CodeVectors
from gif_kernels import max_cosine

NEAR_DUPLICATE = 0.9
"""Cosine above which the report advises epochs of neighbours."""


@dataclass(frozen=True)
class SpreadReport:
    """What spreading did.

    ``before``, ``after``: quality of a sample. ``gaps``: the mean gap of each epoch's random subsets, before their
    steps. ``largest_before``, ``largest_after``: the largest cosine found among all m vectors; above 20,000 only that
    between neighbours, so a lower bound. ``largest_uniform``: that of m uniform points. ``neighbor_cosines``: the
    largest met in each epoch of neighbours, before their steps.
    """

    before: VectorQuality
    after: VectorQuality
    gaps: list[float]
    largest_before: float
    largest_after: float
    largest_uniform: float
    neighbor_cosines: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"before: {self.before}\nafter:  {self.after}\n"
            f"largest cosine among all: before {self.largest_before:.3f}, after {self.largest_after:.3f}; as many "
            f"uniform points would have {self.largest_uniform:.3f}"
        )
        if self.largest_after > NEAR_DUPLICATE and not self.neighbor_cosines:
            text += f"\ncosines above {NEAR_DUPLICATE} are left: epochs of neighbours part them (neighbor_epochs)"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single cosines, fit for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "gaps": self.gaps,
            "largest_cosine": {
                "before": self.largest_before,
                "after": self.largest_after,
                "uniform": self.largest_uniform,
            },
            "neighbor_cosines": self.neighbor_cosines,
        }


def spread_code_vectors(
    vectors: CodeVectors,
    config: SpreadConfig = SpreadConfig(),  # noqa: B008 (frozen)
    *,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> SpreadReport:
    """Minimise the Gaussian potential of ``vectors``, in place.

    Each epoch goes once through random subsets of about ``config.batch`` vectors without replacement, one
    `uniformity_step_` a subset. Three epochs do nearly all there is to do; more epochs trade the encoder's order of
    similarity for ever smaller gains, so the report shows both. Random subsets hardly ever bring two near-duplicates
    together: epochs of neighbours do, whose subsets are the leaves of a tree of random cuts, another tree each epoch.

    The rows of a step are gathered while the one before runs, and nothing of the table's size is allocated but an index
    of 8 bytes a row, and 130 bytes a row on the host while an epoch of neighbours is put in order: the table may be in
    CPU memory or in a file larger than it (`CodeVectors.load` with ``mmap`` and ``writable``), whatever the device that
    computes.

    In a process group each process gives its own rows of the table, which is all of theirs in the order of the ranks.
    They step one subset each at a time, to the result of one process.

    Args:
        vectors: (m, d), m >= 2.
        config: how.
        device: where to compute; by default where the table is.
        checkpoint: what a later call with the same arguments continues from, to the same result; removed when done. For
            a table in memory a file, a copy made once a minute and on interruption. For one in a writable memory map a
            folder, of 256 MiB and an index at most: the table in its file, which is half-way then, belongs to it.
        keep_checkpoint: leave the checkpoint, which says that the run is done: a later call returns the same report.

    Raises ValueError for fewer than two vectors, or for a checkpoint of another run.
    """
    place = vectors.table.device if device is None else torch.device(device)
    table = DistributedTable(vectors.table, place, mapped=vectors.file is not None)
    if table.m < 2:
        raise InputError(f"wanted at least 2 vectors, which push each other apart, got {table.m}")
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    settings = {"table": str(vectors), "m": table.m, **config.settings()}
    kept = recovery(table, vectors.file, checkpoint, settings, max(config.batch, ROWS_A_BLOCK))
    neighbors = NeighborSubsets(table, config.neighbors, config.batch)
    random = RandomEpochs(table, config)
    parting = NeighborEpochs(table, config, neighbors, kept)
    driver = Driver(table, [ClosedFormPass(table, config, kept), random, parting], kept, deadline)

    def largest() -> Tensor:
        return largest_cosine(table, neighbors, config.seed)

    sample = sample_rows(table.m)
    with driver.resumed():
        sample_before = kept.remember("begin", lambda: table.sample(sample))
        largest_before = kept.remember("largest", largest)
        driver.run()
    report = SpreadReport(
        before=judge_vectors(sample_before, t=config.t),
        after=judge_vectors(table.sample(sample), sample_before, t=config.t),
        gaps=random.gaps,
        largest_before=float(largest_before),
        largest_after=float(largest()),
        largest_uniform=largest_uniform_cosine(table.m, table.width),
        neighbor_cosines=parting.largest_cosines(),
    )
    driver.finish(keep=keep_checkpoint)
    return report


def largest_cosine(table: DistributedTable, neighbors: NeighborSubsets, seed: int) -> Tensor:
    """() the largest cosine: of all pairs where all rows are judged, of neighbours where there are more rows."""
    if table.m <= SAMPLE:
        return max_cosine(table.sample(torch.arange(table.m)))[0].max()
    largest = torch.full((1, 1), -torch.inf)
    rounds = table.rounds(neighbors.subsets(neighbors.order(seed)), 0, 0)
    with progress("looking for near-duplicates", table.m, "vectors") as advance:
        for round, rows in prefetched(rounds, lambda round: table.take(round.rows), table.device):
            subset = table.collect(round, rows.to(table.device))
            for leaf in neighbors.leaves(round.subset, subset.device):
                largest = largest.maximum(max_cosine(subset[leaf])[0].max().cpu())
            advance(len(round.place) * world_size())
    return gather_rows(largest.to(table.device)).max().cpu()
