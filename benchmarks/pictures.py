"""Pictures of what was measured: cost against the number of identities, and shares of the roofline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from benchmarks import heads
from benchmarks.results import Measurement
from gif.planning.curves import Curve, draw_card, draw_curves, draw_legend
from gif.plotting import COLORS, figure, save_figure

Picture = Callable[[Sequence[Measurement], Path], None]

BAR, MARGINS = 0.17, 1.3
"""Inches of a bar, and of what surrounds them all."""


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
    draw_curves(time, times, "s", "One training step of the head")
    draw_curves(memory, memories, "B", "Memory of the head")
    draw_card(memory)
    draw_legend(drawing, times, formula=any(curve.formula for curve in times.values()))
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
        draw_curves(axes, curves, "s", f"One whole step, {mode}", heads.BACKBONE_ALONE)
        shown |= curves
    draw_legend(drawing, shown, formula=False, grey=heads.BACKBONE_ALONE)
    save_figure(drawing, path)


def draw_potential(found: Sequence[Measurement], path: Path) -> None:
    """Time and memory of the potential over all pairs against the rows, of the headline width."""
    shown = [m for m in found if m.headline and m.dtype == found[0].dtype]
    drawing, (time, memory) = figure(11.0, 4.6, columns=2)
    names = list(dict.fromkeys(m.provider for m in shown))
    points = {name: _by_identities(shown, name) for name in names}
    times = {name: Curve({m: point.seconds for m, point in points[name].items()}) for name in names}
    memories = {name: Curve({m: float(point.held_bytes) for m, point in points[name].items()}) for name in names}
    draw_curves(time, times, "s", f"Potential and gradient, {shown[0].dtype}")
    draw_curves(memory, memories, "B", "Memory beyond the vectors")
    for axes in (time, memory):
        axes.set_xlabel("vectors")
    draw_legend(drawing, times, formula=False)
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
    "gaussian_potential": draw_potential,
}
PLANNED = ("head",)
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
