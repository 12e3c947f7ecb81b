"""What a head costs against the number of identities, by formula: the README's picture.

`python -m gif.experiments.head_cost docs/pictures/head-cost.png`
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gif.codes import code_length
from gif.plotting import COLORS, save_figure

FLOAT = 4  # bytes


@dataclass(frozen=True)
class HeadCost:
    """Memory and work of a head alone in one training step, float32 with momentum.

    ``bytes``: weights, gradients and momentum, and the logits with their gradient. ``flops``: three products (forward,
    and the gradients of both factors), two FLOPs a multiply-add.
    """

    bytes: float
    flops: float


def softmax_cost(m: int, *, width: int = 512, batch: int = 1024, sample_rate: float = 1.0) -> HeadCost:
    """A centre an identity. With sampling, all centres and their momentum stay, and a sample takes part in a step."""
    taking_part = sample_rate * m
    kept = (3 if sample_rate == 1 else 2) * m * width + (0 if sample_rate == 1 else 2 * taking_part * width)
    return HeadCost(FLOAT * (kept + 2 * batch * taking_part), 6 * batch * taking_part * width)


def gif_cost(m: int, *, width: int = 512, batch: int = 1024, vocab_size: int = 20) -> HeadCost:
    """l tokens of v centres, a projection a token; the code table, one byte a token, is counted too."""
    length = code_length(m, vocab_size)
    parameters = length * vocab_size * width + length * width * width
    activations = 2 * batch * length * (vocab_size + width)
    return HeadCost(FLOAT * (3 * parameters + activations) + m * length, 6 * batch * parameters)


def plot_head_cost(path: str | Path) -> None:
    """Memory and FLOPs of each head, from 10 thousand to 64 million identities."""
    m = [int(count) for count in np.geomspace(1e4, 64e6, 120)]
    heads = {
        "full softmax": [softmax_cost(count) for count in m],
        "Partial FC, 10 %": [softmax_cost(count, sample_rate=0.1) for count in m],
        "identity codes (GIF)": [gif_cost(count) for count in m],
    }
    drawing = Figure(figsize=(9.5, 3.9), layout="constrained")
    memory, work = drawing.subplots(1, 2)
    for (name, costs), color in zip(heads.items(), (COLORS[1], COLORS[4], COLORS[0]), strict=True):
        memory.loglog(m, [cost.bytes / 2**30 for cost in costs], color=color, linewidth=2, label=name)
        work.loglog(m, [cost.flops / 1e12 for cost in costs], color=color, linewidth=2, label=name)
    memory.axhline(80, color=COLORS[6], linestyle=":", linewidth=1)
    memory.text(1.1e4, 95, "an 80 GB GPU", color=COLORS[6], fontsize=9)
    memory.set(xlabel="identities", ylabel="GiB", title="Memory of the head")
    work.set(xlabel="identities", ylabel="TFLOP", title="Work of the head, one step of 1,024 images")
    for axes in (memory, work):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    work.legend(frameon=False)
    save_figure(drawing, path)


if __name__ == "__main__":
    plot_head_cost(sys.argv[1])
