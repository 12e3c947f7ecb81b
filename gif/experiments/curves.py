"""Accuracy against how long was trained: each budget a run of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gif.data.loading import WORDS
from gif.documents import markdown_table, replace_block, require_block
from gif.experiments.comparison import Comparison, Rows, compare_lengths, mean_and_spread, show
from gif.experiments.glyph_bench import contenders_on
from gif.experiments.records import recorded_results
from gif.experiments.runs import HEAD_BYTES, PROCESSOR, PROCESSOR_SECONDS, Budget, Length, Machine
from gif.files import write_text
from gif.plotting import figure, line_style, save_figure
from gif.progress import say

Against = Literal["epochs", "time"]
AXES: dict[Against, str] = {"epochs": "epochs", "time": "processor time (minutes)"}
MINUTE = 60.0
MIB = 1 << 20
MARGIN = 1.15  # of the picture, to each side
LEGEND_COLUMNS = 3
PANEL = (5.2, 4.2)  # inches, of several; one alone is larger
PANELS_A_ROW = 3


@dataclass(frozen=True)
class Measure:
    """What is tabulated: a key of a run's result, of one of the sets that judge where there are several."""

    key: str
    name: str
    of: str = ""
    drawn: bool = True

    @property
    def title(self) -> str:
        """The measure, and the set where there are several."""
        return f"{self.of}: {self.name}" if self.of else self.name


HELD_OUT = (
    Measure("0.0001", "TAR@0.0001"),  # which tells heads apart the longest
    Measure("0.001", "TAR@0.001", drawn=False),
    Measure("rank1", "rank-1", drawn=False),
)
OF_WORDS = (
    Measure("rank1", "rank-1", "alike"),
    Measure("0.001", "TAR@0.001", "alike"),
    Measure("0.0001", "TAR@0.0001", "new"),
    Measure("1e-05", "TAR@0.00001", "new"),
    Measure("1e-05", "TAR@0.00001", "recombined"),
    Measure("0.001", "TAR@0.001", "alike-recombined"),
)
VALIDATION_SETS = ("alike", "new")  # of letters that nobody else has
Found = Mapping[Length, Comparison]


def accuracy_curves(
    output: Path,
    heads: Sequence[str],
    budget: Budget,
    lengths: Sequence[Length],
    docs: Path | None,
    machine: Machine,
    records: Path | None = None,
) -> None:
    """Train every head for each of ``lengths``; write curves.md, draw accuracy against epochs and time."""
    block = f"accuracy curves {budget.subject}"
    if docs is not None:
        require_block(docs, block)
    found = compare_lengths(
        output, {name: contenders_on(budget.data)[name] for name in heads}, budget, lengths, machine, records
    )
    measures = _measures(budget)
    judged = f"{'validation' if budget.validation else 'held-out'} identities of {budget.subject}, {budget.seeds} seeds"
    parts = []
    for measure in measures:
        columns, rows = _table(found, heads, measure)
        show(columns, rows, f"{measure.title}, {judged}")
        parts.append(f"{measure.title[0].upper()}{measure.title[1:]}.\n\n{markdown_table(columns, rows)}")
    paces = _paces(found, heads, records)
    columns, rows = _costs(found, heads, paces)
    whose = "all at the pace of one kind of processor" if paces else "as it was given, for no kind of processor has all"
    parts.append(
        f"Processor time of a run in minutes, {whose}, and what the head keeps.\n\n{markdown_table(columns, rows)}"
    )
    tables = "\n".join(parts)
    write_text(output / "curves.md", tables)
    of_epochs = all(length.unit == "epochs" for length in found)
    told = paces or not of_epochs
    pictures: list[Against] = ["epochs"] if of_epochs and (len(found) > 1 or not told) else []  # one tells nothing more
    if told:
        pictures.append("time")
    else:
        say("no kind of processor has trained every head: nothing is drawn against time")
    for against in pictures:
        _plot(found, heads, measures, against, paces, output / f"curves-{against}.png")
    say(f"wrote {output / 'curves.md'}, drew {', '.join(str(output / f'curves-{name}.png') for name in pictures)}")
    if docs is not None:
        name = f"pictures/{block.replace(' ', '-')}"
        shown = "\n\n".join(f"![Accuracy against {against}]({name}-{against}.png)" for against in pictures)
        replace_block(docs, block, f"{shown}\n\n{tables}")
        for against in pictures:
            _plot(found, heads, measures, against, paces, docs.parent / f"{name}-{against}.png")
        say(f"wrote the tables into {docs}")


def _measures(budget: Budget) -> Sequence[Measure]:
    if budget.data not in WORDS:
        return HELD_OUT
    return [measure for measure in OF_WORDS if not budget.validation or measure.of in VALIDATION_SETS]


def _table(found: Found, heads: Sequence[str], measure: Measure) -> tuple[tuple[str, ...], Rows]:
    """A row a head, a column a budget: mean ± deviation over the seeds."""
    rows = [
        (name, *(mean_and_spread(runs.values(name, measure.key, measure.of)) for runs in found.values()))
        for name in heads
    ]
    return ("head", *map(str, found)), rows


def _costs(found: Found, heads: Sequence[str], paces: Mapping[str, float]) -> tuple[tuple[str, ...], Rows]:
    """Minutes of each budget, and MiB that the head keeps from step to step."""
    *_, last = found.values()
    rows = [
        (
            name,
            *(_told(_minutes(length, runs, name, paces)) for length, runs in found.items()),
            f"{float(np.mean(last.values(name, HEAD_BYTES))) / MIB:,.1f}",
        )
        for name in heads
    ]
    return ("head", *map(str, found), "MiB"), rows


def _told(minutes: float) -> str:
    return f"{minutes:.1f}" if math.isfinite(minutes) else "-"


def _minutes(length: Length, runs: Comparison, name: str, paces: Mapping[str, float]) -> float:
    """Processor time of a head's runs at its pace; where that is not known what they were given, NaN for epochs."""
    if name in paces:
        return float(np.mean(runs.values(name, "steps"))) * paces[name] / MINUTE
    return length.count / MINUTE if length.unit == "seconds" else math.nan


def _paces(found: Found, heads: Sequence[str], records: Path | None) -> dict[str, float]:
    """Seconds of processor time a step of each head, by the longest runs that one kind of processor has of all.

    Those of ``records`` count too, of any length. Runs may come from several machines, and times of two tell nothing of
    their heads. Empty where no kind has all.
    """
    by_length = [{name: runs.results(name) for name in heads} for runs in reversed(list(found.values()))]
    for results in [*recorded_results(records, heads), *by_length]:
        of_heads = {name: _seconds_a_step(results.get(name, [])) for name in heads}
        if common := set.intersection(*map(set, of_heads.values())):
            return {name: float(np.median(seconds[min(common)])) for name, seconds in of_heads.items()}
    return {}


def _seconds_a_step(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds a step of runs, by kind of processor, where they are known."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result.get(PROCESSOR_SECONDS) is not None:
            found.setdefault(result.get(PROCESSOR, ""), []).append(result[PROCESSOR_SECONDS] / result["steps"])
    return found


def _plot(
    found: Found,
    heads: Sequence[str],
    measures: Sequence[Measure],
    against: Against,
    paces: Mapping[str, float],
    path: Path,
) -> None:
    """A panel a measure, a line a head through its means, in a band of one deviation to each side, or bars."""
    drawn = [measure for measure in measures if measure.drawn]
    columns = min(PANELS_A_ROW, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    size = (8.0, 6.0) if len(drawn) == 1 else (PANEL[0] * columns, PANEL[1] * rows)
    drawing, panels = figure(*size, columns=columns, rows=rows)
    first, *others = np.atleast_1d(panels)
    for axes in others[len(drawn) - 1 :]:
        axes.set_visible(False)
    for measure, axes in zip(drawn, (first, *others), strict=False):
        _panel(axes, found, heads, measure, against, paces)
    drawing.legend(
        *first.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(LEGEND_COLUMNS, len(heads)),
        fontsize="small",
        handlelength=3,
    )
    save_figure(drawing, path)


def _panel(
    axes: Any, found: Found, heads: Sequence[str], measure: Measure, against: Against, paces: Mapping[str, float]
) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(AXES[against])
    axes.set_ylabel(measure.title if measure.of else f"{measure.title}, held-out identities")
    widest = np.array([])
    for number, name in enumerate(heads):
        scores = np.array([runs.values(name, measure.key, measure.of) for runs in found.values()])
        counts = [length.count for length in found]
        minutes = [_minutes(length, runs, name, paces) for length, runs in found.items()]
        places = np.array(counts if against == "epochs" else minutes)
        means, spreads, style = scores.mean(1), scores.std(1), line_style(number)
        axes.plot(places, means, marker="o", markersize=3.5, label=name, **style)
        axes.fill_between(places, means - spreads, means + spreads, color=style["color"], alpha=0.15, linewidth=0)
        if len(places) == 1:  # a band of no width
            axes.errorbar(places, means, spreads, fmt="none", capsize=3, color=style["color"])
        widest = np.append(widest, places)
    axes.set_xlim(widest.min() / MARGIN, widest.max() * MARGIN)
    if against == "epochs":
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
