"""Same or not: the field's ten-fold pair accuracy, ROC, and TAR at a given FAR."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gif.errors import InputError
from gif.packages import needs

THRESHOLDS = np.arange(0, 4, 0.01)
"""The squared distances the field tries."""

FOLDS = 10
ROC_POINTS = 2_000
RATE_ROUNDING = 1e-9  # 1e-4 of 10,000 pairs is one pair, whatever float64 makes of it


@dataclass(frozen=True, eq=False)
class PairAccuracy:
    """Accuracy over the folds: mean, population standard deviation, and the threshold each fold was judged at.

    ``one_kind`` counts the folds whose pairs are all genuine or all impostor: with any, the accuracy is not the
    protocol's, since each fold is judged at a threshold that was chosen among other shares of the two.
    """

    accuracy: float
    std: float
    thresholds: NDArray[np.float64]
    one_kind: int = 0

    def to_dict(self) -> dict[str, float]:
        """Mean and deviation, and the folds of one kind where there are any, fit for JSON."""
        numbers = {"accuracy": self.accuracy, "std": self.std}
        return numbers | {"folds_of_one_kind": self.one_kind} if self.one_kind else numbers


@dataclass(frozen=True, eq=False)
class Roc:
    """Points of a ROC curve: scores >= thresholds[i] are fpr[i] of the impostor and tpr[i] of the genuine pairs'."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    thresholds: NDArray[np.floating]


def verify_pairs(embeddings: ArrayLike | Tensor, issame: ArrayLike | Tensor, folds: int = FOLDS) -> PairAccuracy:
    """Accuracy of telling genuine from impostor pairs, each fold at the threshold that is best on the others.

    The protocol of LFW and its successors: rows are normalised, the distance is ||a - b||^2, folds are consecutive
    (sklearn's KFold without shuffling), the threshold is the first of 0, 0.01, ..., 3.99 with the highest accuracy on
    the other folds, and a pair is called genuine where its distance is below it. Computed in float64.

    Args:
        embeddings: (2n, d), pair i in rows 2i and 2i + 1; a row of zeros stays zero.
        issame: (n,) bool, or 0 and 1: whether pair i is genuine.
        folds: how many, from 2 to n.

    Warns (UserWarning) where a fold's pairs are all of one kind, as in a list with the genuine pairs first: its
    accuracy is another than the same pairs would have in the protocol's order.

    Raises:
        ValueError: a wrong shape or number of folds, NaN or infinity, a truth value that is neither 0 nor 1.
    """
    vectors = _numpy(embeddings).astype(np.float64)
    genuine = truth_values("issame", issame)
    if vectors.ndim != 2 or genuine.ndim != 1 or len(vectors) != 2 * len(genuine):
        raise InputError(f"wanted embeddings (2n, d) and issame (n,), got {vectors.shape} and {genuine.shape}")
    if not 2 <= folds <= len(genuine):
        raise InputError(f"folds must lie in [2, {len(genuine)}], the number of pairs, got {folds}")
    if not np.isfinite(vectors).all():
        raise InputError("embeddings hold NaN or infinity, wanted finite numbers; look for a diverged training run")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.where(norms > 0, norms, 1)
    distances = np.square(vectors[::2] - vectors[1::2]).sum(1)

    correct = (distances < THRESHOLDS[:, None]) == genuine  # (thresholds, n)
    held_out = np.array_split(np.arange(len(genuine)), folds)
    one_kind = sum(len(set(genuine[fold])) == 1 for fold in held_out)
    if one_kind:
        warnings.warn(one_kind_folds(one_kind, folds), stacklevel=2)
    correct_in = np.stack([correct[:, fold].sum(1) for fold in held_out])  # (folds, thresholds)
    best = (correct_in.sum(0) - correct_in).argmax(1)
    accuracies = correct_in[np.arange(folds), best] / [len(fold) for fold in held_out]
    return PairAccuracy(float(accuracies.mean()), float(accuracies.std()), THRESHOLDS[best], one_kind)


def one_kind_folds(one_kind: int, folds: int) -> str:
    """Why the accuracy of pairs with folds of one kind is not what it seems, in words."""
    return (
        f"{one_kind} of {folds} folds hold genuine pairs alone, or impostor pairs alone, so this accuracy is not the "
        "protocol's; order the pairs so that each fold has both, as LFW's list does"
    )


def roc(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> Roc:
    """The ROC curve of scores (n,), labels (n,) 1 or true where the pair is genuine: a point for each distinct score.

    It is sklearn.metrics.roc_curve with drop_intermediate=False; the first point is (0, 0) at an infinite threshold.

    Raises ValueError for a wrong shape, NaN or infinity, a label that is neither 0 nor 1, or without a genuine or an
    impostor pair.
    """
    scores, labels = _numpy(scores), truth_values("labels", labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise InputError(f"wanted scores (n,) and labels (n,), got {scores.shape} and {labels.shape}")
    if not np.isfinite(scores).all():
        raise InputError("scores hold NaN or infinity, wanted finite numbers; look for NaN among the embeddings")
    require_both(int(labels.sum()), int((~labels).sum()))
    with needs("scikit-learn", "ROC curves"):
        from sklearn.metrics import roc_curve
    return Roc(*roc_curve(labels, scores, drop_intermediate=False))


def tar_at_far(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor, fars: Sequence[float]) -> dict[float, float]:
    """True-accept rate at each false-accept rate, as insightface's IJB protocol takes it.

    That is the TPR of the nearest FPR, of ties the largest, among the points that sklearn.metrics.roc_curve keeps by
    default (see `turns`). A FAR below half of one impostor pair finds FPR 0.

    Arguments and errors are those of `roc`; ``fars`` lie in [0, 1]. Warns (UserWarning) where a FAR is below what one
    impostor pair is worth: its TAR is that of other rates.
    """
    check_fars(fars)
    genuine = truth_values("labels", labels)
    curve = turns(roc(scores, genuine), int(genuine.sum()), int((~genuine).sum()))
    if low := unresolved(fars, int((~genuine).sum())):
        warnings.warn(resolution(low, int((~genuine).sum())), stacklevel=2)
    return {far: tar_at(curve, far) for far in fars}


def turns(curve: Roc, genuine: int, impostor: int) -> Roc:
    """The points of `roc`'s curve that sklearn.metrics.roc_curve keeps with its default, drop_intermediate=True.

    A point is left out where the next distinct score accepts as many more genuine and as many more impostor pairs as
    its own did: there the curve goes straight on. The first and the last point stay. So the nearest FPR may be further
    away than on the whole curve, which is what insightface's numbers rest on.
    """
    false, true = np.rint(curve.fpr[1:] * impostor), np.rint(curve.tpr[1:] * genuine)
    keep = np.ones(len(curve.fpr), bool)
    keep[2:-1] = (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0)
    return Roc(curve.fpr[keep], curve.tpr[keep], curve.thresholds[keep])


def unresolved(fars: Sequence[float], impostors: int) -> list[float]:
    """Which false-accept rates above 0 are below one of ``impostors`` pairs, so that no threshold has them."""
    return [far for far in fars if 0 < far * impostors < 1 - RATE_ROUNDING]


def known(tar: Mapping[float, float], impostors: int) -> dict[str, float | None]:
    """TAR at each FAR, fit for JSON: None where ``impostors`` pairs do not resolve the FAR."""
    low = unresolved(list(tar), impostors)
    return {f"{far:g}": None if far in low else share for far, share in tar.items()}


def resolution(fars: Sequence[float], impostors: int) -> str:
    """Say why the TAR at the `unresolved` ``fars`` is not known."""
    rates = ", ".join(f"{far:g}" for far in fars)
    return f"TAR at FAR {rates} is not known: {impostors:,} impostor pairs resolve {1 / impostors:.1e} and above"


def tar_at(curve: Roc, far: float) -> float:
    """TPR at the point whose FPR is nearest ``far``; of ties, whether of one FPR or on both sides, the largest."""
    distance = np.abs(curve.fpr - far)
    return float(curve.tpr[distance == distance.min()].max())


def thin(curve: Roc, impostors: int, points: int = ROC_POINTS) -> Roc:
    """At most ``points`` of a curve: FPR 0 and FPRs evenly spaced in the logarithm, of equal FPRs the largest TPR."""
    best = np.flatnonzero(np.append(np.diff(curve.fpr) > 0, True))
    wanted = np.geomspace(1 / impostors, 1, points - 1)
    keep = best[np.unique(np.append(0, np.searchsorted(curve.fpr[best], wanted)))]
    return Roc(curve.fpr[keep], curve.tpr[keep], curve.thresholds[keep])


def check_fars(fars: Sequence[float]) -> None:
    """Raise ValueError unless every false-accept rate lies in [0, 1]."""
    if not all(0 <= far <= 1 for far in fars):
        raise InputError(f"fars must lie in [0, 1], got {tuple(fars)}; give rates such as 1e-4, not percentages")


def require_both(genuine: int, impostor: int) -> None:
    """Raise ValueError unless there are both genuine and impostor pairs."""
    if not genuine:
        raise InputError("there is no genuine pair; give some identity at least two images")
    if not impostor:
        raise InputError("there is no impostor pair; give images of at least two identities")


def truth_values(name: str, values: ArrayLike | Tensor) -> NDArray[np.bool_]:
    """``values`` as bool: they are, or are 0 and 1. Raises ValueError for any other, such as -1 for an impostor."""
    given = _numpy(values)
    if given.dtype == np.bool_:
        return given.astype(bool, copy=False)
    if given.dtype.kind not in "iuf" or not np.isin(given, (0, 1)).all():
        other = given[~np.isin(given, (0, 1))] if given.dtype.kind in "iuf" else given
        shown = ", ".join(map(str, np.unique(other)[:3]))
        raise InputError(f"{name} must be bool, or 1 for genuine and 0 for impostor pairs, got {shown}; convert them")
    return given.astype(bool)


def _numpy(values: ArrayLike | Tensor) -> NDArray[np.generic]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    return np.asarray(values)
