"""Pictures of code vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gif.plotting import COLORS, figure, save_figure
from gif.vectors.quality import VectorQuality


def plot_nearest_cosines(before: VectorQuality, after: VectorQuality, path: str | Path) -> None:
    """Histogram of each code vector's cosine to its nearest neighbour, before and after spreading."""
    drawing, axes = figure()
    everything = np.concatenate([before.nearest.cpu().numpy(), after.nearest.cpu().numpy()])
    bins = np.linspace(everything.min(), everything.max(), 80)
    for name, quality, color in (("before", before, COLORS[6]), ("after", after, COLORS[0])):
        label = f"{name} spreading (mean {float(quality.nearest.mean()):.2f}, gap {quality.gap:.3f})"
        axes.hist(quality.nearest.cpu().numpy(), bins, color=color, alpha=0.6, label=label)
    axes.set(xlabel="cosine to the nearest other code vector", ylabel="identities", title="Code vectors spread out")
    axes.legend(frameon=False)
    save_figure(drawing, path)
