"""Judging embeddings of identities never seen in training: every pair of images, exactly, in bounded memory.

A point of the ROC is a threshold. At a given number of false accepts the largest TPR belongs to the threshold just
above the next impostor score, so each distinct impostor score v gives one point: FPR the share of impostor scores > v,
TPR the share of genuine scores > v. That is the curve that is drawn. `tar_at_far` on the list of all pairs answers with
the nearest of the points at which the curve turns. FPR 0 is f away from FAR f, so no point beyond 2 f is nearer: to
answer as it does needs only the 2 f x impostor-pairs highest impostor scores, the next distinct one and how often each
occurs. That is all that is kept, beside the genuine scores and a histogram to draw the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import normalize

from gif.errors import InputError
from gif.evaluation.identification import labelled, rank1
from gif.evaluation.thresholds import Thresholds, thresholds_of
from gif.evaluation.verification import (
    FOLDS,
    Roc,
    check_fars,
    known,
    require_both,
    resolution,
    tar_at,
    thin,
    turns,
    unresolved,
    verify_pairs,
)
from gif.progress import new_table, progress

if TYPE_CHECKING:
    from rich.table import Table

ROWS, COLUMNS = 512, 8192
PENDING = 1 << 20  # scores waiting before the highest are sorted out of them
BINS = 20_000

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Judgement:
    """What `judge` found.

    ``rank1`` is the share of images whose nearest other image has their label; ``tar`` the true-accept rate at each
    false-accept rate, over all pairs, by `tar_at_far`: no more than a guess below 1 / ``impostor``; ``pair_accuracy``
    and ``pair_std`` the ten folds' mean and standard deviation on balanced pairs, NaN with fewer than ten of a kind;
    ``genuine`` and ``impostor`` how many pairs there are; ``roc`` at most 2,000 points of the curve, evenly spaced in
    log FAR; ``thresholds`` the cosines that accept at FARs from 1e-2 to 1e-6, and at the EER: exact up to FAR
    2 max(fars), and to 1e-4 above it.
    """

    rank1: float
    tar: dict[float, float]
    pair_accuracy: float
    pair_std: float
    genuine: int
    impostor: int
    roc: Roc
    thresholds: Thresholds

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curve, fit for JSON: NaN, and TAR at a FAR that nobody can know, become None."""
        return {
            "rank1": self.rank1,
            "tar": known(self.tar, self.impostor),
            "pair_accuracy": None if math.isnan(self.pair_accuracy) else self.pair_accuracy,
            "pair_std": None if math.isnan(self.pair_std) else self.pair_std,
            "genuine": self.genuine,
            "impostor": self.impostor,
            "thresholds": self.thresholds.to_dict(),
        }

    def tar_in_words(self, far: float, digits: int = 4) -> str:
        """TAR at one of the FARs, to print: with a "?" where the impostor pairs do not resolve that FAR."""
        return f"{self.tar[far]:.{digits}f}" + " ?" * len(unresolved([far], self.impostor))

    def table(self) -> Table:
        """Return the numbers in the form in which they are printed."""
        table = new_table("measure", "value", title=f"{self.genuine:,} genuine and {self.impostor:,} impostor pairs")
        table.add_row("rank-1", f"{self.rank1:.4f}")
        for far in self.tar:
            table.add_row(f"TAR@FAR={far:g}", self.tar_in_words(far))
        low = unresolved(list(self.tar), self.impostor)
        table.caption = f"? {resolution(low, self.impostor)}" if low else None
        table.add_row("pair accuracy", f"{self.pair_accuracy:.4f} ± {self.pair_std:.4f}")
        return table


@torch.no_grad()
def judge(
    embeddings: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    *,
    fars: Sequence[float] = (1e-3, 1e-4),
    pairs: int = 6000,
    seed: int = 0,
) -> Judgement:
    """Judge embeddings of held-out identities: rank-1, TAR@FAR and ROC over all pairs, ten-fold pair accuracy.

    TAR@FAR is `tar_at_far` of the cosines of all n (n - 1) / 2 pairs. Time is n^2 d; memory the genuine scores, the
    2 max(fars) x impostor-pairs highest others, and tiles.

    Args:
        embeddings: (n, d); computed in float64 where they are, else float32, on their device.
        labels: (n,) integer; images of one identity share a label.
        fars: false-accept rates in [0, 1].
        pairs: how many the ten folds hold, half of them genuine, drawn at random; fewer where there are not so many.
        seed: of that draw.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or rate, NaN or infinity, no genuine or no impostor pair.
    """
    check_fars(fars)
    if pairs < 2 * FOLDS:
        raise InputError(f"pairs must be at least {2 * FOLDS}, one of each kind a fold, got {pairs}")
    vectors, labels = labelled(embeddings, labels)
    # In the order of labels the genuine partners of a row come right after it, and then its impostors.
    sorted_labels, order = labels.sort(stable=True)
    unit_rows = normalize(vectors[order], dim=1)
    sizes = sorted_labels.unique_consecutive(return_counts=True)[1]
    ends = sizes.cumsum(0).repeat_interleave(sizes)  # (n,) where each row's identity ends
    rows = torch.arange(len(labels), device=labels.device)
    genuine_left, impostor_left = ends - 1 - rows, len(labels) - ends
    genuine, impostor = int(genuine_left.sum()), int(impostor_left.sum())
    require_both(genuine, impostor)

    highest = min(math.ceil(2 * max(fars, default=0) * impostor), impostor)
    kept = _Scores(genuine, highest, unit_rows[:0].cpu().numpy().dtype)
    for genuine_scores, impostor_scores in _all_pairs(unit_rows, ends):
        kept.add(genuine_scores, impostor_scores)
    exact, turning = kept.exact_roc(impostor), kept.turning_roc(impostor)

    rng = np.random.default_rng(seed)
    half = min(pairs // 2, genuine, impostor) // FOLDS
    accuracy, std = math.nan, math.nan
    if half:
        partners = [
            _draw(rng, half, left.cpu().numpy(), first.cpu().numpy())
            for left, first in ((genuine_left, rows + 1), (impostor_left, ends))
        ]
        chosen = torch.from_numpy(np.concatenate(partners, axis=1).ravel())  # each fold: genuine, then impostor pairs
        result = verify_pairs(unit_rows[chosen.to(vectors.device)], np.tile(np.repeat([True, False], half), FOLDS))
        accuracy, std = result.accuracy, result.std
    curve = _joined(exact, kept.binned_roc())
    return Judgement(
        rank1=rank1(vectors, labels),
        tar={far: tar_at(turning, far) for far in fars},
        pair_accuracy=accuracy,
        pair_std=std,
        genuine=genuine,
        impostor=impostor,
        roc=thin(curve, impostor),
        thresholds=thresholds_of(curve, genuine, impostor),
    )


def _all_pairs(vectors: Tensor, ends: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Genuine and impostor cosines, tile by tile of the upper triangle, of unit rows in the order of their labels."""
    n = len(vectors)
    columns = torch.arange(n, device=vectors.device)
    with progress("judging pairs", n, "images") as advance, torch.autocast(vectors.device.type, enabled=False):
        for i in range(0, n, ROWS):
            rows = vectors[i : i + ROWS]
            row, end = columns[i : i + ROWS, None], ends[i : i + ROWS, None]
            last_end = int(end[-1])
            for j in range(i, last_end, COLUMNS):
                stop = min(j + COLUMNS, last_end)
                column, tile = columns[j:stop], rows @ vectors[j:stop].T
                yield tile[(column > row) & (column < end)], tile[column >= end]
            for j in range(last_end, n, COLUMNS):
                yield vectors.new_empty(0), (rows @ vectors[j : j + COLUMNS].T).flatten()
            advance(len(rows))


class _Scores:
    """All genuine scores; of impostor scores the highest, each distinct one with its count, and a histogram of all.

    What a tile leaves is copied into arrays that are there from the start: thousands of small arrays, each from between
    the tiles' large ones, would keep the heap from shrinking.
    """

    def __init__(self, genuine: int, highest: int, dtype: np.dtype[Any]) -> None:
        self.highest = max(highest, 1)
        self.genuine: Floats = np.empty(genuine, dtype)
        self.genuine_added = 0
        self.values: Floats = np.empty(0, dtype)  # descending; complete from ``cutoff`` up
        self.counts: Integers = np.empty(0, np.int64)
        self.cutoff = -math.inf  # no lower score matters any more
        self.pending: Floats = np.empty(max(self.highest, PENDING) + ROWS * COLUMNS, dtype)
        self.pending_added = 0
        self.histogram: Integers = np.zeros(BINS + 1, np.int64)

    def add(self, genuine: Tensor, impostor: Tensor) -> None:
        self.genuine_added = _append(self.genuine, self.genuine_added, genuine)
        self.histogram += _histogram(impostor)
        self.pending_added = _append(self.pending, self.pending_added, impostor[impostor >= self.cutoff])
        if self.pending_added > max(self.highest, PENDING):
            self._merge()

    def _merge(self) -> None:
        pending = self.pending[: self.pending_added]
        values, counts = self._cut(*np.unique(pending, return_counts=True))
        values, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        total = np.zeros(len(values), np.int64)
        np.add.at(total, place, np.concatenate([self.counts, counts]))
        values, total = self._cut(values, total)
        if total[1:].sum() >= self.highest:  # else the next distinct score may be still to come
            self.cutoff = float(values[0])
        self.values, self.counts, self.pending_added = values[::-1], total[::-1], 0

    def _cut(self, values: Floats, counts: Integers) -> tuple[Floats, Integers]:
        """Of ascending values the last that count ``highest`` together, and the next below them."""
        keep = int(np.searchsorted(counts[::-1].cumsum(), self.highest)) + 2
        return values[-keep:], counts[-keep:]

    def exact_roc(self, impostors: int) -> Roc:
        """The largest TPR at each FPR up to the first that ``highest`` false accepts reach."""
        self._merge()
        values = self.values
        false_accepts = np.concatenate([[0], self.counts.cumsum()])
        if false_accepts[-1] == impostors:
            values = np.append(values, values.dtype.type(-np.inf))  # the threshold that accepts every pair
        else:
            false_accepts = false_accepts[:-1]
        genuine = np.sort(self.genuine)
        true_accepts = len(genuine) - np.searchsorted(genuine, values, side="right")
        just_above = np.nextafter(values, values.dtype.type(np.inf))
        return Roc(false_accepts / impostors, true_accepts / len(genuine), just_above)

    def turning_roc(self, impostors: int) -> Roc:
        """The points at which the curve turns (see `turns`), up to the second FPR that ``highest`` false accepts reach.

        Call it after `exact_roc`.
        """
        complete = self.counts.sum() == impostors
        genuine, accepts = np.unique(
            self.genuine if complete else self.genuine[self.genuine >= self.values[-1]], return_counts=True
        )
        scores = np.union1d(self.values, genuine)
        steps = np.zeros((2, len(scores)), np.int64)
        steps[0, np.searchsorted(scores, self.values)] = self.counts
        steps[1, np.searchsorted(scores, genuine)] = accepts
        false_accepts, true_accepts = (np.append(0, kind[::-1].cumsum()) for kind in steps)
        thresholds = np.append(np.inf, scores[::-1])
        whole = Roc(false_accepts / impostors, true_accepts / len(self.genuine), thresholds)
        return turns(whole, len(self.genuine), impostors)

    def binned_roc(self) -> Roc:
        """A point at the lower edge of each bin, from the highest down."""
        genuine = _histogram(torch.from_numpy(self.genuine))
        false_accepts, true_accepts = self.histogram[::-1].cumsum(), genuine[::-1].cumsum()
        edges = np.linspace(-1, 1, BINS + 1)[::-1]
        return Roc(false_accepts / false_accepts[-1], true_accepts / true_accepts[-1], edges)


def _append(array: Floats, count: int, scores: Tensor) -> int:
    """Write ``scores`` behind the first ``count`` entries of ``array``, and count them too."""
    end = count + len(scores)
    array[count:end] = scores.cpu().numpy()
    return end


def _histogram(scores: Tensor) -> Integers:
    """Counts of cosines in ``BINS`` equal bins of [-1, 1), and one for 1 and what rounding has put above it."""
    bins = scores.add(1).mul_(BINS / 2).int()  # rounds towards 0, and so what lies below -1 into the first
    counts: Integers = bins.bincount(minlength=BINS + 1).cpu().numpy()
    return counts


def _draw(rng: np.random.Generator, half: int, partners: Integers, first: Integers) -> Integers:
    """Distinct pairs at random, (folds, half, 2): row r pairs with the partners[r] rows from first[r] on."""
    ends = partners.cumsum()
    chosen = rng.choice(ends[-1], (FOLDS, half), replace=False)
    row = np.searchsorted(ends, chosen, side="right")
    return np.stack([row, first[row] + chosen - (ends - partners)[row]], axis=-1)


def _joined(exact: Roc, binned: Roc) -> Roc:
    """Join two curves: ``exact`` as far as it goes, and ``binned`` from there on."""
    rest = binned.fpr > exact.fpr[-1]
    fpr, tpr, thresholds = (
        np.concatenate([getattr(exact, name), getattr(binned, name)[rest]]) for name in ("fpr", "tpr", "thresholds")
    )
    return Roc(fpr, tpr, thresholds)
