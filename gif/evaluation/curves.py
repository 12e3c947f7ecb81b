"""Pictures of recognition accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gif.evaluation.open_set import Judgement
from gif.evaluation.verification import Roc, tar_at
from gif.plotting import COLORS, figure, save_figure

LOWEST_FAR = 1e-6
LEGEND_FAR = 1e-4
WIDTH = 8.0  # inches, legend included
LINE_STYLES = ("-", "--", ":", "-.")


def plot_roc(curves: Mapping[str, Judgement | Roc], path: str | Path) -> None:
    """Draw TAR against FAR, from 1e-6 on a logarithmic axis, for each named judgement or ROC, with its TAR@FAR=1e-4.

    A curve begins at the smallest FAR its impostor pairs can show. Raises ValueError without a curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw; give at least one judgement or ROC")
    drawing, axes = figure(WIDTH)
    for place, (name, curve) in enumerate(curves.items()):
        points = curve.roc if isinstance(curve, Judgement) else curve
        shown = points.fpr > 0
        axes.step(
            points.fpr[shown],
            points.tpr[shown],
            where="post",  # between two FARs that occur, the lower one's threshold is the one to use
            color=COLORS[place % len(COLORS)],
            linestyle=LINE_STYLES[place // len(COLORS) % len(LINE_STYLES)],
            label=f"{_legend_tar(curve):.3f}  {name}",
        )
    axes.set(xlabel="false-accept rate (FAR)", ylabel="true-accept rate (TAR)", title="Verification")
    axes.set(xscale="log", xlim=(LOWEST_FAR, 1), ylim=(0, 1.01))
    drawing.legend(frameon=False, loc="outside right upper", title="TAR at FAR $10^{-4}$", alignment="left")
    save_figure(drawing, path)


def _legend_tar(curve: Judgement | Roc) -> float:
    if isinstance(curve, Roc):
        return tar_at(curve, LEGEND_FAR)
    return curve.tar[LEGEND_FAR] if LEGEND_FAR in curve.tar else tar_at(curve.roc, LEGEND_FAR)
