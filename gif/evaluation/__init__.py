"""Judging embeddings: pairs, identification, all pairs of held-out identities, ROC."""

from gif.evaluation.curves import plot_roc
from gif.evaluation.identification import rank1
from gif.evaluation.open_set import Judgement, judge
from gif.evaluation.verification import PairAccuracy, Roc, roc, tar_at_far, verify_pairs

__all__ = ["Judgement", "PairAccuracy", "Roc", "judge", "plot_roc", "rank1", "roc", "tar_at_far", "verify_pairs"]
