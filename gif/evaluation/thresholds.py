"""Thresholds on the cosine: which score accepts at a given false-accept rate, and how many pairs that rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gif.errors import InputError
from gif.evaluation.verification import RATE_ROUNDING, Roc, check_fars, unresolved
from gif.progress import new_table

if TYPE_CHECKING:
    from rich.table import Table

FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
DEFAULT_FAR = 1e-3
FIRM = 30
"""False accepts that make a rate firm: it is then within 30 % of the true one, nine times in ten (the rule of 30 of
Doddington et al., 2000), where pairs are independent. Pairs that share an image are less than that."""


@dataclass(frozen=True)
class Threshold:
    """A pair counts as one of the same identity where its cosine is at least ``threshold``.

    Args:
        threshold: the lowest that accepts no more than its false-accept rate of the impostor pairs.
        tar: share of the genuine pairs that it accepts.
        false_accepts: how many impostor pairs it accepts.
    """

    threshold: float
    tar: float
    false_accepts: int

    @property
    def is_firm(self) -> bool:
        """Whether so many impostor pairs were accepted that the rate is known, and not a matter of a few pairs."""
        return self.false_accepts >= FIRM


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of one judgement.

    Args:
        at: for each false-accept rate its threshold; None where the impostor pairs do not resolve that rate, for there
            no threshold is known.
        eer: the equal error rate, where as many impostor pairs are accepted as genuine pairs are rejected, in shares.
        eer_threshold: the cosine there.
        genuine: how many pairs there were of one identity.
        impostor: and of two.
    """

    at: dict[float, Threshold | None]
    eer: float
    eer_threshold: float
    genuine: int
    impostor: int

    def require(self, far: float) -> Threshold:
        """The threshold of one of the rates. Raises ValueError where it is not known, and says why."""
        if far not in self.at:
            known = ", ".join(f"{rate:g}" for rate in self.at)
            raise InputError(
                f"there is no threshold for FAR {far:g}; there are {known}: give one of these, or a cosine"
            )
        found = self.at[far]
        if found is None:
            raise InputError(
                f"no threshold is known for FAR {far:g}: the {self.impostor:,} impostor pairs of the judgement resolve "
                f"{1 / self.impostor:.1e} and above; judge by more identities, or take a higher FAR"
            )
        return found

    @property
    def usual_far(self) -> float | None:
        """The rate to decide at where none is named: `DEFAULT_FAR`, or the next above that is known; None: none is."""
        known = (far for far, found in self.at.items() if found is not None and far >= DEFAULT_FAR)
        return min(known, default=None)

    def support(self, far: float) -> str:
        """What the threshold at a rate rests on, in words."""
        found = self.require(far)
        pairs = f"{found.false_accepts:,} false accepts of {self.impostor:,} impostor pairs"
        return pairs if found.is_firm else f"{pairs}, fewer than the {FIRM} that would make the rate firm"

    def to_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""
        return {
            "at": {f"{far:g}": None if found is None else asdict(found) for far, found in self.at.items()},
            "eer": self.eer,
            "eer_threshold": self.eer_threshold,
            "genuine": self.genuine,
            "impostor": self.impostor,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Thresholds:
        """What `to_dict` made. Raises KeyError, TypeError or ValueError for anything else."""
        at = {float(far): None if found is None else Threshold(**found) for far, found in stored["at"].items()}
        numbers = [value for found in at.values() if found is not None for value in (found.threshold, found.tar)]
        eer, eer_threshold = float(stored["eer"]), float(stored["eer_threshold"])
        if not all(map(math.isfinite, (*numbers, eer, eer_threshold))):
            raise ValueError("a threshold is no finite number")
        return cls(at, eer, eer_threshold, int(stored["genuine"]), int(stored["impostor"]))

    def table(self, title: str = "Thresholds on the cosine") -> Table:
        """The numbers in the form in which they are printed."""
        table = new_table("FAR", "cosine at least", "TAR", "false accepts", title=title)
        for far, found in self.at.items():
            if found is None:
                table.add_row(f"{far:g}", "not known", "", "")
            else:
                accepts = f"{found.false_accepts:,}" + " ?" * (not found.is_firm)
                table.add_row(f"{far:g}", f"{found.threshold:.4f}", f"{found.tar:.4f}", accepts)
        table.add_row(f"{self.eer:.4f} (EER)", f"{self.eer_threshold:.4f}", f"{1 - self.eer:.4f}", "")
        notes = []
        if any(found is not None and not found.is_firm for found in self.at.values()):
            notes.append(f"? fewer than {FIRM} false accepts: a matter of a few pairs")
        if low := unresolved(list(self.at), self.impostor):
            rates = ", ".join(f"{far:g}" for far in low)
            notes.append(f"FAR {rates}: {self.impostor:,} impostor pairs resolve {1 / self.impostor:.1e} and above")
        table.caption = "\n".join(notes) or None
        return table


def thresholds_of(curve: Roc, genuine: int, impostor: int, fars: Sequence[float] = FARS) -> Thresholds:
    """The thresholds of a ROC curve: at each rate the lowest score that accepts no more impostor pairs than it allows.

    Args:
        curve: points of rising FPR; not thinned out, or the thresholds are those of its points.
        genuine: how many pairs of one identity it is of.
        impostor: how many of two.
        fars: false-accept rates in [0, 1].

    Raises ValueError for a wrong rate.
    """
    check_fars(fars)
    low = unresolved(fars, impostor)
    at: dict[float, Threshold | None] = {}
    for far in fars:
        allowed = curve.fpr <= far * (1 + RATE_ROUNDING) + RATE_ROUNDING / impostor
        place = int(np.flatnonzero(allowed)[-1])  # the first point accepts nobody, so there is one
        threshold = curve.thresholds[place]
        if not math.isfinite(threshold):  # so many impostor pairs share the highest score
            threshold = np.nextafter(curve.thresholds[place + 1], threshold)
        accepted = Threshold(float(threshold), float(curve.tpr[place]), round(float(curve.fpr[place]) * impostor))
        at[far] = None if far in low else accepted
    return Thresholds(at, *_equal_errors(curve), genuine, impostor)


def _equal_errors(curve: Roc) -> tuple[float, float]:
    """The equal error rate and its score: where the line between two points of the curve has FPR = 1 - TPR."""
    excess = curve.fpr - (1 - curve.tpr)  # rises from -1 to 1
    after = int(np.flatnonzero(excess >= 0)[0])
    before = after - 1
    share = -excess[before] / (excess[after] - excess[before])
    rate = curve.fpr[before] + share * (curve.fpr[after] - curve.fpr[before])
    first, last = float(curve.thresholds[before]), float(curve.thresholds[after])
    if not math.isfinite(last):  # the point that accepts every pair, in whatever order they are
        return float(rate), first
    return float(rate), last if not math.isfinite(first) else first + float(share) * (last - first)
