"""Pictures of recognition accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gif.errors import InputError
from gif.evaluation.identification import Identification
from gif.evaluation.open_set import Judgement
from gif.evaluation.templates import TemplateVerification
from gif.evaluation.verification import Roc, tar_at
from gif.plotting import COLORS, figure, save_figure

LOWEST_FAR = 1e-6
LOWEST_MISS = 1e-3
LEGEND_FAR = 1e-4  # or the smallest power of ten at which every curve has an impostor pair
LEGEND_FPIR = 1e-2
WIDTH = 8.0  # inches, legend included
LINE_STYLES = ("-", "--", ":", "-.")

Verified = Judgement | TemplateVerification | Roc


def plot_roc(curves: Mapping[str, Verified], path: str | Path) -> None:
    """Draw TAR against FAR on a logarithmic axis, for each named judgement or ROC, with its TAR@FAR=1e-4.

    A curve begins at the smallest FAR its impostor pairs can show, and the axis at the power of ten below the first of
    them, 1e-6 at least. Where a curve begins above 1e-4, the legend has the TAR at the next power of ten. Raises
    ValueError without a curve.
    """
    far = _legend_far(curves)
    drawing, axes = _draw({name: _roc_of(curve) for name, curve in curves.items()}, _legend_tars(curves, far))
    axes.set(xlabel="false-accept rate (FAR)", ylabel="true-accept rate (TAR)", title="Verification")
    axes.set(xscale="log", xlim=(_lowest_far(curves), 1), ylim=(0, 1.01))
    drawing.legend(frameon=False, loc="outside right upper", title=_tar_title(far), alignment="left")
    save_figure(drawing, path)


def plot_det(curves: Mapping[str, Verified], path: str | Path) -> None:
    """Draw the detection error trade-off: 1 - TAR against FAR on logarithmic axes, for what `plot_roc` takes."""
    far = _legend_far(curves)
    rocs = {name: _roc_of(curve) for name, curve in curves.items()}
    drawing, axes = _draw(rocs, _legend_tars(curves, far), missed=True)
    axes.set(xlabel="false-accept rate (FAR)", ylabel="false-reject rate (1 - TAR)", title="Verification")
    axes.set(xscale="log", yscale="log", xlim=(_lowest_far(curves), 1), ylim=(_lowest_miss(rocs), 1))
    drawing.legend(frameon=False, loc="outside right upper", title=_tar_title(far), alignment="left")
    save_figure(drawing, path)


def plot_identification(results: Mapping[str, Identification], path: str | Path) -> None:
    """Draw 1 - TPIR against FPIR on logarithmic axes, for each named result with unmated probes.

    Raises ValueError without a curve.
    """
    curves = {name: result.curve for name, result in results.items() if result.curve is not None}
    drawing, axes = _draw(curves, {name: tar_at(curve, LEGEND_FPIR) for name, curve in curves.items()}, missed=True)
    axes.set(xlabel="false-positive identification rate (FPIR)", ylabel="miss rate (1 - TPIR)", title="Identification")
    axes.set(xscale="log", yscale="log", xlim=(LOWEST_MISS, 1), ylim=(LOWEST_MISS, 1))
    drawing.legend(frameon=False, loc="outside right upper", title="TPIR at FPIR $10^{-2}$", alignment="left")
    save_figure(drawing, path)


def _draw(curves: Mapping[str, Roc], legend: Mapping[str, float], *, missed: bool = False) -> tuple[Any, Any]:
    """Each curve in its own colour and style, with the number its legend begins with.

    Where ``missed`` it is 1 - tpr, which lies on the axis where it is 0.
    """
    if not curves:
        raise InputError("there is no curve to draw; give at least one judgement or ROC")
    drawing, axes = figure(WIDTH)
    for place, (name, points) in enumerate(curves.items()):
        shown = points.fpr > 0
        axes.step(
            points.fpr[shown],
            np.maximum(1 - points.tpr[shown], LOWEST_MISS) if missed else points.tpr[shown],
            where="post",  # between two rates that occur, the lower one's threshold is the one to use
            color=COLORS[place % len(COLORS)],
            linestyle=LINE_STYLES[place // len(COLORS) % len(LINE_STYLES)],
            label=f"{legend[name]:.3f}  {name}",
        )
    return drawing, axes


def _roc_of(curve: Verified) -> Roc:
    return curve if isinstance(curve, Roc) else curve.roc


def _legend_far(curves: Mapping[str, Verified]) -> float:
    """`LEGEND_FAR`, or the smallest power of ten at which every curve has begun."""
    begin = max((_smallest(_roc_of(curve).fpr) for curve in curves.values()), default=0.0)
    return max(LEGEND_FAR, 10.0 ** math.ceil(round(math.log10(begin), 9))) if begin else LEGEND_FAR


def _lowest_far(curves: Mapping[str, Verified]) -> float:
    """Where the axis of FAR begins: the power of ten at or below the smallest that any curve has, `LOWEST_FAR` at
    least."""
    begin = min((_smallest(_roc_of(curve).fpr) for curve in curves.values()), default=LOWEST_FAR)
    return min(max(LOWEST_FAR, _power_below(begin)), 0.1)


def _lowest_miss(rocs: Mapping[str, Roc]) -> float:
    """Where the axis of the false-reject rate begins, likewise, `LOWEST_MISS` at least."""
    begin = min((_smallest(1 - curve.tpr) for curve in rocs.values()), default=LOWEST_MISS)
    return min(max(LOWEST_MISS, _power_below(begin)), 0.1)


def _power_below(rate: float) -> float:
    return float(10.0 ** math.floor(round(math.log10(rate), 9)))


def _smallest(fpr: NDArray[np.float64]) -> float:
    return float(fpr[fpr > 0].min(initial=1.0))


def _tar_title(far: float) -> str:
    return f"TAR at FAR $10^{{{round(math.log10(far))}}}$"


def _legend_tars(curves: Mapping[str, Verified], far: float) -> dict[str, float]:
    return {name: _legend_tar(curve, far) for name, curve in curves.items()}


def _legend_tar(curve: Verified, far: float) -> float:
    if isinstance(curve, Roc):
        return tar_at(curve, far)
    return curve.tar[far] if far in curve.tar else tar_at(curve.roc, far)
