"""A head by name, as configs and the command line give it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from gif.codes import IdentityCodes
from gif.data.identities import Identities, require_same_names
from gif.errors import InputError
from gif.losses.gif_loss import GIFLoss
from gif.losses.partial_fc import PartialFC
from gif.losses.peers import DynamicClassPool, DynamicClassQueue, PrototypeMemory, VirtualFC
from gif.losses.recipes import Recipe, RecipeName
from gif.losses.softmax import MarginSoftmax
from gif.losses.token_weights import TokenWeights
from gif.vectors.store import CodeVectors
from gif_kernels import AngularMargin

_SOFTMAX_OPTIONS = ("scale", "margin", "centers")
_MOMENTUM_OPTIONS = ("scale", "margin", "pool_size", "momentum")
_OPTIONS = {
    "gif": ("recipe", "overrides", "projection", "token_weights"),
    "softmax": _SOFTMAX_OPTIONS,
    "partial_fc": (*_SOFTMAX_OPTIONS, "sample_rate", "samples"),
    "class_queue": _MOMENTUM_OPTIONS,
    "class_pool": _MOMENTUM_OPTIONS,
    "prototype_memory": ("scale", "margin", "pool_size", "group_size", "refresh"),
    "virtual_fc": ("scale", "margin", "pool_size", "group_size"),
}
_POOL = {"class_queue": "queue_size", "prototype_memory": "memory_size", "virtual_fc": "columns"}  # what it is there


@dataclass(frozen=True)
class HeadConfig:
    """Which loss to train with.

    Args:
        kind: "gif" predicts identity codes; "softmax" has a centre an identity; "partial_fc" samples those centres;
            "class_queue", "class_pool" (Faster Face Classification), "prototype_memory" and "virtual_fc" hold the
            weights of some identities at a time (`gif.losses.peers`).
        recipe: gif: "live" contrasts with moving code vectors, "paper" is the published pair of losses.
        overrides: gif: fields of the recipe to set, such as {vector_lr: 1.0, scale: 32.0}.
        projection: gif: "linear" gives each token a projection of its own, "none" does not.
        token_weights: gif: weight of each token's loss over the code.
        scale: all but gif: s of the logits; the kind's own where not given.
        margin: all but gif: of the target logit; the kind's own where not given.
        sample_rate: partial_fc: share of the identities that are drawn in a step.
        samples: partial_fc: how many are drawn, in place of a share; None: as many as the share has.
        centers: softmax and partial_fc: what the centres start from, random directions or the code vectors.
        pool_size: class_queue, class_pool, prototype_memory, virtual_fc: how many class weights there are; the kind's
            own where not given.
        momentum: class_queue and class_pool: of the momentum encoder; the kind's own where not given.
        group_size: prototype_memory and virtual_fc: images of an identity side by side in an epoch's order; the kind's
            own where not given.
        refresh: prototype_memory: what a prototype takes of the batch's; the kind's own where not given.

    Raises ValueError for an option that does not belong to the kind, or an override that is no field of `Recipe`.
    """

    kind: Literal["gif", "softmax", "partial_fc", "class_queue", "class_pool", "prototype_memory", "virtual_fc"] = "gif"
    recipe: RecipeName = "live"
    overrides: dict[str, float | AngularMargin] = field(default_factory=dict)
    projection: Literal["linear", "none"] = "linear"
    token_weights: TokenWeights = "uniform"
    scale: float | None = None
    margin: AngularMargin | None = None
    sample_rate: float = 0.1
    samples: int | None = None
    centers: Literal["random", "vectors"] = "random"
    pool_size: int | None = None
    momentum: float | None = None
    group_size: int | None = None
    refresh: float | None = None

    def __post_init__(self) -> None:
        own = _OPTIONS[self.kind]
        defaults = {entry.name: entry.default for entry in fields(self)} | {"overrides": {}}
        given = [name for name in defaults if name != "kind" and getattr(self, name) != defaults[name]]
        if foreign := [name for name in given if name not in own]:
            kinds = [kind for kind, options in _OPTIONS.items() if foreign[0] in options]
            hint = f"they are for kind {', '.join(kinds)}"
            if self.kind == "gif" and set(foreign) <= set(_SOFTMAX_OPTIONS):
                hint = "set the recipe's in overrides"
            raise InputError(f"head kind {self.kind} does not use {', '.join(foreign)}; {hint}")
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
        backbone: nn.Module | None = None,
    ) -> nn.Module:
        """The loss, with fresh parameters; ``codes`` and ``vectors`` are needed for kind "gif".

        ``backbone`` is what will be trained: needed where a momentum encoder follows it, and copied as it is now.

        Raises ValueError where they are missing, are for another number of identities, or say that they are of others
        than ``identities``, those of the data set, or in another order.
        """
        if self.kind in ("softmax", "partial_fc"):
            if self.centers == "vectors" and vectors is None:
                raise InputError('centers "vectors" need code vectors; make them with `gif vectors`, or take "random"')
            if vectors is not None and self.centers == "vectors":
                require_same_names("the code vectors", vectors.identities, "the data set", identities)
            options = self._given("scale", "margin")
            if vectors is not None and self.centers == "vectors":
                options["centers"] = vectors.table
            if self.kind == "softmax":
                return MarginSoftmax(num_identities, embedding_size, **options)
            drawn = {"sample_rate": self.sample_rate} if self.samples is None else {"samples": self.samples}
            return PartialFC(num_identities, embedding_size, **options, **drawn)
        if self.kind != "gif":
            return self._peer(num_identities, embedding_size, backbone)
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

    def _peer(self, num_identities: int, embedding_size: int, backbone: nn.Module | None) -> nn.Module:
        options = self._given(*_OPTIONS[self.kind])
        if "pool_size" in options:
            options[_POOL.get(self.kind, "pool_size")] = options.pop("pool_size")
        if self.kind == "prototype_memory":
            return PrototypeMemory(num_identities, embedding_size, **options)
        if self.kind == "virtual_fc":
            return VirtualFC(num_identities, embedding_size, **options)
        if backbone is None:
            raise InputError(f"head kind {self.kind} has an encoder that follows the backbone; build it with one")
        head = DynamicClassQueue if self.kind == "class_queue" else DynamicClassPool
        return head(num_identities, backbone, embedding_size, **options)

    def _given(self, *names: str) -> dict[str, Any]:
        """Those of the options that are set; the others are the head's own."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
