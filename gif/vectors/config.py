"""How to spread code vectors: every number of a run in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gif.errors import InputError
from gif.vectors.closed_form import CLOSED_FORMS, ClosedForm
from gif_kernels import checks

_BUDGET = ("minutes",)


@dataclass(frozen=True)
class SpreadConfig:
    """How to spread code vectors: a closed form, then epochs of random subsets, then epochs of neighbours.

    Args:
        epochs: passes over all vectors; 3 do nearly all there is to do.
        batch: vectors that push each other apart in one step.
        lr: learning rate, per vector.
        t: of the Gaussian potential; a larger one parts near vectors more, and far ones less.
        start: a closed form first; "center" subtracts the mean, "whiten" also evens out the covariance. After torchrun
            write --closed_form, for torchrun takes --start for an option of its own.
        neighbor_epochs: passes in subsets of neighbours afterwards, which part near-duplicates.
        neighbors: vectors in a subset of neighbours at most: a pair's own push is 1 / n of a step.
        target_gap: stop early, once the mean optimality gap of an epoch is below this.
        minutes: stop after so much time.
        seed: of the random subsets.

    Raises ValueError for a number out of its range.
    """

    epochs: int = 3
    batch: int = 2048
    lr: float = 0.1
    t: float = 2.0
    start: ClosedForm = "none"
    neighbor_epochs: int = 0
    neighbors: int = 128
    target_gap: float | None = None
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        checks.choice("start", self.start, CLOSED_FORMS)
        checks.positive("lr", self.lr)
        checks.positive("t", self.t)
        if self.epochs < 0 or self.neighbor_epochs < 0 or self.batch < 2 or self.neighbors < 4:
            raise InputError(
                f"wanted epochs >= 0, neighbor_epochs >= 0, batch >= 2 and neighbors >= 4, got epochs={self.epochs}, "
                f"neighbor_epochs={self.neighbor_epochs}, batch={self.batch}, neighbors={self.neighbors}"
            )

    def settings(self) -> dict[str, Any]:
        """The fields that decide the result of a run that comes to its end: all but the time that it may take."""
        return {name: value for name, value in asdict(self).items() if name not in _BUDGET}
