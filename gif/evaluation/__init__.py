"""Judging embeddings: pairs, templates, identification, all pairs of held-out identities, ROC."""

from gif.evaluation.alignment import align_face
from gif.evaluation.benchmarks import Benchmark, HeldOutIdentities, IjbFolders, Outcome, PairFiles
from gif.evaluation.curves import plot_det, plot_identification, plot_roc
from gif.evaluation.embedding import Embedder, embed, embed_images
from gif.evaluation.identification import Identification, identify, rank1
from gif.evaluation.ijb import Ijb, IjbFaces, IjbResult, evaluate_ijb
from gif.evaluation.open_set import Judgement, judge
from gif.evaluation.rarity import Group, groups_by_images, judge_group, spread_of_centers
from gif.evaluation.tables import identification_table, pairs_table, verification_table
from gif.evaluation.templates import (
    Templates,
    TemplateSums,
    TemplateVerification,
    template_features,
    verify_templates,
)
from gif.evaluation.thresholds import Threshold, Thresholds, thresholds_of
from gif.evaluation.verification import PairAccuracy, Roc, roc, tar_at_far, verify_pairs

__all__ = [
    "Benchmark",
    "Embedder",
    "Group",
    "HeldOutIdentities",
    "Identification",
    "Ijb",
    "IjbFaces",
    "IjbFolders",
    "IjbResult",
    "Judgement",
    "Outcome",
    "PairAccuracy",
    "PairFiles",
    "Roc",
    "TemplateSums",
    "TemplateVerification",
    "Templates",
    "Threshold",
    "Thresholds",
    "align_face",
    "embed",
    "embed_images",
    "evaluate_ijb",
    "groups_by_images",
    "identification_table",
    "identify",
    "judge",
    "judge_group",
    "pairs_table",
    "plot_det",
    "plot_identification",
    "plot_roc",
    "rank1",
    "roc",
    "spread_of_centers",
    "tar_at_far",
    "template_features",
    "thresholds_of",
    "verification_table",
    "verify_pairs",
    "verify_templates",
]
