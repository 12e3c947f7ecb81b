"""Runs: a contender trained for so long with one seed, judged, and kept in a folder of its own; several at a time."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from gif.devices import processor_name
from gif.errors import InputError
from gif.evaluation import Judgement, Roc
from gif.experiments.glyph_bench import Contender, GlyphBench
from gif.files import read_json, save_tensors, write_text
from gif.progress import progress, say
from gif.training import TrainingConfig

ROC_FORMAT = "gif.roc/1"
PROCESSOR_SECONDS, PROCESSOR = "processor_seconds", "processor"
HEAD_BYTES = "head_bytes"
SECONDS_A_STEP = "processor_seconds_a_step"
PACE = "pace.json"
RESULT = "result.json"
LOG = "log.txt"  # of a run in a process of its own: what it would have said
HELD_BACK = 5  # of a log's last lines, that an error tells


@dataclass(frozen=True)
class Budget:
    """What every run has in common.

    Args:
        data: the data set.
        identities: how many of the data set's, at random, before the split; all where None.
        split: seed of the split into training and judged identities, of code vectors and of codes.
        validation: whether to judge on identities taken from the training ones, not on the held-out ones.
        seeds: runs of each contender, which differ in initial values, order of images and augmentation.
        epochs: passes over the training images in a run.
        batch_size: images a step.

    Raises ValueError for fewer than one seed.
    """

    data: str = "glyphs"
    identities: int | None = None
    split: int = 1
    validation: bool = False
    seeds: int = 3
    epochs: int = 4
    batch_size: int = 128

    @property
    def subject(self) -> str:
        """The data set's name, and how many of its identities where not all: what a document calls it."""
        return self.data if self.identities is None else f"{self.data} {self.identities}"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"wanted at least one seed, got seeds={self.seeds}")

    def prepare(self, folder: Path | None = None) -> GlyphBench:
        """The data, code vectors and codes that every run shares; kept in ``folder``, where one is given."""
        return GlyphBench.prepare(
            self.split, data=self.data, identities=self.identities, validation=self.validation, folder=folder
        )


@dataclass(frozen=True)
class Machine:
    """What does not decide a result: how many runs go on at once, and whether backbones are compiled."""

    jobs: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"wanted at least one job, got jobs={self.jobs}")


@dataclass(frozen=True)
class Length:
    """How long a run trains: so many epochs, or as many steps as take so many seconds of processor time."""

    unit: Literal["epochs", "seconds"]
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"wanted budgets of at least one, such as 1,4,16, got {self.count} {self.unit}")

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return f"{self.unit}-{self.count}"

    def __str__(self) -> str:
        return f"{self.count:,} s" if self.unit == "seconds" else f"{self.count} epoch{'s' * (self.count > 1)}"


@dataclass(frozen=True)
class Run:
    """One contender, by its name, trained so long with one seed, in a folder of its own.

    ``pace`` is where it is kept how long a step takes, by which a run of some seconds counts its steps. Runs that share
    it take as many steps as each other: those of other seeds, and those that try another setting.
    """

    name: str
    contender: Contender
    length: Length
    seed: int
    folder: Path
    pace: Path

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).exists()

    @property
    def in_words(self) -> str:
        """Who, which and how long."""
        return f"{self.name}, seed {self.seed}, {self.length}"

    def train(self, bench: GlyphBench, batch_size: int, compile: bool) -> str:
        """Train, judge and keep it; returns what to say of it. An interrupted run continues."""
        training = self._for_its_length(TrainingConfig(batch_size=batch_size, seed=self.seed, compile=compile))
        result = bench.run(self.name, self.contender, training, self.folder)
        judged, seconds = result.judgement, result.log.processor_seconds
        save_tensors(self.folder / "roc.safetensors", _curve(judged.roc), format=ROC_FORMAT)
        found = {
            **judged.to_dict(),
            "sets": {name: of_set.to_dict() for name, of_set in result.sets.items()},
            "rarity": result.rarity,
            "steps": len(result.log.losses),
            HEAD_BYTES: result.head_bytes,
            PROCESSOR_SECONDS: None if math.isnan(seconds) else seconds,
            PROCESSOR: processor_name(),
        }
        write_text(self.folder / RESULT, json.dumps(found, indent=2))
        return f"{self.in_words}: {_in_words(judged)}"

    def _for_its_length(self, training: TrainingConfig) -> TrainingConfig:
        """``training`` for as long as this run's."""
        if self.length.unit == "epochs":
            return replace(training, epochs=self.length.count)
        return replace(training, steps=max(1, round(self.length.count / read_json(self.pace)[SECONDS_A_STEP])))


def train_missing(output: Path, budget: Budget, runs: Sequence[Run], machine: Machine) -> None:
    """Train and judge each of ``runs`` that has no result yet, as many at a time as ``machine`` says.

    What they share is kept in ``output`` / data. Where several go on at once each is a process with its share of the
    processors, and says what it has to say into its folder's log.txt.
    """
    missing = [run for run in runs if not run.done]
    if not missing:
        return
    bench = budget.prepare(output / "data")
    _find_paces(bench, missing, TrainingConfig(batch_size=budget.batch_size, compile=machine.compile))
    if machine.jobs == 1 or len(missing) == 1:
        for number, run in enumerate(missing, 1):
            say(f"run {number} of {len(missing)}: {run.in_words}")
            say(run.train(bench, budget.batch_size, machine.compile))
        return
    del bench
    jobs = min(machine.jobs, len(missing))
    work, units = sum(run.length.count for run in missing), " and ".join(sorted({run.length.unit for run in missing}))
    with _processes(jobs) as pool, progress(f"{len(missing)} runs", work, units) as advance:
        told = {pool.submit(_in_process, run, output / "data", budget, machine, jobs): run for run in missing}
        for future in as_completed(told):
            say(_outcome(future, told[future], jobs))
            advance(told[future].length.count)


def _find_paces(bench: GlyphBench, runs: Sequence[Run], training: TrainingConfig) -> None:
    """Time a step of each head that some run trains for so many seconds, in turns; kept, so that it is done once."""
    unknown = {run.pace: run for run in reversed(runs) if run.length.unit == "seconds" and not run.pace.exists()}
    found = bench.seconds_a_step([run.contender for run in unknown.values()], training)
    for (path, run), seconds in zip(unknown.items(), found, strict=True):
        write_text(path, json.dumps({SECONDS_A_STEP: seconds}))
        say(f"{run.name}: {1e3 * seconds:.1f} ms of processor time a step")


@contextmanager
def _processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end when this one does: interrupted, each keeps a checkpoint first."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _outcome(future: Future[str], run: Run, jobs: int) -> str:
    try:
        return future.result()
    except BrokenProcessPool as error:
        log = run.folder / LOG
        last = log.read_text(encoding="utf-8").splitlines()[-HELD_BACK:] if log.exists() else []
        raise InputError(
            f"a process of {jobs} that train was killed, as for want of memory; give fewer --jobs. The same command "
            f"continues. The last that {log} says: {' / '.join(last) or 'nothing'}"
        ) from error


class _Worker:
    """A process that trains one run after the other, until it is interrupted."""

    bench: GlyphBench | None = None
    interrupted: BaseException | None = None


def _in_process(run: Run, data: Path, budget: Budget, machine: Machine, jobs: int) -> str:
    """`Run.train` in a process of its own."""
    if _Worker.interrupted is not None:
        raise _Worker.interrupted
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with (run.folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log):
            _Worker.bench = _Worker.bench or budget.prepare(data)
            return run.train(_Worker.bench, budget.batch_size, machine.compile)
    except KeyboardInterrupt as stop:
        _Worker.interrupted = stop
        raise


def _in_words(judged: Judgement) -> str:
    tar = ", ".join(f"TAR@{far:g} {judged.tar_in_words(far, 3)}" for far in judged.tar)
    return f"rank-1 {judged.rank1:.3f}, {tar}"


def _curve(curve: Roc) -> dict[str, torch.Tensor]:
    arrays = {"fpr": curve.fpr, "tpr": curve.tpr, "thresholds": curve.thresholds}
    return {name: torch.from_numpy(values).double() for name, values in arrays.items()}
