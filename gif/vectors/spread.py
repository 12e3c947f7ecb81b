"""Spread code vectors over the sphere: SGD on the Gaussian potential of random subsets, then of neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gif.distributed import gather_rows, least_of_processes, rank, sum_over_processes, world_size
from gif.errors import InputError
from gif.progress import progress
from gif.vectors.neighbors import leaf_bounds, neighbor_order, project
from gif.vectors.quality import (
    SAMPLE,
    VectorQuality,
    judge_vectors,
    largest_uniform_cosine,
    sample_rows,
    uniform_optimum,
)
from gif.vectors.recovery import recovery
from gif.vectors.shards import Round, Shards, prefetched, rounds_of
from gif.vectors.start import ROWS_A_BLOCK, STARTS, Start, apply, closed_form
from gif.vectors.store import CodeVectors
from gif_kernels import checks, max_cosine, uniformity_step_

NEIGHBORS = 128
"""Vectors in a subset of neighbours at most: a pair's own push is 1 / n of a step."""

NEIGHBOR_T, NEIGHBOR_LR = 4.0, 0.01
"""Of the potential among neighbours: a larger t parts near-duplicates, and costs the order of the others less."""

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
    *,
    epochs: int = 3,
    batch: int = 2048,
    lr: float = 0.1,
    t: float = 2.0,
    start: Start = "none",
    neighbor_epochs: int = 0,
    neighbors: int = NEIGHBORS,
    target_gap: float | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> SpreadReport:
    """Minimise the Gaussian potential of ``vectors``, in place.

    Each epoch goes once through random subsets of about ``batch`` vectors without replacement, one `uniformity_step_`
    a subset. Three epochs do nearly all there is to do; more epochs trade the encoder's order of similarity for ever
    smaller gains, so the report shows both. Random subsets hardly ever bring two near-duplicates together: epochs of
    neighbours do, whose subsets are the leaves of a tree of random cuts, another tree each epoch.

    The rows of a step are gathered while the one before runs, and nothing of the table's size is allocated but an index
    of 8 bytes a row: the table may be in CPU memory or in a file larger than it (`CodeVectors.load` with ``mmap`` and
    ``writable``), whatever the device that computes.

    In a process group each process gives its own rows of the table, which is all of theirs in the order of the ranks.
    They step one subset each at a time, to the result of one process.

    Args:
        vectors: (m, d), m >= 2.
        epochs: passes over the table, >= 0.
        batch: vectors in a subset, >= 2.
        lr: rate per vector, > 0 (see `uniformity_step_`).
        t: of the potential.
        start: a closed form first: "center" subtracts the mean, "whiten" also evens out the covariance (ZCA with a
            ridge of its mean eigenvalue); both renormalise.
        neighbor_epochs: passes over the table in subsets of neighbours, after the others, >= 0.
        neighbors: vectors in a subset of neighbours at most, >= 4.
        target_gap: no more random epochs after the first whose subsets' mean gap to the uniform optimum is below this.
        minutes: stop after so much time of this call.
        seed: of the subsets and of the rounding.
        device: where to compute; by default where the table is.
        checkpoint: what a later call with the same arguments continues from, to the same result; removed when done. For
            a table in memory a file, a copy made once a minute and on interruption. For one in a writable memory map a
            folder, of 256 MiB and an index at most: the table in its file, which is half-way then, belongs to it.
        keep_checkpoint: leave the checkpoint, which says that the run is done: a later call returns the same report.

    Raises ValueError for bad values or for a checkpoint of another run.
    """
    checks.choice("start", start, STARTS)
    checks.positive("lr", lr)
    checks.positive("t", t)
    if epochs < 0 or neighbor_epochs < 0 or batch < 2 or neighbors < 4:
        raise InputError(
            f"wanted epochs >= 0, neighbor_epochs >= 0, batch >= 2 and neighbors >= 4, got epochs={epochs}, "
            f"neighbor_epochs={neighbor_epochs}, batch={batch}, neighbors={neighbors}"
        )
    shards = Shards(
        vectors.table,
        vectors.table.device if device is None else torch.device(device),
        mapped=vectors.file is not None,
    )
    if shards.m < 2:
        raise InputError(f"wanted at least 2 vectors, which push each other apart, got {shards.m}")
    settings = {
        "table": str(vectors),
        "m": shards.m,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "t": t,
        "start": start,
        "neighbor_epochs": neighbor_epochs,
        "neighbors": neighbors,
        "target_gap": target_gap,
        "seed": seed,
    }
    return _Run(
        vectors=vectors,
        shards=shards,
        epochs=epochs,
        batch=batch,
        lr=lr,
        t=t,
        start=start,
        neighbor_epochs=neighbor_epochs,
        neighbors=neighbors,
        target_gap=target_gap,
        deadline=None if minutes is None else time.monotonic() + 60 * minutes,
        seed=seed,
        settings=settings,
    ).run(checkpoint, keep_checkpoint)


@dataclass
class _Run:
    """One call's work: stages, each of rounds that share no row, numbered through.

    First the blocks of the closed form, then the random epochs, then those of neighbours.
    """

    vectors: CodeVectors
    shards: Shards
    epochs: int
    batch: int
    lr: float
    t: float
    start: Start
    neighbor_epochs: int
    neighbors: int
    target_gap: float | None
    deadline: float | None
    seed: int
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        m = self.shards.m
        self.steps = max(m // self.batch, 1)  # of an epoch
        self.leaves = leaf_bounds(m, self.neighbors)
        self.leaves_a_subset = max(1, self.batch // self.neighbors)
        cuts = [*self.leaves[: -1 : self.leaves_a_subset].tolist(), m]
        self.neighbor_sizes = [end - begin for begin, end in pairwise(cuts)]
        self.blocks = 0 if self.start == "none" else self.shards.number_of_blocks(ROWS_A_BLOCK)

        shape = (self.epochs, self.steps), (self.neighbor_epochs, len(self.neighbor_sizes))
        self.record = torch.zeros(sum(a * b for a, b in shape), dtype=torch.float64)  # of this process's subsets
        losses, cosines = self.record.split([a * b for a, b in shape])
        self.losses, self.cosines = losses.view(shape[0]), cosines.view(shape[1])
        self.gaps: list[float] = []
        self.finished = 0  # rounds
        self.whole = True  # the table is that after so many rounds

    def run(self, checkpoint: str | Path | None, keep: bool) -> SpreadReport:
        """Continue from the checkpoint, if there is one, to the end."""
        shards, sample = self.shards, sample_rows(self.shards.m)
        self.recovery = recovery(shards, self.vectors.file, checkpoint, self.settings, max(self.batch, ROWS_A_BLOCK))
        self.finished = self.recovery.load(self.record)
        try:
            begin = self.recovery.remember("begin", lambda: shards.sample(sample))
            largest = self.recovery.remember("largest", self.largest_cosine)
            self.go()
        except BaseException:
            if self.whole:
                self.recovery.interrupted(self.finished, self.record)
            raise
        report = SpreadReport(
            judge_vectors(begin, t=self.t),
            judge_vectors(shards.sample(sample), begin, t=self.t),
            self.gaps,
            float(largest),
            float(self.largest_cosine()),
            largest_uniform_cosine(shards.m, shards.table.shape[1]),
            [float(found) for found in sum_over_processes(self.cosines).amax(1)],
        )
        self.recovery.finish(self.finished, self.record, keep=keep)
        return report

    def go(self) -> None:
        """All stages, or those that the target and the time leave."""
        first = 0
        if self.blocks and not self.closed_form():
            return
        first += self.blocks
        with _progress("spreading code vectors", self.epochs * self.shards.m) as advance:
            for epoch in range(self.epochs):
                if self.gaps and self.target_gap is not None and self.gaps[-1] < self.target_gap:
                    break
                if not self.random_epoch(epoch, first + epoch * rounds_of(self.steps), advance):
                    return
                loss = float(sum_over_processes(self.losses[epoch]).mean())
                self.gaps.append(loss - uniform_optimum(self.shards.table.shape[1], self.t))
        first += self.epochs * rounds_of(self.steps)
        with _progress("parting neighbours", self.neighbor_epochs * self.shards.m) as advance:
            for epoch in range(self.neighbor_epochs):
                rounds = rounds_of(len(self.neighbor_sizes))
                if not self.neighbor_epoch(epoch, first + epoch * rounds, advance):
                    return

    def closed_form(self) -> bool:
        """Centre or whiten all rows; False if time was up before."""
        transform = self.recovery.remember("transform", lambda: closed_form(self.shards, self.start))

        def act(round: Round, rows: Tensor) -> Tensor:
            return apply(transform, rows).to(rows.dtype)

        def rounds(skip: int) -> Iterator[Round]:
            return self.shards.blocks(ROWS_A_BLOCK, 0, skip)

        with _progress(f"start: {self.start}", self.shards.m) as advance:
            return self.stage(0, self.blocks, rounds, act, lambda round: advance(len(round.rows) * world_size()))

    def random_epoch(self, epoch: int, first: int, advance: Callable[..., None]) -> bool:
        """Step random subsets; False if time was up before all were."""
        optimum = uniform_optimum(self.shards.table.shape[1], self.t)

        def act(round: Round, rows: Tensor) -> Tensor:
            subset = self.shards.collect(round, rows)
            if len(subset):
                seed = self.seed * 1_000_003 + epoch * self.steps + round.subset
                everything = torch.arange(len(subset), device=subset.device)
                loss = uniformity_step_(subset, everything, lr=self.lr, t=self.t, seed=seed)
                self.losses[epoch, round.subset] = loss
            return self.shards.give_back(round, subset)

        def rounds(skip: int) -> Iterator[Round]:
            return self.shards.rounds(random_subsets(self.shards.m, self.steps, self.seed, epoch), first, skip)

        def report(round: Round) -> None:
            gap = float(self.losses[epoch, round.subset]) - optimum if len(round.place) else 0.0
            advance(len(round.place) * world_size(), note=f"gap {gap:.4f}")

        return self.stage(first, rounds_of(self.steps), rounds, act, report)

    def neighbor_epoch(self, epoch: int, first: int, advance: Callable[..., None]) -> bool:
        """Step subsets of neighbours; False if time was up before all were."""
        name = f"order-{epoch}"

        def act(round: Round, rows: Tensor) -> Tensor:
            subset = self.shards.collect(round, rows)
            largest = -torch.inf
            for leaf in self.leaves_of(round.subset, subset.device):
                largest = max(largest, float(max_cosine(subset[leaf])[0].max()))
                seed = self.seed * 1_000_003 + epoch * len(self.neighbor_sizes) + round.subset
                uniformity_step_(subset, leaf, lr=NEIGHBOR_LR, t=NEIGHBOR_T, seed=seed)
            if len(subset):
                self.cosines[epoch, round.subset] = largest
            return self.shards.give_back(round, subset)

        def rounds(skip: int) -> Iterator[Round]:
            order = self.recovery.remember(name, lambda: self.neighbor_order(self.seed * 1_000_003 + epoch))
            return self.shards.rounds(order.split(self.neighbor_sizes), first, skip)

        def report(round: Round) -> None:
            largest = float(self.cosines[epoch, round.subset]) if len(round.place) else 0.0
            advance(len(round.place) * world_size(), note=f"largest cosine {largest:.3f}")

        whole = self.stage(first, rounds_of(len(self.neighbor_sizes)), rounds, act, report)
        self.recovery.forget(name)
        return whole

    def stage(
        self,
        first: int,
        count: int,
        rounds: Callable[[int], Iterator[Round]],
        act: Callable[[Round, Tensor], Tensor],
        report: Callable[[Round], None],
    ) -> bool:
        """Do the rounds [first, first + count) that are not done yet: ``act`` makes new rows from a round's."""
        skip = max(self.finished - first, 0)
        if skip >= count:
            return True
        self.finished = first + skip
        with closing(prefetched(rounds(skip), self.load, self.shards.device)) as loaded:
            for round, rows in loaded:
                if self.deadline is not None and not least_of_processes(time.monotonic() < self.deadline):
                    return False
                moved = act(round, rows)
                self.whole = False
                self.shards.put(round.rows, moved)
                self.finished = round.number + 1
                self.whole = True
                self.recovery.done(self.finished, self.record)
                report(round)
        return True

    def load(self, round: Round) -> Tensor:
        """The round's own rows, where they are worked on."""
        rows = self.shards.take(round.rows)
        self.recovery.before(round, rows)
        return rows.to(self.shards.device)

    def neighbor_order(self, seed: int) -> Tensor:
        """All rows, neighbours together, the same on each process."""
        depth = (len(self.leaves) - 1).bit_length() - 1
        projections = project(self.shards, depth, seed)
        return neighbor_order(gather_rows(projections.to(self.shards.device)).cpu())

    def leaves_of(self, subset: int, device: torch.device) -> Iterator[Tensor]:
        """The places (n,) in a subset of neighbours that each of its leaves takes; none for a subset past the last."""
        bounds = self.leaves[subset * self.leaves_a_subset :][: self.leaves_a_subset + 1].tolist()
        for begin, end in pairwise(bounds):
            yield torch.arange(begin - bounds[0], end - bounds[0], device=device)

    def largest_cosine(self) -> Tensor:
        """() the largest cosine: of all pairs where all rows are judged, of neighbours where there are more."""
        shards = self.shards
        if shards.m <= SAMPLE:
            return max_cosine(shards.sample(torch.arange(shards.m)))[0].max()
        subsets = self.neighbor_order(self.seed).split(self.neighbor_sizes)
        largest = torch.full((1, 1), -torch.inf)
        with _progress("looking for near-duplicates", shards.m) as advance:
            rounds = shards.rounds(subsets, 0, 0)
            for round, rows in prefetched(rounds, lambda round: shards.take(round.rows), shards.device):
                subset = shards.collect(round, rows.to(shards.device))
                for leaf in self.leaves_of(round.subset, subset.device):
                    largest = largest.maximum(max_cosine(subset[leaf])[0].max().cpu())
                advance(len(round.place) * world_size())
        return gather_rows(largest.to(shards.device)).max().cpu()


def random_subsets(m: int, number: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """[0, m) in ``number`` random subsets: a function of seed and epoch alone, so a run can resume."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(m, generator=generator).tensor_split(number)


def _progress(description: str, total: int) -> AbstractContextManager[Callable[..., None]]:
    """The bar that the first process shows."""
    if rank() > 0 or total == 0:
        return nullcontext(lambda n, note="": None)
    return progress(description, total, "vectors")
