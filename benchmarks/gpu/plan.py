"""The stages, in order of worth, and how the seconds are shared among them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NO_DEVICE = 3
"""The exit code where there is no GPU."""
TO_STOP = 4.0
"""Seconds before its limit at which a stage begins nothing new: it ends itself rather than be killed."""


@dataclass(frozen=True)
class Stage:
    """A module of this package. ``share``: how much of the time it is given, beside the shares of those after it."""

    name: str
    share: float
    says: str


STAGES = (
    Stage("ceilings", 10, "What the card gives at best: products in each precision, a copy, library products."),
    Stage("right", 75, "Every op, dtype and shipped tile against float64; the same bits twice; strides; streams."),
    Stage("tests", 50, "The tests that need a GPU, in many processes."),
    Stage("waits", 25, "Where the host waits for the device, and whether the head can be captured in a graph."),
    Stage("potential", 40, "The Gaussian potential: both designs, the share of the bf16 ceiling, what others take."),
    Stage("losses", 110, "The losses: launches, and time beside eager PyTorch and torch.compile, all in graphs."),
    Stage("table", 35, "A step of spreading in tables of up to 64 million vectors: memory, steps a second."),
    Stage("heads", 100, "Heads from 10 thousand to 64 million identities, alone and in whole training steps."),
    Stage("codes", 40, "Nearest centroids, largest cosines, and codes of millions of vectors."),
    Stage("train", 90, "`gif run` on glyphs: what heads reach on identities never seen; killed, and given again."),
    Stage("sanitizer", 40, "compute-sanitizer's memcheck and racecheck on a small case of each op."),
    Stage("tune", 80, "Tiles that compile without spills, timed: rows for `gif_kernels.device.tuning`."),
)


def limit(stages: Sequence[Stage], seconds: float) -> float:
    """Seconds for the first of ``stages``, when ``seconds`` are left for all: what one leaves flows on to the rest."""
    return seconds * stages[0].share / sum(stage.share for stage in stages)
