"""Heads against each other on glyphs, over seeds, at equal budgets: what each part of the loss is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gif.documents import markdown_table, replace_block, require_block
from gif.errors import InputError
from gif.evaluation import plot_roc
from gif.experiments.comparison import (
    MEASURES,
    Comparison,
    Rows,
    compare,
    mean_and_spread,
    settings_of,
    show,
)
from gif.experiments.curves import accuracy_curves
from gif.experiments.glyph_bench import BATCH_SIZE, CONTENDERS, contenders_on
from gif.experiments.runs import Budget, Length, Machine
from gif.files import write_text
from gif.plotting import figure, line_style, save_figure
from gif.progress import say

RARITY = {"held-out": "tar", "training": "tar", "centres": "nearest_cosine"}
RARITY_TITLES = {
    "held-out": "held-out identities: TAR@FAR=0.001",
    "training": "training identities: TAR@FAR=0.001",
    "centres": "centres or code vectors: cosine to the nearest of the group",
}


def accuracy(
    output: Path = Path("runs/accuracy"),
    *,
    data: str = "glyphs",
    identities: int | None = None,
    heads: Sequence[str] = tuple(CONTENDERS),
    seeds: int = 3,
    epochs: int = 4,
    budgets: Sequence[int] | str | None = None,
    seconds: Sequence[int] | str | None = None,
    batch_size: int = BATCH_SIZE,
    split: int = 1,
    validation: bool = False,
    jobs: int = 1,
    compile: bool = False,
    records: Path | None = None,
    docs: Path | None = None,
) -> None:
    """Train every head with every seed, judge each on held-out identities, and write a table with mean and spread.

    All runs have the same identities, backbone, images and steps; a seed decides initial values, order of images and
    augmentation. An interrupted run continues when the same command is given again. Also by the number of images an
    identity has: two images each of equally many identities, so that only their rarity differs.

    With budgets, such as 1,4,16,64, it is a curve a head: accuracy against epochs and against processor time, each
    budget a run of its own with its own schedule. With seconds each head trains for the same processor time: as many
    steps as take so long here, by the time of some. Heads, budgets and seeds may be added to the output later.

    Args:
        output: folder for accuracy.md, roc.png, rarity.png and the runs; with budgets for curves.md, curves-time.png,
            of several budgets of epochs curves-epochs.png, and the runs.
        data: the data set; its held-out identities judge.
        identities: how many of the data set's identities there are, at random; all where not given.
        heads: which heads; all of them by default.
        seeds: runs of each head.
        epochs: passes over the training images in each run, without budgets.
        budgets: passes over the training images, several: runs of their own, for curves.
        seconds: processor time of a run, several: likewise.
        batch_size: images a step.
        split: seed of the split into training and held-out identities.
        validation: judge on identities taken from those to train on, and leave the held-out ones alone: for choices.
        jobs: runs that go on at once, each in a process of its own with its share of the processors.
        compile: torch.compile the backbone: minutes at first, and less time a step.
        records: with budgets or seconds, a folder of what runs scored, a file a head, such as this project's
            docs/records/glyphs: what it knows is not trained again, and what is trained is added.
        docs: a document whose block "accuracy DATA", or "accuracy DATA IDENTITIES", gets the tables, with budgets
            "accuracy curves DATA"; the pictures go into its folder pictures.
    """
    unknown = [head for head in heads if head not in CONTENDERS]
    if unknown or not heads:
        raise InputError(f"wanted heads among {list(CONTENDERS)}, got {list(heads)}")
    budget = Budget(
        data=data,
        identities=identities,
        split=split,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        validation=validation,
    )
    machine = Machine(jobs, compile)
    if lengths := [*_lengths("epochs", budgets), *_lengths("seconds", seconds)]:
        accuracy_curves(output, heads, budget, lengths, docs, machine, records)
        return
    if records is not None:
        raise InputError("records are of runs with --budgets or --seconds; give one, or leave --records out")
    block = f"accuracy {budget.subject}"
    if docs is not None:
        require_block(docs, block)
    chosen = {name: contenders_on(data)[name] for name in heads}
    found = compare(output, chosen, budget, settings_of("accuracy", budget, contenders_on(data)), machine)

    columns, rows = ("head", *MEASURES.values()), found.rows()
    show(columns, rows, f"held-out identities of {budget.subject}, mean ± deviation of {seeds} seeds, {epochs} epochs")
    parts = [markdown_table(columns, rows)]
    for what, title in RARITY_TITLES.items():
        columns, rows = _by_images(found, what)
        show(columns, rows, title)
        parts.append(f"{title[0].upper()}{title[1:]}.\n\n{markdown_table(columns, rows)}")
    tables = "\n".join(parts)
    write_text(output / "accuracy.md", tables)
    curves = {name: found.curve(name) for name in chosen}
    plot_roc(curves, output / "roc.png")
    _plot_rarity(found, output / "rarity.png")
    say(f"wrote {output / 'accuracy.md'}, drew {output / 'roc.png'} and {output / 'rarity.png'}")
    if docs is not None:
        pictures = f"pictures/{block.replace(' ', '-')}"
        replace_block(docs, block, f"{tables}\n![ROC]({pictures}-roc.png)\n\n![]({pictures}-rarity.png)")
        plot_roc(curves, docs.parent / f"{pictures}-roc.png")
        _plot_rarity(found, docs.parent / f"{pictures}-rarity.png")
        say(f"wrote the tables into {docs}")


def _lengths(unit: Literal["epochs", "seconds"], budgets: Sequence[int] | str | None) -> list[Length]:
    """Budgets of that unit: whole numbers, as such or as "1,4,16"."""
    given = budgets.split(",") if isinstance(budgets, str) else budgets or []
    try:
        return [Length(unit, int(count)) for count in given]
    except ValueError as error:
        raise InputError(f"wanted budgets of {unit} such as 1,4,16, got {budgets!r}") from error


def _scores(found: Comparison, name: str, what: str) -> dict[str, list[float]]:
    """One measure of rarity of a head by group, a value a seed; no group where the head has none of it."""
    results = [result["rarity"][what] for result in found.results(name)]
    return {group: [result[group][RARITY[what]] for result in results] for group in results[0]}


def _by_images(found: Comparison, what: str) -> tuple[tuple[str, ...], Rows]:
    scores = {name: _scores(found, name, what) for name in found.folders}
    groups = next((groups for groups in scores.values() if groups), {})
    rows = [
        (name, *(mean_and_spread(own[group]) if own else "none" for group in groups)) for name, own in scores.items()
    ]
    return ("head", *groups), rows


def _plot_rarity(found: Comparison, path: Path) -> None:
    drawing, panels = figure(13.0, 4.2, columns=len(RARITY))
    for axes, (what, title) in zip(panels, RARITY_TITLES.items(), strict=True):
        for number, name in enumerate(found.folders):
            groups = _scores(found, name, what)
            means = np.array([np.mean(values) for values in groups.values()])
            spread = np.array([np.std(values) for values in groups.values()])
            axes.errorbar(list(groups), means, spread, marker="o", capsize=2, label=name, **line_style(number))
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("images an identity has")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(found.folders)))
    save_figure(drawing, path)
