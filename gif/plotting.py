"""One look for every picture, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gif.files import atomic_path
from gif.packages import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
"""Okabe and Ito's palette: told apart by people who see colours differently."""

DASHES = ("-", "--", ":", "-.")
DPI = 130
LARGE_RANGE = 300  # from the least to the most of a logarithmic axis, from which powers of ten alone have numbers


def line_style(number: int) -> dict[str, str]:
    """How the number-th of several lines is drawn: colours first, then dashes."""
    rounds, color = divmod(number, len(COLORS))
    return {"color": COLORS[color], "linestyle": DASHES[rounds % len(DASHES)]}


def canvas(width: float, height: float) -> Figure:
    """An empty figure of width x height inches. Raises ValueError where matplotlib is not installed."""
    with needs("matplotlib", "pictures"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def figure(width: float = 6.4, height: float = 4.2, *, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure of width x height inches with one axes, or an array of several, row by row."""
    drawing = canvas(width, height)
    panels = drawing.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return drawing, panels[0] if len(panels) == 1 else panels


def legible(text: str) -> str:
    """``text`` in letters that the pictures' font has; others are written out, as \\u65e5."""
    with needs("matplotlib", "pictures"):
        from matplotlib.font_manager import FontProperties, findfont, get_font
    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(
        letter if ord(letter) in known else letter.encode("ascii", "backslashreplace").decode() for letter in text
    )


def plain_numbers(axes: Any) -> None:
    """Write the numbers of logarithmic axes out, 200 in place of 2 x 10^2, as many as there is room for."""
    with needs("matplotlib", "pictures"):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    for axis in (axis for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"):
        low, high = axis.get_view_interval()
        digits = (1.0,) if high > LARGE_RANGE * low else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=digits))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def save_figure(drawing: Figure, path: str | Path) -> None:
    """Write the figure as PNG, atomically."""
    with atomic_path(path) as temporary:
        drawing.savefig(temporary, dpi=DPI, format="png")
