"""Pictures of what was measured: cost against the number of identities, and shares of the roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from benchmarks import heads, spreading
from benchmarks.results import Measurement
from gif.plotting import COLORS, figure, save_figure

Picture = Callable[[Sequence[Measurement], Path], None]

CARD_BYTES = 80e9
"""Memory of a large GPU, to compare with."""
SPREAD_SIZES = (1_000_000, 4_000_000, 16_000_000, 64_000_000, 256_000_000)
POINTS = (7.5, 4.0)
"""Sizes of the first provider's points and of the last's: equal values stay visible."""
SHORT_AXIS = 50
"""Largest over smallest value of a logarithmic axis whose powers of ten would be too few labels."""
LEGEND_COLUMN = 2.3
"""Inches of a provider's name in a legend."""
BAR, MARGINS = 0.17, 1.3
"""Inches of a bar, and of what surrounds them all."""


LABELS: dict[str, Callable[..., str]] = {
    "s": lambda value, place: f"{value:,.0f} s" if value >= 1 else EngFormatter("s")(value),
    "B": EngFormatter("B"),
    "": lambda value, place: f"{value:g}",
}
"""How an axis writes values of a unit."""


@dataclass(frozen=True)
class Curve:
    """Values of one provider by the number of identities: ``measured``, and by formula."""

    measured: Mapping[int, float]
    formula: Mapping[int, float] = field(default_factory=dict)


def pictures(found: Sequence[Measurement]) -> dict[str, Picture]:
    """The pictures that the measurements of one kernel on one machine are enough for, by file name."""
    kernel = found[0].kernel
    drawn: dict[str, Picture] = {}
    if kernel in AGAINST_IDENTITIES and (kernel in PLANNED or len({m.identities for m in found}) > 1):
        drawn[f"bench-{kernel}.png"] = AGAINST_IDENTITIES[kernel]
    if any(m.roofline is not None for m in found):
        drawn[f"bench-{kernel}-roofline.png"] = draw_roofline
    return drawn


def draw_heads(found: Sequence[Measurement], path: Path) -> None:
    """Time and memory of each head; hollow where it did not fit: needed memory, and time in proportion to the work."""
    drawing, (time, memory) = figure(11.0, 4.6, columns=2)
    sizes = sorted({*heads.FULL, *_identities(found)})
    times, memories = {}, {}
    for name in _named(found, heads.HEADS):
        mine, head = _by_identities(found, name), heads.HEADS[name]
        largest = max(mine)
        beyond = [m for m in sizes if m > largest]
        held = {m: float(point.held_bytes) for m, point in mine.items()}
        taken = _seconds(mine, found)
        costs = {m: head.cost(m, heads.BATCH) for m in (largest, *beyond)}
        work = {m: cost.flops / costs[largest].flops for m, cost in costs.items()}
        times[name] = Curve(taken, {m: taken[largest] * share for m, share in work.items()} if beyond else {})
        needed = {m: costs[m].bytes for m in beyond}
        memories[name] = Curve(held, {largest: held[largest], **needed} if beyond else {})
    _draw(time, times, "s", "One training step of the head")
    _draw(memory, memories, "B", "Memory of the head")
    _draw_card(memory)
    _legend(drawing, times, formula=any(curve.formula for curve in times.values()))
    save_figure(drawing, path)


def draw_whole_steps(found: Sequence[Measurement], path: Path) -> None:
    """Time of a whole step, a panel a backbone; the backbone alone is the floor."""
    modes = list(dict.fromkeys(m.mode for m in found))
    drawing, panels = figure(2.0 + 5.0 * len(modes), 4.8, columns=len(modes))
    shown: dict[str, Curve] = {}
    for axes, mode in zip(panels if len(modes) > 1 else [panels], modes, strict=True):
        here = [m for m in found if m.mode == mode]
        names = _named(here, [heads.BACKBONE_ALONE, *heads.HEADS])
        curves = {name: Curve(_seconds(_by_identities(here, name), found)) for name in names}
        _draw(axes, curves, "s", f"One whole step, {mode}")
        shown |= curves
    _legend(drawing, shown, formula=False)
    save_figure(drawing, path)


def draw_spreading(found: Sequence[Measurement], path: Path) -> None:
    """Memory and speed of optimising code vectors, as in the supplement's Fig. 7, measured and planned."""
    drawing, (memory, speed) = figure(11.0, 4.6, columns=2)
    sizes = sorted({*SPREAD_SIZES, *_identities(found)})
    memories, speeds = {}, {}
    rates = [(m.provider, m.rates) for m in found if m.rates is not None]
    for name, spreader in spreading.SPREADERS.items():
        mine = _by_identities(found, name)
        planned = {m: spreader.memory(m) for m in sizes}
        memories[name] = Curve({m: float(point.held_bytes) for m, point in mine.items()}, planned)
        beside = [known for provider, known in rates if provider == name]  # calibrated right before it was timed
        known = next(iter([*beside, *(known for _, known in rates)]), None)
        steps = {} if known is None else {m: 1 / spreader.seconds(m, known) for m in sizes}
        speeds[name] = Curve({m: 1 / point.seconds for m, point in mine.items()}, steps)
    _draw(memory, memories, "B", "(a) Memory of optimising code vectors")
    _draw(speed, speeds, "", "(b) Steps a second")
    _draw_card(memory)
    _legend(drawing, memories, formula=True)
    save_figure(drawing, path)


def draw_potential(found: Sequence[Measurement], path: Path) -> None:
    """Time and memory of the potential over all pairs against the rows, of the headline width."""
    shown = [m for m in found if m.headline and m.dtype == found[0].dtype]
    drawing, (time, memory) = figure(11.0, 4.6, columns=2)
    names = list(dict.fromkeys(m.provider for m in shown))
    points = {name: _by_identities(shown, name) for name in names}
    times = {name: Curve({m: point.seconds for m, point in points[name].items()}) for name in names}
    memories = {name: Curve({m: float(point.held_bytes) for m, point in points[name].items()}) for name in names}
    _draw(time, times, "s", f"Potential and gradient, {shown[0].dtype}")
    _draw(memory, memories, "B", "Memory beyond the vectors")
    for axes in (time, memory):
        axes.set_xlabel("vectors")
    _legend(drawing, times, formula=False)
    save_figure(drawing, path)


def draw_roofline(found: Sequence[Measurement], path: Path) -> None:
    """Each provider's share of the roofline, a bar a headline point."""
    known = [(m, m.roofline) for m in found if m.roofline is not None and m.headline]
    points = list(dict.fromkeys(m.point for m, _ in known))
    providers = list(dict.fromkeys(m.provider for m, _ in known))
    drawing, axes = figure(11.0, MARGINS + BAR * (len(known) + len(points)))
    place, ticks = 0.0, []
    for point in points:
        here = [(m, share) for m, share in known if m.point == point]
        for number, (m, share) in enumerate(here):
            color = COLORS[providers.index(m.provider) % len(COLORS)]
            axes.barh(place + number, 100 * share, 0.9, color=color)
        ticks.append(place + (len(here) - 1) / 2)
        place += len(here) + 1
    axes.set_yticks(ticks, [" ".join(point) for point in points], fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.set_ylim(place - 1, -1)
    axes.set_xlabel("% of the roofline: a square product's FLOPs, or a large copy's bytes, a second in the same rounds")
    handles = [Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=6) for i in range(len(providers))]
    drawing.legend(handles, providers, loc="outside lower center", ncols=min(len(providers), 7), frameon=False)
    save_figure(drawing, path)


AGAINST_IDENTITIES: dict[str, Picture] = {
    "head": draw_heads,
    "whole_step": draw_whole_steps,
    "uniformity_step": draw_spreading,
    "gaussian_potential": draw_potential,
}
PLANNED = ("head", "uniformity_step")
"""Whose pictures formulas complete: one size is enough."""


def _named(found: Sequence[Measurement], order: Sequence[str] | Mapping[str, Any]) -> list[str]:
    there = {m.provider for m in found}
    return [name for name in order if name in there]


def _by_identities(found: Sequence[Measurement], provider: str) -> dict[int, Measurement]:
    mine = {m.identities: m for m in found if m.provider == provider and m.identities is not None}
    return dict(sorted(mine.items()))


def _identities(found: Sequence[Measurement]) -> set[int]:
    return {m.identities for m in found if m.identities is not None}


def _seconds(points: Mapping[int, Measurement], found: Sequence[Measurement]) -> dict[int, float]:
    """Times as the quietest hour of a run would have had them: ratios, times the fastest of its reference products."""
    fastest = min(m.seconds / m.ratio for m in found)
    return {m: point.ratio * fastest for m, point in points.items()}


def _draw(axes: Any, curves: Mapping[str, Curve], unit: str, title: str) -> None:
    points = np.linspace(*POINTS, len(curves))
    for (name, color), size in zip(_colors(curves).items(), points, strict=True):
        measured, formula = curves[name].measured, curves[name].formula
        axes.plot(measured.keys(), measured.values(), "o-", color=color, markersize=size)
        axes.plot(formula.keys(), formula.values(), "--", color=color, linewidth=1)
        hollow = {m: value for m, value in formula.items() if m not in measured}
        axes.plot(hollow.keys(), hollow.values(), "o", color=color, markersize=size, fillstyle="none")
    axes.set(xscale="log", yscale="log", xlabel="identities", title=title)
    sizes = sorted({m for curve in curves.values() for m in (*curve.measured, *curve.formula)})
    axes.set_xticks(sizes, [_short(m) for m in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(LABELS[unit])
    axes.yaxis.set_minor_formatter("")
    low, high = axes.get_ylim()
    if high / low < SHORT_AXIS:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _draw_card(axes: Any) -> None:
    axes.axhline(CARD_BYTES, color=COLORS[6], linestyle=":", linewidth=1)
    axes.annotate("an 80 GB GPU", (0.01, CARD_BYTES), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8)


def _colors(names: Mapping[str, Any]) -> dict[str, str]:
    """A colour a provider; grey for the backbone, to which the others are compared."""
    others = (name for name in names if name != heads.BACKBONE_ALONE)
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(others)}
    return {name: colors.get(name, COLORS[6]) for name in names}


def _legend(drawing: Figure, curves: Mapping[str, Curve], *, formula: bool) -> None:
    handles = [Line2D([], [], marker="o", color=color, label=name) for name, color in _colors(curves).items()]
    if formula:
        handles.append(Line2D([], [], marker="o", linestyle="", color="black", label="measured"))
        handles.append(
            Line2D(
                [], [], marker="o", fillstyle="none", linestyle="--", linewidth=1.0, color="black", label="by formula"
            )
        )
    columns = int(drawing.get_figwidth() // LEGEND_COLUMN)
    drawing.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _short(count: int) -> str:
    for unit, size in (("M", 1_000_000), ("K", 1_000)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"
