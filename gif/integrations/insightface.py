"""The loss in the shape of insightface's PartialFC_V2, for training loops like arcface_torch's train_v2.py.

Only the import changes:

    # from partial_fc_v2 import PartialFC_V2
    from functools import partial
    from gif.integrations.insightface import PartialFC
    PartialFC_V2 = partial(PartialFC, codes="codes.safetensors", vectors="vectors.safetensors")
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gif.codes import IdentityCodes
from gif.distributed import replicate
from gif.errors import InputError
from gif.integrations.state import TablesInState
from gif.losses import RECIPES, GIFLoss, Recipe
from gif.losses.recipes import RecipeName
from gif.progress import say_once
from gif.vectors.store import CodeVectors
from gif_kernels import AngularMargin, checks

Scale = Literal["recipe", "margin_loss"]


class PartialFC(TablesInState):
    """GIFLoss with PartialFC_V2's constructor and forward pass; no process group is needed, and no CUDA.

    Every process holds the whole head, a few million parameters whatever the number of classes: initial values come
    from rank 0 and gradients are averaged, so it stays outside DistributedDataParallel as PartialFC_V2 does, and a
    checkpoint does not depend on the number of processes. The state dict holds the parameters, the fingerprint of the
    codes, and the code vectors where the recipe moves them.

    Args:
        margin_loss: insightface's CombinedMarginLoss, ArcFace or CosFace, or anything with their attributes. Its
            margins go where the recipe compares an embedding with identities: to L_CC of "live", to L_C of "paper".
            ArcFace differentiates as it does there, straight through. None keeps the recipe's own.
        embedding_size: d.
        num_classes: m, which the codes must be for.
        sample_rate: has no meaning here, since no class is left out: any rate is taken.
        fp16: has no meaning here, since the loss chooses its own precision: either is taken.
        codes: the identities' codes, or their file.
        vectors: the identities' code vectors, or their file.
        recipe: as for `GIFLoss`.
        scale: what multiplies the cosines: "recipe" keeps the recipe's, "margin_loss" takes the margin loss's. It is
            the inverse of the softmax's temperature, and what is right depends on how many classes are compared: 64 is
            for all of them, and "live" compares with the batch, its siblings and 4,096 others.

    Raises TypeError for a margin loss of unknown form or with interclass filtering, ValueError where codes, vectors,
    num_classes and embedding_size do not fit each other.
    """

    def __init__(
        self,
        margin_loss: Any,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        codes: IdentityCodes | str | Path,
        vectors: CodeVectors | str | Path | None,
        recipe: RecipeName | Recipe = "live",
        scale: Scale = "recipe",
    ) -> None:
        super().__init__()
        codes = IdentityCodes.load(codes, mmap=True) if isinstance(codes, str | Path) else codes
        if num_classes != len(codes):
            raise InputError(
                f"num_classes is {num_classes} and the codes are for {len(codes)} identities; make code vectors and "
                "codes from the data set that is trained on"
            )
        recipe = (RECIPES[recipe] if isinstance(recipe, str) else recipe).fitted(num_classes)
        checks.choice("scale", scale, get_args(Scale))
        self.loss = GIFLoss(codes, vectors, embedding_size, recipe=_with_margin(recipe, margin_loss, scale))
        self._replicated = False

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Loss () of this process's embeddings (B, d) and labels (B,) or (B, 1); a label of -1 is ignored.

        Labels are integers of any dtype, or whole numbers in float32 or float64 as insightface's loaders give them.
        It is the mean over the process's rows: with a backbone in DistributedDataParallel and batches of one size, the
        gradient is that of the mean over all processes' rows.
        """
        if not self._replicated:  # here and not before: by now the parameters are on the process group's device
            replicate(self.loss)
            self._replicated = True
        loss: Tensor = self.loss(local_embeddings, _as_loaders_give_them(local_labels))
        return loss


def _as_loaders_give_them(labels: Tensor) -> Tensor:
    """Labels (B, 1) as (B,), and whole numbers in float32 or float64 as int64; others as they are."""
    if not isinstance(labels, Tensor):
        return labels  # the loss says what it wants
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.dtype not in (torch.float32, torch.float64):
        return labels
    whole = (labels == labels.trunc()) & (labels.abs() * torch.finfo(labels.dtype).eps < 2)
    checks.require(whole.all(), f"labels in {labels.dtype} must be whole numbers that it tells apart; give int64")
    return labels.long()


def _with_margin(recipe: Recipe, margin_loss: Any, whose_scale: Scale) -> Recipe:
    """The recipe with the margin loss's margins; and its scale, if that is asked for: if not, a line says so."""
    if margin_loss is None:
        return recipe
    margin, theirs = _margin_of(margin_loss), float(margin_loss.s)
    contrasts = recipe.contrast_weight > 0
    own = recipe.contrast_scale if contrasts else recipe.scale
    if whose_scale == "recipe" and own != theirs:
        say_once(
            f"the recipe's scale, {own:g}, is kept, and not the margin loss's, {theirs:g}, which is for a softmax over "
            'all classes; PartialFC(..., scale="margin_loss") takes that one'
        )
    scale = theirs if whose_scale == "margin_loss" else own
    if contrasts:
        return replace(recipe, contrast_margin=margin, contrast_scale=scale)
    return replace(recipe, margin=margin, scale=scale)


def _margin_of(margin_loss: Any) -> AngularMargin:
    """The margin of insightface's losses, by their attributes."""
    if getattr(margin_loss, "interclass_filtering_threshold", 0):
        raise TypeError("interclass filtering needs a logit for every class, and there are none; set it to 0")
    if all(hasattr(margin_loss, name) for name in ("s", "m1", "m2", "m3")):  # CombinedMarginLoss
        m1, m2, m3 = (float(getattr(margin_loss, name)) for name in ("m1", "m2", "m3"))
        if m3 > 0:
            return AngularMargin(m2=0.0, m3=m3)  # it leaves m1 and m2 out then
        return AngularMargin(m1, m2, gradient="straight_through")
    if all(hasattr(margin_loss, name) for name in ("s", "margin")):  # ArcFace
        return AngularMargin(m2=float(margin_loss.margin), gradient="straight_through")
    if all(hasattr(margin_loss, name) for name in ("s", "m")):  # CosFace
        return AngularMargin(m2=0.0, m3=float(margin_loss.m))
    raise TypeError(
        f"cannot read scale and margin off {type(margin_loss).__name__}; give insightface's CombinedMarginLoss, "
        "ArcFace or CosFace, or None and set them in the recipe"
    )
