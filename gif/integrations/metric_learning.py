"""The loss as one of pytorch-metric-learning's, with its reducers, miners and regularizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils.common_functions import labels_required, ref_not_supported
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch import Tensor

import gif.losses
from gif.codes import IdentityCodes
from gif.vectors.store import CodeVectors

OF_SOFTMAX_LOSSES = ("num_classes", "weight_init_func", "weight_regularizer", "weight_reg_weight")


class GIFLoss(BaseMetricLossFunction):
    """A classification loss like its ArcFaceLoss, whose size does not depend on the number of classes.

        loss = loss_func(embeddings, labels)                   # or (embeddings, labels, indices_tuple)
        optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)

    Each row has its loss, so every reducer works: ClassWeightedReducer weighs the classes. A miner's ``indices_tuple``
    weighs the rows by how often it names them. ``ref_emb`` is refused, as by the library's classification losses.

    Args:
        codes: the identities' codes.
        vectors: the identities' code vectors; None where the recipe reads none. Recipe "live" moves them in place.
        embedding_size: d.
        reducer: the library's; MeanReducer where not given.
        embedding_regularizer: the library's.
        embedding_reg_weight: of the regularizer.
        collect_stats: of the library, whether to record statistics.
        distance: the library's; the loss compares by CosineSimilarity, and takes no other.
        options: of `gif.GIFLoss`, such as ``recipe`` and its overrides.

    Raises TypeError for another distance, or an argument of the library's softmax losses that has no meaning here,
    such as ``weight_regularizer``, and what `gif.GIFLoss` raises.
    """

    def __init__(
        self,
        codes: IdentityCodes | str | Path,
        vectors: CodeVectors | str | Path | None,
        embedding_size: int = 512,
        *,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1.0,
        collect_stats: bool | None = None,
        distance: Any = None,
        **options: Any,
    ) -> None:
        if foreign := [name for name in OF_SOFTMAX_LOSSES if name in options]:
            raise TypeError(
                f"{', '.join(foreign)} belong to losses with a weight for each class, and there is none here"
            )
        if distance is not None and type(distance) is not CosineSimilarity:
            raise TypeError(f"the loss compares by cosine, got distance {distance}; leave it out")
        super().__init__(
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
            distance=distance,
        )
        self.loss = gif.losses.GIFLoss(codes, vectors, embedding_size, **options)

    def get_default_distance(self) -> CosineSimilarity:
        """What the library takes for the loss's distance."""
        return CosineSimilarity()

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, dict[str, Any]]:
        """The loss of each row, as the library's reducers want it."""
        labels_required(labels)
        ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        rows = self.loss(embeddings, labels, reduction="none")
        rows = rows * convert_to_weights(indices_tuple, labels, dtype=rows.dtype)
        indices = torch.arange(len(rows), device=rows.device)
        return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}
