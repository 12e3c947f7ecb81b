"""How well a head's targets are met in a batch: what the loss alone does not tell."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize


def against_others(embeddings: Tensor, labels: Tensor, vectors: Tensor, candidates: Tensor) -> dict[str, Tensor]:
    """Measures of embeddings (B, d) by their cosines to the vectors (C, d) of identities ``candidates`` (C,).

    The first B of these are the embeddings' own, ``labels`` (B,).

    - ``cosine to own``: mean cosine to the identity's own vector.
    - ``cosine to impostor``: mean over the batch of the largest cosine to another identity's.
    - ``batch accuracy``: share that is nearer to its own than to those.
    """
    cosines = normalize(embeddings.float()) @ normalize(vectors.float()).T
    own = cosines.diagonal()
    impostor = cosines.masked_fill(candidates == labels[:, None], -1).amax(1)
    return {
        "cosine to own": own.mean(),
        "cosine to impostor": impostor.mean(),
        "batch accuracy": (own > impostor).float().mean(),
    }
