"""Pictures of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gif.errors import InputError
from gif.plotting import COLORS, figure, save_figure

SMOOTHING = 25  # steps in the running mean, at most
WINDOWS = 8  # that a run has at least, or no mean is drawn


def plot_losses(losses: Mapping[str, Tensor], path: str | Path) -> None:
    """The loss of every step, thin, and its running mean, for each named run, on a logarithmic axis.

    Of a run of a few steps the mean is over fewer, or there is none and each step is a point.

    Losses of different heads are different quantities: compare their shape, not their height.
    """
    drawing, axes = figure()
    for (name, values), color in zip(losses.items(), COLORS, strict=False):
        values = values.float().cpu()
        steps = torch.arange(1, len(values) + 1)
        window = min(SMOOTHING, max(1, len(values) // WINDOWS))
        if window == 1:  # too few to smooth: every step is a point
            axes.plot(steps, values, color=color, marker="o", markersize=3, label=name)
            continue
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.6)
        smooth = values.unfold(0, window, 1).mean(1)
        axes.plot(steps[window - 1 :], smooth, color=color, label=f"{name}, mean of {window} steps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="loss (each head's own)", yscale="log", title="Training")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}")
    axes.legend(frameon=False)
    save_figure(drawing, path)


def plot_validations(validations: Mapping[int, Mapping[str, float]], path: str | Path) -> None:
    """Every named score over the steps that it came after. Raises ValueError without one."""
    if not validations:
        raise InputError("there is no validation to draw; train with `validate`")
    drawing, axes = figure()
    names = dict.fromkeys(name for scores in validations.values() for name in scores)
    for place, name in enumerate(names):
        steps = [step for step, scores in validations.items() if name in scores]
        values = [validations[step][name] for step in steps]
        axes.plot(steps, values, color=COLORS[place % len(COLORS)], marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="score (more is better)", title="Validation")
    axes.legend(frameon=False)
    save_figure(drawing, path)
