"""Contenders trained at equal budgets over seeds, each run kept, and what they scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gif.evaluation import Roc
from gif.experiments.glyph_bench import Contender, bench_settings, contender_settings, folder_name
from gif.experiments.records import recorded
from gif.experiments.runs import PACE, RESULT, ROC_FORMAT, Budget, Length, Machine, Run, train_missing
from gif.files import load_tensors, read_json
from gif.ownership import existing, hold
from gif.progress import new_table, print_table
from gif.resume import RECORD, claim_folder

MEASURES = {"rank1": "rank-1", "0.001": "TAR@0.001", "0.0001": "TAR@0.0001", "pair_accuracy": "pairs"}

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Comparison:
    """Every run's folder, by contender and seed."""

    folders: dict[str, list[Path]]

    def results(self, name: str) -> list[dict[str, Any]]:
        """What the runs of a contender scored, a dictionary a seed."""
        return [read_json(folder / RESULT) for folder in self.folders[name]]

    def values(self, name: str, measure: str, of: str = "") -> list[float]:
        """One of ``MEASURES``, or of what else a result has, of a contender, a value a seed; NaN where it is not known.

        ``of``: as judged by the set of that name, where there are several.
        """
        judged = [result["sets"][of] if of else result for result in self.results(name)]
        found = [{**result["tar"], **result}.get(measure) for result in judged]
        return [math.nan if value is None else value for value in found]

    def rows(self) -> Rows:
        """Name and measures of each contender, mean ± deviation over its seeds."""
        return [(name, *(mean_and_spread(self.values(name, measure)) for measure in MEASURES)) for name in self.folders]

    def curve(self, name: str) -> Roc:
        """The ROC of a contender's first seed."""
        tensors, _ = load_tensors(self.folders[name][0] / "roc.safetensors", format=ROC_FORMAT)
        return Roc(**{key: values.numpy() for key, values in tensors.items()})


def compare(
    output: Path,
    contenders: Mapping[str, Contender],
    budget: Budget,
    settings: dict[str, Any],
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    length: Length | None = None,
    paced_by: Mapping[str, str] | None = None,
) -> Comparison:
    """Train every contender with every seed and judge it; runs that ``output`` holds already are not repeated.

    ``settings`` is what else the folder belongs to. ``length`` of a run: the budget's epochs where none is given. A
    contender takes the steps of the one that it is ``paced_by``, where a run is so many seconds. An interrupted run
    continues.
    """
    paced_by = paced_by or {}
    seeds = range(budget.seeds)
    folders = {name: [output / folder_name(name) / f"seed-{seed}" for seed in seeds] for name in contenders}
    length = length or Length("epochs", budget.epochs)
    runs = [
        Run(name, contender, length, seed, folders[name][seed], output / folder_name(paced_by.get(name, name)) / PACE)
        for seed in seeds
        for name, contender in contenders.items()
    ]
    with hold(output, existing(output / RECORD)):
        claim_folder(output, settings)
        train_missing(output, budget, runs, machine)
    return Comparison(folders)


def compare_lengths(
    output: Path,
    contenders: Mapping[str, Contender],
    budget: Budget,
    lengths: Sequence[Length],
    machine: Machine = Machine(),  # noqa: B008 (frozen)
    records: Path | None = None,
) -> dict[Length, Comparison]:
    """`compare` for each of ``lengths``: runs of their own, each with its whole schedule of learning rates.

    A head's runs are in a folder of its own, output/head/epochs-N/seed-S, with that head's settings: other heads, more
    lengths and more seeds may join them later. The shortest are trained first. Runs that ``records`` knows are not
    trained, and those that were are added to it.
    """
    seeds = range(budget.seeds)
    ordered = sorted(set(lengths), key=lambda length: (length.unit, length.count))
    runs = [
        Run(
            name,
            contender,
            length,
            seed,
            output / folder_name(name) / length.folder / f"seed-{seed}",
            output / folder_name(name) / PACE,
        )
        for length in ordered
        for seed in seeds
        for name, contender in contenders.items()
    ]
    with hold(output, existing(output / RECORD)):
        shared = settings_of("accuracy by epochs", budget, {})
        shared = {name: value for name, value in shared.items() if name not in ("epochs", "recipes")}
        claim_folder(output, shared)
        for name, contender in contenders.items():
            claim_folder(output / folder_name(name), contender_settings(contender))
        with recorded(records, shared, runs):
            train_missing(output, budget, runs, machine)
    return {
        length: Comparison(
            {name: [run.folder for run in runs if (run.name, run.length) == (name, length)] for name in contenders}
        )
        for length in ordered
    }


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
