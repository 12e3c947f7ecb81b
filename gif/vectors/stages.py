"""The stages of spreading, and what runs them in order: a closed form, epochs of random subsets, epochs of neighbours.

Every stage has one shape: passes over the table, each of rounds that share no row. The rounds of all passes of all
stages are numbered through, whether or not they are needed, so that a number says where a run was.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from gif.distributed import least_of_processes, sum_over_processes, world_size
from gif.progress import progress, say_resumed
from gif.seeds import seed_of
from gif.vectors.closed_form import ROWS_A_BLOCK, apply_closed_form, fit_closed_form
from gif.vectors.config import SpreadConfig
from gif.vectors.distributed_table import DistributedTable, Round, prefetched, rounds_of
from gif.vectors.neighbors import NeighborSubsets
from gif.vectors.quality import uniform_optimum
from gif.vectors.recovery import Recovery
from gif_kernels import max_cosine, uniformity_step_

NEIGHBOR_T, NEIGHBOR_LR = 4.0, 0.01
"""Of the potential among neighbours: a larger t parts near-duplicates, and costs the order of the others less."""


class Stage(ABC):
    """Some passes over the table, of as many rounds each.

    title: what its bar says. passes: how often it goes over the table. rounds: of one pass, on each process. subsets:
    of one pass, of all processes. record: (passes, subsets) float64, a number for each subset that this process has
    stepped, which is kept in checkpoints.
    """

    title: str

    def __init__(self, passes: int, rounds: int, subsets: int) -> None:
        self.passes = passes
        self.rounds = rounds
        self.subsets = subsets
        self.record = torch.zeros(passes, subsets, dtype=torch.float64)

    @property
    def reached(self) -> bool:
        """Whether the passes that are left are not needed."""
        return False

    @abstractmethod
    def begin(self, number: int, first: int, skip: int) -> Iterator[Round]:
        """The rounds of pass ``number``, numbered from ``first``, without the first ``skip``."""

    @abstractmethod
    def step(self, number: int, round: Round, rows: Tensor) -> Tensor:
        """What becomes of the ``rows`` that this process gives to a round."""

    def note(self, number: int, round: Round) -> str:
        """What the bar says after a round."""
        return ""

    def end(self, number: int, *, whole: bool) -> None:  # noqa: B027 (a closed form has nothing to end)
        """Pass ``number`` is over, and ``whole`` unless time was up before."""


class ClosedFormPass(Stage):
    """Every row moved by a closed form: one pass, or none."""

    def __init__(self, table: DistributedTable, config: SpreadConfig, recovery: Recovery) -> None:
        super().__init__(int(config.start != "none"), table.number_of_blocks(ROWS_A_BLOCK), 0)
        self.title = f"start: {config.start}"
        self._table = table
        self._form = config.start
        self._recovery = recovery

    def begin(self, number: int, first: int, skip: int) -> Iterator[Round]:
        self._transform = self._recovery.remember("transform", lambda: fit_closed_form(self._table, self._form))
        return self._table.blocks(ROWS_A_BLOCK, first, skip)

    def step(self, number: int, round: Round, rows: Tensor) -> Tensor:
        return apply_closed_form(self._transform, rows).to(rows.dtype)


class RandomEpochs(Stage):
    """Epochs of random subsets, until the mean gap of one is below the target. ``gaps`` has that of each."""

    title = "spreading code vectors"

    def __init__(self, table: DistributedTable, config: SpreadConfig) -> None:
        steps = max(table.m // config.batch, 1)
        super().__init__(config.epochs, rounds_of(steps), steps)
        self.gaps: list[float] = []
        self._table = table
        self._config = config
        self._optimum = uniform_optimum(table.width, config.t)

    @property
    def reached(self) -> bool:
        target = self._config.target_gap
        return bool(self.gaps) and target is not None and self.gaps[-1] < target

    def begin(self, number: int, first: int, skip: int) -> Iterator[Round]:
        subsets = random_subsets(self._table.m, self.subsets, self._config.seed, number)
        return self._table.rounds(subsets, first, skip)

    def step(self, number: int, round: Round, rows: Tensor) -> Tensor:
        subset = self._table.collect(round, rows)
        if len(subset):
            seed = seed_of(self._config.seed, number * self.subsets + round.subset)
            every = torch.arange(len(subset), device=subset.device)
            loss = uniformity_step_(subset, every, lr=self._config.lr, t=self._config.t, seed=seed)
            self.record[number, round.subset] = loss
        return self._table.give_back(round, subset)

    def note(self, number: int, round: Round) -> str:
        gap = float(self.record[number, round.subset]) - self._optimum if len(round.place) else 0.0
        return f"gap {gap:.4f}"

    def end(self, number: int, *, whole: bool) -> None:
        if whole:
            self.gaps.append(float(sum_over_processes(self.record[number]).mean()) - self._optimum)


class NeighborEpochs(Stage):
    """Epochs of subsets of neighbours, another tree of them each epoch. ``record`` has each subset's largest cosine."""

    title = "parting neighbours"

    def __init__(
        self, table: DistributedTable, config: SpreadConfig, neighbors: NeighborSubsets, recovery: Recovery
    ) -> None:
        super().__init__(config.neighbor_epochs, rounds_of(len(neighbors.sizes)), len(neighbors.sizes))
        self._table = table
        self._seed = config.seed
        self._neighbors = neighbors
        self._recovery = recovery

    def largest_cosines(self) -> list[float]:
        """The largest cosine that was met in each epoch, by any process."""
        return [float(found) for found in sum_over_processes(self.record).amax(1)]

    def begin(self, number: int, first: int, skip: int) -> Iterator[Round]:
        order = self._recovery.remember(_order_of(number), lambda: self._neighbors.order(seed_of(self._seed, number)))
        return self._table.rounds(self._neighbors.subsets(order), first, skip)

    def step(self, number: int, round: Round, rows: Tensor) -> Tensor:
        subset = self._table.collect(round, rows)
        seed, largest = seed_of(self._seed, number * self.subsets + round.subset), -torch.inf
        for leaf in self._neighbors.leaves(round.subset, subset.device):
            largest = max(largest, float(max_cosine(subset[leaf])[0].max()))
            uniformity_step_(subset, leaf, lr=NEIGHBOR_LR, t=NEIGHBOR_T, seed=seed)
        if len(subset):
            self.record[number, round.subset] = largest
        return self._table.give_back(round, subset)

    def note(self, number: int, round: Round) -> str:
        largest = float(self.record[number, round.subset]) if len(round.place) else 0.0
        return f"largest cosine {largest:.3f}"

    def end(self, number: int, *, whole: bool) -> None:
        self._recovery.forget(_order_of(number))


class Driver:
    """Runs ``stages`` in order from the state that ``recovery`` has kept, until all are done or time is up.

    ``deadline``: of `time.monotonic`, or None.
    """

    def __init__(
        self, table: DistributedTable, stages: Sequence[Stage], recovery: Recovery, deadline: float | None
    ) -> None:
        self._table = table
        self._stages = stages
        self._recovery = recovery
        self._deadline = deadline
        self._finished = 0  # rounds
        self._whole = True  # the table is that after so many rounds
        self._record = torch.cat([stage.record.flatten() for stage in stages])
        for stage, part in zip(stages, self._record.split([stage.record.numel() for stage in stages]), strict=True):
            stage.record = part.view(stage.record.shape)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """Continue where an earlier run was; where this one is interrupted, keep where it is."""
        self._finished = self._recovery.load(self._record)
        rounds = sum(stage.passes * stage.rounds for stage in self._stages)
        say_resumed("spreading", self._finished, rounds, "round")
        try:
            yield
        except BaseException:
            if self._whole:
                self._recovery.interrupted(self._finished, self._record)
            raise

    def finish(self, *, keep: bool) -> None:
        """The run has come to its end: drop what was kept of it, or ``keep`` its end."""
        self._recovery.finish(self._finished, self._record, keep=keep)

    def run(self) -> None:
        """All stages, or those that the time leaves."""
        first = 0
        for stage in self._stages:
            if stage.passes and not self._run_stage(stage, first):
                return
            first += stage.passes * stage.rounds

    def _run_stage(self, stage: Stage, first: int) -> bool:
        """The passes of a stage, whose rounds are numbered from ``first``; False if time was up before."""
        rounds = stage.passes * stage.rounds
        done = min(max(self._finished - first, 0), rounds) * stage.passes * self._table.m // max(rounds, 1)
        with progress(stage.title, stage.passes * self._table.m, "vectors", done=done) as advance:
            for number in range(stage.passes):
                if stage.reached:
                    break
                whole = self._run_pass(stage, number, first + number * stage.rounds, advance)
                stage.end(number, whole=whole)
                if not whole:
                    return False
        return True

    def _run_pass(self, stage: Stage, number: int, first: int, advance: Callable[..., None]) -> bool:
        """The rounds of a pass that are not done yet; False if time was up before."""
        skip = max(self._finished - first, 0)
        if skip >= stage.rounds:
            return True
        self._finished = first + skip
        rounds = stage.begin(number, first, skip)
        with closing(prefetched(rounds, self._load, self._table.device)) as loaded:
            for round, rows in loaded:
                if self._deadline is not None and not least_of_processes(time.monotonic() < self._deadline):
                    return False
                moved = stage.step(number, round, rows)
                self._whole = False
                self._table.put(round.rows, moved)
                self._finished = round.number + 1
                self._whole = True
                self._recovery.done(self._finished, self._record)
                advance(len(round.place) * world_size(), note=stage.note(number, round))
        return True

    def _load(self, round: Round) -> Tensor:
        """The round's own rows, where they are worked on."""
        rows = self._table.take(round.rows)
        self._recovery.before(round, rows)
        return rows.to(self._table.device)


def random_subsets(m: int, number: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """[0, m) in ``number`` random subsets: a function of seed and epoch alone, so a run can resume."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(m, generator=generator).tensor_split(number)


def _order_of(epoch: int) -> str:
    """By what name the order of an epoch of neighbours is remembered."""
    return f"order-{epoch}"
