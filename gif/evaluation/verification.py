"""Same or not: the field's ten-fold pair accuracy, ROC, and TAR at a given FAR."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, eq=False)
class PairAccuracy:
    """Accuracy over the folds: mean, population standard deviation, and the threshold each fold was judged at."""

    accuracy: float
    std: float
    thresholds: NDArray[np.float64]

    def to_dict(self) -> dict[str, float]:
        """Mean and deviation, fit for JSON."""
        return {"accuracy": self.accuracy, "std": self.std}


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
        issame: (n,) bool, whether pair i is genuine.
        folds: how many, from 2 to n.

    Raises:
        ValueError: a wrong shape or number of folds, NaN or infinity.
    """
    vectors = _numpy(embeddings).astype(np.float64)
    genuine = _numpy(issame).astype(bool)
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
    correct_in = np.stack([correct[:, fold].sum(1) for fold in held_out])  # (folds, thresholds)
    best = (correct_in.sum(0) - correct_in).argmax(1)
    accuracies = correct_in[np.arange(folds), best] / [len(fold) for fold in held_out]
    return PairAccuracy(float(accuracies.mean()), float(accuracies.std()), THRESHOLDS[best])


def roc(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> Roc:
    """The ROC curve of scores (n,), labels (n,) true where the pair is genuine: a point for each distinct score.

    It is sklearn.metrics.roc_curve with drop_intermediate=False; the first point is (0, 0) at an infinite threshold.

    Raises ValueError for a wrong shape, NaN or infinity, or without a genuine or an impostor pair.
    """
    scores, labels = _numpy(scores), _numpy(labels).astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise InputError(f"wanted scores (n,) and labels (n,), got {scores.shape} and {labels.shape}")
    if not np.isfinite(scores).all():
        raise InputError("scores hold NaN or infinity, wanted finite numbers; look for NaN among the embeddings")
    require_both(int(labels.sum()), int((~labels).sum()))
    with needs("scikit-learn", "ROC curves"):
        from sklearn.metrics import roc_curve
    return Roc(*roc_curve(labels, scores, drop_intermediate=False))


def tar_at_far(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor, fars: Sequence[float]) -> dict[float, float]:
    """True-accept rate at each false-accept rate: the TPR where the FPR of `roc` is nearest; of ties the largest.

    Arguments and errors are those of `roc`; ``fars`` lie in [0, 1]. A FAR below half of one impostor pair finds FPR 0.
    """
    check_fars(fars)
    curve = roc(scores, labels)
    return {far: tar_at(curve, far) for far in fars}


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


def _numpy(values: ArrayLike | Tensor) -> NDArray[np.generic]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    return np.asarray(values)
