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
from gif.errors import InputError
from gif.integrations.state import TablesInState
from gif.vectors.store import CodeVectors
from gif_kernels.sphere import unit

OF_SOFTMAX_LOSSES = ("weight_init_func", "weight_regularizer", "weight_reg_weight")


class GIFLoss(TablesInState, BaseMetricLossFunction):
    """A classification loss like its ArcFaceLoss, whose size does not depend on the number of classes.

        loss = loss_func(embeddings, labels)                   # or (embeddings, labels, indices_tuple)
        optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=0.1)

    Each row has its loss, so every reducer works: ClassWeightedReducer weighs the classes. A miner's ``indices_tuple``
    weighs the rows by how often it names them. ``ref_emb`` is refused, as by the library's classification losses:
    `CrossBatchMemory` goes beside it, around a loss of pairs (examples/metric_learning.py). The state dict holds the
    code vectors that training moves.

    Args:
        codes: the identities' codes.
        vectors: the identities' code vectors; None where the recipe reads none. Recipe "live" moves them in place.
        embedding_size: d.
        num_classes: m, which must be as many as there are codes, where it is given.
        reducer: the library's; MeanReducer where not given.
        embedding_regularizer: the library's.
        embedding_reg_weight: of the regularizer.
        collect_stats: of the library, whether to record statistics.
        distance: the library's; the loss compares by CosineSimilarity, and takes no other.
        options: of `gif.GIFLoss`, such as ``recipe`` and its overrides.

    Raises ValueError for another number of classes than of codes; TypeError for another distance, or an argument of the
    library's softmax losses that has no meaning here, such as ``weight_regularizer``; and what `gif.GIFLoss` raises.
    """

    def __init__(
        self,
        codes: IdentityCodes | str | Path,
        vectors: CodeVectors | str | Path | None,
        embedding_size: int = 512,
        *,
        num_classes: int | None = None,
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
        if num_classes not in (None, len(self.loss.codes)):
            raise InputError(
                f"num_classes is {num_classes} and the codes are for {len(self.loss.codes)} identities; make code "
                "vectors and codes from the data set that is trained on"
            )

    @property
    def num_classes(self) -> int:
        """m, how many identities there are codes for."""
        return len(self.loss.codes)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scaled cosines (B, m) of embeddings (B, d) to the code vectors of all identities: what is highest is nearest.

        It is for looking at: training compares with some of them. Raises ValueError where there are no code vectors.
        """
        if self.loss.vectors is None:
            raise InputError("logits are cosines to code vectors, and there are none; give vectors")
        self.loss.settle()
        table = unit(self.loss.vectors.table.to(embeddings.device).float())
        logits: Tensor = self.loss.recipe.contrast_scale * unit(embeddings.float()) @ table.T
        return logits

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
