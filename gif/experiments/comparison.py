"""Contenders trained at equal budgets over seeds, each run kept, and what they scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gif.errors import InputError
from gif.evaluation import Roc
from gif.experiments.glyph_bench import Contender, GlyphBench, bench_settings, contender_settings, folder_name
from gif.files import load_tensors, read_json, save_tensors, write_text
from gif.ownership import existing, hold
from gif.progress import new_table, print_table, say
from gif.resume import RECORD, claim_folder
from gif.training import TrainingConfig

ROC_FORMAT = "gif.roc/1"
MEASURES = {"rank1": "rank-1", "0.001": "TAR@0.001", "0.0001": "TAR@0.0001", "pair_accuracy": "pairs"}
PROCESSOR_SECONDS = "processor_seconds"

Rows = list[tuple[str, ...]]


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


@dataclass(frozen=True)
class Comparison:
    """Every run's folder, by contender and seed."""

    folders: dict[str, list[Path]]

    def results(self, name: str) -> list[dict[str, Any]]:
        """What the runs of a contender scored, a dictionary a seed."""
        return [read_json(folder / "result.json") for folder in self.folders[name]]

    def values(self, name: str, measure: str) -> list[float]:
        """One of ``MEASURES``, or ``PROCESSOR_SECONDS``, of a contender, a value a seed; NaN where it is not known."""
        found = [{**result["tar"], **result}.get(measure) for result in self.results(name)]
        return [math.nan if value is None else value for value in found]

    def rows(self) -> Rows:
        """Name and measures of each contender, mean ± deviation over its seeds."""
        return [(name, *(mean_and_spread(self.values(name, measure)) for measure in MEASURES)) for name in self.folders]

    def curve(self, name: str) -> Roc:
        """The ROC of a contender's first seed."""
        tensors, _ = load_tensors(self.folders[name][0] / "roc.safetensors", format=ROC_FORMAT)
        return Roc(**{key: values.numpy() for key, values in tensors.items()})


@dataclass(frozen=True)
class _Run:
    """One contender trained for some epochs with one seed, in a folder of its own."""

    name: str
    epochs: int
    seed: int
    folder: Path


def compare(output: Path, contenders: Mapping[str, Contender], budget: Budget, settings: dict[str, Any]) -> Comparison:
    """Train every contender with every seed and judge it; runs that ``output`` holds already are not repeated.

    ``settings`` is what else the folder belongs to. An interrupted run continues.
    """
    seeds = range(budget.seeds)
    folders = {name: [output / folder_name(name) / f"seed-{seed}" for seed in seeds] for name in contenders}
    runs = [_Run(name, budget.epochs, seed, folders[name][seed]) for seed in seeds for name in contenders]
    with hold(output, existing(output / RECORD)):
        claim_folder(output, settings)
        _train_missing(output, contenders, budget, runs)
    return Comparison(folders)


def compare_epochs(
    output: Path, contenders: Mapping[str, Contender], budget: Budget, epochs: Sequence[int]
) -> dict[int, Comparison]:
    """`compare` for each number of ``epochs``: runs of their own, each with its whole schedule of learning rates.

    A head's runs are in a folder of its own, output/head/epochs-N/seed-S, with that head's settings: other heads, more
    epochs and more seeds may join them later. The shortest are trained first.
    """
    seeds = range(budget.seeds)
    found = {
        count: Comparison(
            {
                name: [output / folder_name(name) / f"epochs-{count}" / f"seed-{seed}" for seed in seeds]
                for name in contenders
            }
        )
        for count in sorted(set(epochs))
    }
    runs = [
        _Run(name, count, seed, comparison.folders[name][seed])
        for count, comparison in found.items()
        for seed in seeds
        for name in contenders
    ]
    with hold(output, existing(output / RECORD)):
        shared = settings_of("accuracy by epochs", budget, {})
        claim_folder(output, {name: value for name, value in shared.items() if name not in ("epochs", "recipes")})
        for name, contender in contenders.items():
            claim_folder(output / folder_name(name), contender_settings(contender))
        _train_missing(output, contenders, budget, runs)
    return found


def _train_missing(output: Path, contenders: Mapping[str, Contender], budget: Budget, runs: Sequence[_Run]) -> None:
    """Train and judge each of ``runs`` that has no result yet."""
    missing = [run for run in runs if not (run.folder / "result.json").exists()]
    if not missing:
        return
    bench = GlyphBench.prepare(
        budget.split, data=budget.data, identities=budget.identities, validation=budget.validation
    )
    claim_folder(output / "data", bench.data.train.summary())
    for number, run in enumerate(missing, 1):
        say(f"run {number} of {len(missing)}: {run.name}, seed {run.seed}, {run.epochs} epochs")
        training = TrainingConfig(epochs=run.epochs, batch_size=budget.batch_size, seed=run.seed)
        result = bench.run(run.name, contenders[run.name], training, run.folder)
        judged = result.judgement
        curve = {"fpr": judged.roc.fpr, "tpr": judged.roc.tpr, "thresholds": judged.roc.thresholds}
        save_tensors(run.folder / "roc.safetensors", _tensors(curve), format=ROC_FORMAT)
        seconds = result.log.processor_seconds
        found = {
            **judged.to_dict(),
            "rarity": result.rarity,
            PROCESSOR_SECONDS: None if math.isnan(seconds) else seconds,
        }
        write_text(run.folder / "result.json", json.dumps(found, indent=2))
        tar = ", ".join(f"TAR@{far:g} {judged.tar_in_words(far, 3)}" for far in judged.tar)
        say(f"{run.name}, seed {run.seed}: rank-1 {judged.rank1:.3f}, {tar}")


def settings_of(command: str, budget: Budget, contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """What a folder of runs belongs to: everything but the number of seeds, which may grow."""
    budget_settings = {key: value for key, value in vars(budget).items() if key != "seeds"}
    return {"command": command, **budget_settings, **bench_settings(contenders)}


def mean_and_spread(values: Sequence[float]) -> str:
    """Write the mean ± the standard deviation of some values; a single value is written as it is."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def show(columns: Sequence[str], rows: Rows, title: str) -> None:
    """Print a table."""
    table = new_table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(values, dtype=np.float64)) for name, values in arrays.items()}
