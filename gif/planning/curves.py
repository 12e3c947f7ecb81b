"""Cost against the number of identities, as the supplement's Fig. 7 has it: measured points, and formulas beyond."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gif.packages import needs
from gif.plotting import COLORS

CARD_BYTES = 80e9
"""Memory of a large GPU, to compare with."""
POINTS = (7.5, 4.0)
"""Sizes of the first provider's points and of the last's: equal values stay visible."""
SHORT_AXIS = 50
"""Largest over smallest value of a logarithmic axis whose powers of ten would be too few labels."""
LEGEND_COLUMN = 2.3
"""Inches of a provider's name in a legend."""


def _engineering(unit: str) -> Callable[..., str]:
    def label(value: float, place: int) -> str:
        from matplotlib.ticker import EngFormatter

        return EngFormatter(unit)(value)

    return label


LABELS: dict[str, Callable[..., str]] = {
    "s": lambda value, place: f"{value:,.0f} s" if value >= 1 else _engineering("s")(value, place),
    "B": _engineering("B"),
    "": lambda value, place: f"{value:g}",
}
"""How an axis writes values of a unit."""


@dataclass(frozen=True)
class Curve:
    """Values of one provider by the number of identities: ``measured``, and by formula."""

    measured: Mapping[int, float]
    formula: Mapping[int, float] = field(default_factory=dict)


def colors_of(names: Mapping[str, Any], grey: str | None = None) -> dict[str, str]:
    """A colour a provider; grey for the one to which the others are compared, if any."""
    others = (name for name in names if name != grey)
    colors = {name: COLORS[number % len(COLORS)] for number, name in enumerate(others)}
    return {name: colors.get(name, COLORS[6]) for name in names}


def draw_curves(axes: Any, curves: Mapping[str, Curve], unit: str, title: str, grey: str | None = None) -> None:
    """Draw each provider's points, filled where measured, hollow and dashed by formula, on two logarithmic axes."""
    with needs("matplotlib", "pictures"):
        from matplotlib.ticker import LogLocator, NullLocator
    points = np.linspace(*POINTS, len(curves))
    for (name, color), size in zip(colors_of(curves, grey).items(), points, strict=True):
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


def draw_card(axes: Any) -> None:
    """A line at the memory of a large GPU."""
    axes.axhline(CARD_BYTES, color=COLORS[6], linestyle=":", linewidth=1)
    axes.annotate("an 80 GB GPU", (0.01, CARD_BYTES), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8)


def draw_legend(drawing: Any, curves: Mapping[str, Curve], *, formula: bool, grey: str | None = None) -> None:
    """Name the providers, and what filled and hollow points are, below a drawing."""
    with needs("matplotlib", "pictures"):
        from matplotlib.lines import Line2D
    handles = [Line2D([], [], marker="o", color=color, label=name) for name, color in colors_of(curves, grey).items()]
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
