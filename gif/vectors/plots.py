"""Pictures of code vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gif.plotting import COLORS, figure, save_figure
from gif.vectors.quality import VectorQuality
from gif.vectors.spread import SpreadReport


def plot_nearest_cosines(before: VectorQuality, after: VectorQuality, path: str | Path) -> None:
    """Histogram of each code vector's cosine to its nearest neighbour, before and after spreading."""
    drawing, axes = figure()
    everything = np.concatenate([before.nearest.cpu().numpy(), after.nearest.cpu().numpy()])
    bins = np.linspace(everything.min(), everything.max(), 80)
    for name, quality, color in (("before", before, COLORS[6]), ("after", after, COLORS[0])):
        label = f"{name} spreading (mean {float(quality.nearest.mean()):.2f}, gap {quality.gap:.3f})"
        axes.hist(quality.nearest.cpu().numpy(), bins, color=color, alpha=0.6, label=label)
    axes.axvline(after.largest_uniform, color=COLORS[1], linestyle=":", label="largest of as many uniform points")
    axes.set(xlabel="cosine to the nearest other code vector", ylabel="identities", title="Code vectors spread out")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, loc="upper left")
    save_figure(drawing, path)


def plot_gaps(report: SpreadReport, path: str | Path) -> None:
    """The optimality gap over epochs: before, of each epoch's random subsets, and after everything."""
    drawing, axes = figure()
    gaps = [report.before.gap, *report.gaps]
    epochs = np.arange(len(report.gaps)) + 0.5  # an epoch's subsets are seen when it is half-way, on average
    axes.plot([0, *epochs], gaps, "o-", color=COLORS[0], label="random subsets")
    end = len(report.gaps) + len(report.neighbor_cosines)
    axes.plot([end], [report.after.gap], "s", color=COLORS[1], label=f"after spreading: {report.after.gap:.4f}")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color=COLORS[6], linewidth=1)
    axes.set(xlabel="epochs", ylabel="gap to the uniform optimum", title="Optimality gap of the code vectors")
    axes.legend(frameon=False)
    save_figure(drawing, path)
