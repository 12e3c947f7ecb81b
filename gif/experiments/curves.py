"""Accuracy against how long was trained: each budget a run of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gif.documents import markdown_table, replace_block, require_block
from gif.errors import InputError
from gif.experiments.comparison import (
    PROCESSOR_SECONDS,
    Budget,
    Comparison,
    Rows,
    compare_epochs,
    mean_and_spread,
    show,
)
from gif.experiments.glyph_bench import CONTENDERS
from gif.files import write_text
from gif.plotting import figure, line_style, save_figure
from gif.progress import say

DRAWN = "0.0001"  # TAR at this FAR, which tells heads apart the longest
TABLES = {DRAWN: "TAR@0.0001", "0.001": "TAR@0.001", "rank1": "Rank-1"}
PICTURES = {"epochs": "epochs", "time": "processor time (minutes)"}
MINUTE = 60.0
MARGIN = 1.15  # of the picture, to each side
LEGEND_COLUMNS = 3


def accuracy_curves(
    output: Path, heads: Sequence[str], budget: Budget, epochs: Sequence[int], docs: Path | None
) -> None:
    """Train every head for each number of ``epochs``; write curves.md and draw accuracy against epochs and time.

    Raises ValueError where there are no epochs, or fewer than one.
    """
    if not epochs or min(epochs) < 1:
        raise InputError(f"wanted budgets of at least one epoch, such as 1,4,16, got {list(epochs)}")
    block = f"accuracy curves {budget.subject}"
    if docs is not None:
        require_block(docs, block)
    found = compare_epochs(output, {name: CONTENDERS[name] for name in heads}, budget, epochs)
    parts = []
    for measure, title in TABLES.items():
        columns, rows = _table(found, heads, measure)
        show(columns, rows, f"{title}, held-out identities of {budget.subject}, {budget.seeds} seeds")
        parts.append(f"{title} by epochs.\n\n{markdown_table(columns, rows)}")
    columns, rows = _minutes(found, heads)
    parts.append(f"Processor time of a run, minutes.\n\n{markdown_table(columns, rows)}")
    tables = "\n".join(parts)
    write_text(output / "curves.md", tables)
    for against in PICTURES:
        _plot(found, heads, against, output / f"curves-{against}.png")
    say(f"wrote {output / 'curves.md'}, drew {', '.join(str(output / f'curves-{name}.png') for name in PICTURES)}")
    if docs is not None:
        name = f"pictures/{block.replace(' ', '-')}"
        pictures = "\n\n".join(
            f"![TAR@{DRAWN} against {what}]({name}-{against}.png)" for against, what in PICTURES.items()
        )
        replace_block(docs, block, f"{pictures}\n\n{tables}")
        for against in PICTURES:
            _plot(found, heads, against, docs.parent / f"{name}-{against}.png")
        say(f"wrote the tables into {docs}")


def _table(found: Mapping[int, Comparison], heads: Sequence[str], measure: str) -> tuple[tuple[str, ...], Rows]:
    """A row a head, a column a budget: mean ± deviation over the seeds."""
    rows = [(name, *(mean_and_spread(runs.values(name, measure)) for runs in found.values())) for name in heads]
    return ("head", *(_in_words(count) for count in found)), rows


def _minutes(found: Mapping[int, Comparison], heads: Sequence[str]) -> tuple[tuple[str, ...], Rows]:
    rows = [(name, *(f"{_minutes_of(runs, name):.1f}" for runs in found.values())) for name in heads]
    return ("head", *(_in_words(count) for count in found)), rows


def _minutes_of(runs: Comparison, name: str) -> float:
    """Mean processor time of a head's runs; NaN where none is known."""
    seconds = [value for value in runs.values(name, PROCESSOR_SECONDS) if not math.isnan(value)]
    return float(np.mean(seconds)) / MINUTE if seconds else math.nan


def _in_words(epochs: int) -> str:
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _plot(found: Mapping[int, Comparison], heads: Sequence[str], against: str, path: Path) -> None:
    """A line a head through its means, in a band of one deviation to each side."""
    drawing, axes = figure(8.0, 6.0)
    axes.set_xscale("log")
    axes.set_xlabel(PICTURES[against])
    axes.set_ylabel(f"TAR@FAR={DRAWN}, held-out identities")
    widest = np.array([])
    for number, name in enumerate(heads):
        scores = np.array([runs.values(name, DRAWN) for runs in found.values()])
        places = np.array(list(found) if against == "epochs" else [_minutes_of(runs, name) for runs in found.values()])
        means, spreads, style = scores.mean(1), scores.std(1), line_style(number)
        axes.plot(places, means, marker="o", markersize=3.5, label=name, **style)
        axes.fill_between(places, means - spreads, means + spreads, color=style["color"], alpha=0.15, linewidth=0)
        widest = np.append(widest, places[np.isfinite(places)])
    if len(widest):  # what was not measured takes part in no limits, and a logarithm needs some
        axes.set_xlim(widest.min() / MARGIN, widest.max() * MARGIN)
    if against == "epochs":
        axes.set_xticks(list(found), [str(count) for count in found])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_formatter("{x:g}")
    columns = min(LEGEND_COLUMNS, len(heads))
    drawing.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small", handlelength=3
    )
    save_figure(drawing, path)
