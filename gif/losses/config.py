"""A head by name, as configs and the command line give it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from torch import nn

from gif.codes import IdentityCodes
from gif.data.identities import Identities, require_same_names
from gif.errors import InputError
from gif.losses.gif_loss import GIFLoss
from gif.losses.recipes import Recipe, RecipeName
from gif.losses.softmax import MarginSoftmax
from gif.losses.token_weights import TokenWeights
from gif.vectors.store import CodeVectors
from gif_kernels import AngularMargin

_GIF_OPTIONS = ("recipe", "overrides", "projection", "token_weights")
_SOFTMAX_OPTIONS = ("scale", "margin", "sample_rate", "centers")


@dataclass(frozen=True)
class HeadConfig:
    """Which loss to train with.

    Args:
        kind: "gif" predicts identity codes; "softmax" has a centre an identity; "partial_fc" samples those centres.
        recipe: gif: "live" contrasts with moving code vectors, "paper" is the published pair of losses.
        overrides: gif: fields of the recipe to set, such as {vector_lr: 1.0, scale: 32.0}.
        projection: gif: "linear" gives each token a projection of its own, "none" does not.
        token_weights: gif: weight of each token's loss over the code.
        scale: softmax and partial_fc: s of the logits.
        margin: softmax and partial_fc: of the target logit.
        sample_rate: partial_fc: share of the identities in a step.
        centers: softmax and partial_fc: what the centres start from, random directions or the code vectors.

    Raises ValueError for an option that does not belong to the kind, or an override that is no field of `Recipe`.
    """

    kind: Literal["gif", "softmax", "partial_fc"] = "gif"
    recipe: RecipeName = "live"
    overrides: dict[str, float | AngularMargin] = field(default_factory=dict)
    projection: Literal["linear", "none"] = "linear"
    token_weights: TokenWeights = "uniform"
    scale: float = 64.0
    margin: AngularMargin = AngularMargin()  # noqa: RUF009 (frozen)
    sample_rate: float = 0.1
    centers: Literal["random", "vectors"] = "random"

    def __post_init__(self) -> None:
        foreign = _SOFTMAX_OPTIONS if self.kind == "gif" else _GIF_OPTIONS
        defaults = {entry.name: entry.default for entry in fields(self)} | {"overrides": {}}
        given = [name for name in foreign if getattr(self, name) != defaults[name]]
        if given:
            hint = "set the recipe's in overrides" if self.kind == "gif" else "they are for kind gif"
            raise InputError(f"head kind {self.kind} does not use {', '.join(given)}; {hint}")
        known = [entry.name for entry in fields(Recipe)]
        if unknown := sorted(set(self.overrides) - set(known)):
            raise InputError(f"overrides {', '.join(unknown)} are no fields of a recipe; there are {', '.join(known)}")

    def build(
        self,
        num_identities: int,
        embedding_size: int,
        codes: IdentityCodes | None,
        vectors: CodeVectors | None,
        *,
        identities: Identities | None = None,
    ) -> nn.Module:
        """The loss, with fresh parameters; ``codes`` and ``vectors`` are needed for kind "gif".

        Raises ValueError where they are missing, are for another number of identities, or say that they are of others
        than ``identities``, those of the data set, or in another order.
        """
        if self.kind != "gif":
            if self.centers == "vectors" and vectors is None:
                raise InputError('centers "vectors" need code vectors; make them with `gif vectors`, or take "random"')
            if vectors is not None and self.centers == "vectors":
                require_same_names("the code vectors", vectors.identities, "the data set", identities)
            return MarginSoftmax(
                num_identities,
                embedding_size,
                margin=self.margin,
                scale=self.scale,
                sample_rate=self.sample_rate if self.kind == "partial_fc" else 1.0,
                centers=vectors.table if vectors is not None and self.centers == "vectors" else None,
            )
        if codes is None:
            raise InputError("head kind gif needs codes; make them with `gif tokenize` and give --codes")
        require_same_names("the codes", codes.identities, "the data set", identities)
        if vectors is not None:
            require_same_names("the code vectors", vectors.identities, "the data set", identities)
        if len(codes) != num_identities:
            raise InputError(
                f"the codes are for {len(codes)} identities and the data set has {num_identities}; make code vectors "
                "and codes from this data set"
            )
        return GIFLoss(
            codes,
            vectors,
            embedding_size,
            recipe=self.recipe,
            projection=self.projection,
            token_weights=self.token_weights,
            **self.overrides,
        )
