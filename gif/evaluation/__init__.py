"""Judging embeddings: pairs, identification, all pairs of held-out identities, ROC."""

from gif.evaluation.curves import plot_roc
from gif.evaluation.identification import rank1
from gif.evaluation.open_set import Judgement, judge
from gif.evaluation.rarity import Group, groups_by_images, judge_group, spread_of_centers
from gif.evaluation.verification import PairAccuracy, Roc, roc, tar_at_far, verify_pairs

__all__ = [
    "Group",
    "Judgement",
    "PairAccuracy",
    "Roc",
    "groups_by_images",
    "judge",
    "judge_group",
    "plot_roc",
    "rank1",
    "roc",
    "spread_of_centers",
    "tar_at_far",
    "verify_pairs",
]
