"""Pictures that reports alone draw: scores with thresholds, pairs of images, what a head costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gif.data import IdentityDataset
from gif.data.pictures import Pictures
from gif.planning.heads import HeadCost, gif_cost, softmax_cost
from gif.plotting import COLORS, canvas, figure, legible, save_figure
from gif.report.pairs import Pair, PairScores

PAIR_COLUMNS = 4
PAIR_GAP = 4  # pixels between the two images
MOST_IDENTITIES = 1e8
NAME_CHARACTERS = 16
FRAME = 208  # grey level


def plot_scores(scores: PairScores, thresholds: Mapping[float, float], path: Path) -> None:
    """Draw how the cosines of genuine and impostor pairs are distributed, and a line at the threshold of each FAR."""
    drawing, axes = figure(7.5, 3.8)
    for name, shares, color in (("genuine", scores.genuine, COLORS[0]), ("impostor", scores.impostor, COLORS[1])):
        axes.stairs(shares, scores.edges, fill=True, alpha=0.5, color=color, label=f"{name} pairs")
    top = max(scores.genuine.max(), scores.impostor.max())
    for place, (far, threshold) in enumerate(thresholds.items()):
        axes.axvline(threshold, color=COLORS[6], linestyle=":", linewidth=1)
        axes.text(threshold, top * (1.02 - 0.08 * place), f" FAR {far:g}", fontsize=8, va="top")
    shown = np.flatnonzero(scores.genuine + scores.impostor)
    low, high = scores.edges[shown[0]], scores.edges[shown[-1] + 1]
    axes.set(xlim=(low - 0.02, max(high, *thresholds.values(), -1) + 0.1), ylim=(0, 1.05 * top))
    axes.set(xlabel="cosine of two embeddings", ylabel="share of the pairs of its kind", title="Scores and thresholds")
    axes.legend(frameon=False, loc="upper left")
    save_figure(drawing, path)


def plot_pairs(data: IdentityDataset, pairs: Sequence[Pair], title: str, path: Path) -> None:
    """Draw pairs of images side by side, each with its cosine and whom it shows."""
    pictures = Pictures(data)
    rows = -(-len(pairs) // PAIR_COLUMNS)
    drawing = canvas(9.5, 1.75 * rows + 0.5)
    drawing.suptitle(title, fontsize=12)
    for axes in drawing.subplots(rows, PAIR_COLUMNS, squeeze=False).flatten():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, pair in zip(drawing.axes, pairs, strict=False):
        one, other = (_framed(pictures[index]) for index in (pair.first, pair.second))
        gap = np.full((len(one), PAIR_GAP, 3), 255, np.uint8)
        axes.imshow(np.concatenate([one, gap, other], axis=1))
        names = dict.fromkeys(_short(data.names[int(data.labels[index])]) for index in (pair.first, pair.second))
        axes.set_title(f"{pair.cosine:.2f}", fontsize=9, pad=2)
        axes.set_xlabel(" | ".join(names), fontsize=7, labelpad=2, parse_math=False)
    save_figure(drawing, path)


def plot_head_cost(m: int, width: int, batch: int, path: Path) -> None:
    """Draw memory and work of a step of GIF's head and of a softmax's against the number of identities, by formula."""
    drawing, (memory, work) = figure(9.5, 3.6, columns=2)
    identities = np.geomspace(min(m, 1000), max(m, MOST_IDENTITIES), 61)
    for name, cost, color in (("GIF", gif_cost, COLORS[0]), ("full softmax", softmax_cost, COLORS[1])):
        costs: list[HeadCost] = [cost(int(each), width=width, batch=batch) for each in identities]
        own = cost(m, width=width, batch=batch)
        for axes, of in ((memory, lambda each: each.bytes / 1e9), (work, lambda each: each.flops / 1e9)):
            axes.loglog(identities, [of(each) for each in costs], color=color, label=name)
            axes.plot([m], [of(own)], "o", color=color)
    memory.set(xlabel="identities", ylabel="GB", title="Memory of the head in a step")
    work.set(xlabel="identities", ylabel="GFLOP", title="Work of the head in a step")
    for axes in (memory, work):
        axes.axvline(m, color=COLORS[6], linestyle=":", linewidth=1)
        axes.legend(frameon=False)
    save_figure(drawing, path)


def _framed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image with a thin frame: of two on white it is seen where each ends."""
    return np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=FRAME)


def _short(name: str) -> str:
    """A name in the few characters that there is room for, its end where it is long."""
    name = legible(name)
    return name if len(name) <= NAME_CHARACTERS else f"…{name[1 - NAME_CHARACTERS :]}"
