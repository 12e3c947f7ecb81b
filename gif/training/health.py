"""How well a head's targets are met in a batch: what the loss alone does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gif.losses import GIFLoss, MarginSoftmax


@singledispatch
def health(head: nn.Module, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Named measures () of embeddings (B, d) with identities ``labels`` (B,); a label of -1 is ignored.

    - ``token accuracy/1`` ... ``/l``: share of the batch whose likeliest token is right at each place of the code.
    - ``code accuracy``: share whose whole code is right.
    - ``cosine to own``: mean cosine to the identity's own code vector, or softmax centre.
    - ``cosine to impostor``: mean over the batch of the largest cosine to another identity's, among the batch's own and
      those that the contrast of a `GIFLoss` adds.
    - ``batch accuracy``: share that is nearer to its own than to those.
    - ``code vectors stayed``: how many could not take their step so far, since it was not finite.

    A head of another kind has none.
    """
    return {}


@health.register
@torch.no_grad()
def _(head: GIFLoss, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    embeddings, labels = embeddings[labels >= 0], labels[labels >= 0].long()
    hits = head.predict(embeddings) == head.codes.lookup(labels)
    measures = {f"token accuracy/{place}": share for place, share in enumerate(hits.float().mean(0), 1)}
    measures["code accuracy"] = hits.all(1).float().mean()
    if head.vectors is None:
        return measures
    candidates = torch.cat([labels, head.codes.siblings(labels, head.recipe.siblings).flatten()])
    if head.recipe.moves_vectors:
        measures["code vectors stayed"] = head.stayed.to(embeddings.device)
    return measures | _against_others(embeddings, labels, head.vectors.lookup(candidates), candidates)


@health.register
@torch.no_grad()
def _(head: MarginSoftmax, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    embeddings, labels = embeddings[labels >= 0], labels[labels >= 0].long()
    return _against_others(embeddings, labels, head.weight[labels], labels)


def _against_others(embeddings: Tensor, labels: Tensor, vectors: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """Cosines to the vectors (C, d) of identities ``candidates`` (C,), of which the first B are the labels."""
    cosines = normalize(embeddings.float()) @ normalize(vectors.float()).T
    own = cosines.diagonal()
    impostor = cosines.masked_fill(candidates == labels[:, None], -1).amax(1)
    return {
        "cosine to own": own.mean(),
        "cosine to impostor": impostor.mean(),
        "batch accuracy": (own > impostor).float().mean(),
    }


def summary(measures: Mapping[str, float]) -> str:
    """The measures in one short line."""
    parts = []
    tokens = [value for name, value in measures.items() if name.startswith("token accuracy")]
    if tokens:
        parts.append(f"tokens {'/'.join(f'{value:.0%}'[:-1] for value in tokens)} %")
        parts.append(f"codes {measures['code accuracy']:.0%}")
    if "cosine to own" in measures:
        parts.append(f"own {measures['cosine to own']:.2f}, impostor {measures['cosine to impostor']:.2f}")
    if stayed := measures.get("code vectors stayed"):
        parts.append(f"{stayed:,.0f} code vectors stayed")
    return ", ".join(parts)
