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
from gif.experiments.glyph_bench import Contender, GlyphBench, bench_settings, folder_name
from gif.files import load_tensors, read_json, save_tensors, write_text
from gif.ownership import existing, hold
from gif.progress import new_table, print_table, say
from gif.resume import RECORD, claim_folder
from gif.training import TrainingConfig

ROC_FORMAT = "gif.roc/1"
MEASURES = {"rank1": "rank-1", "0.001": "TAR@0.001", "0.0001": "TAR@0.0001", "pair_accuracy": "pairs"}

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
        """One of ``MEASURES`` of a contender, a value a seed; NaN where it could not be measured."""
        found = [{**result["tar"], **result}[measure] for result in self.results(name)]
        return [math.nan if value is None else value for value in found]

    def rows(self) -> Rows:
        """Name and measures of each contender, mean ± deviation over its seeds."""
        return [(name, *(mean_and_spread(self.values(name, measure)) for measure in MEASURES)) for name in self.folders]

    def curve(self, name: str) -> Roc:
        """The ROC of a contender's first seed."""
        tensors, _ = load_tensors(self.folders[name][0] / "roc.safetensors", format=ROC_FORMAT)
        return Roc(**{key: values.numpy() for key, values in tensors.items()})


def compare(output: Path, contenders: Mapping[str, Contender], budget: Budget, settings: dict[str, Any]) -> Comparison:
    """Train every contender with every seed and judge it; runs that ``output`` holds already are not repeated.

    ``settings`` is what else the folder belongs to. An interrupted run continues.
    """
    with hold(output, existing(output / RECORD)):
        return _compare(output, contenders, budget, settings)


def _compare(output: Path, contenders: Mapping[str, Contender], budget: Budget, settings: dict[str, Any]) -> Comparison:
    claim_folder(output, settings)
    seeds = range(budget.seeds)
    folders = {name: [output / folder_name(name) / f"seed-{seed}" for seed in seeds] for name in contenders}
    missing = [
        (name, seed, folders[name][seed])
        for seed in seeds
        for name in contenders
        if not (folders[name][seed] / "result.json").exists()
    ]
    if missing:
        bench = GlyphBench.prepare(
            budget.split, data=budget.data, identities=budget.identities, validation=budget.validation
        )
        claim_folder(output / "data", bench.data.train.summary())
        for number, (name, seed, folder) in enumerate(missing, 1):
            say(f"run {number} of {len(missing)}: {name}, seed {seed}")
            training = TrainingConfig(epochs=budget.epochs, batch_size=budget.batch_size, seed=seed)
            result = bench.run(name, contenders[name], training, folder)
            roc = result.judgement.roc
            curve = {"fpr": roc.fpr, "tpr": roc.tpr, "thresholds": roc.thresholds}
            save_tensors(folder / "roc.safetensors", _tensors(curve), format=ROC_FORMAT)
            found = {**result.judgement.to_dict(), "rarity": result.rarity}
            write_text(folder / "result.json", json.dumps(found, indent=2))
            judged = result.judgement
            tar = ", ".join(f"TAR@{far:g} {judged.tar_in_words(far, 3)}" for far in judged.tar)
            say(f"{name}, seed {seed}: rank-1 {judged.rank1:.3f}, {tar}")
    return Comparison(folders)


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
