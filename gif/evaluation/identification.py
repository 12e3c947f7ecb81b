"""Who is it: the nearest other image."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gif_kernels import max_cosine


def rank1(embeddings: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Share of images whose nearest other image, by cosine, has their label.

    Every image is searched among all others; one whose identity has no other image is not a probe, but is found by
    others. Of equally near images the first counts.

    Args:
        embeddings: (n, d).
        labels: (n,) integer.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, NaN or infinity, or no identity with two images.
    """
    vectors, labels = labelled(embeddings, labels)
    _, identity, images = labels.unique(return_inverse=True, return_counts=True)
    probes = images[identity] > 1
    if not probes.any():
        raise ValueError("no identity has two images, so none can be found; give some identity at least two")
    _, nearest = max_cosine(vectors)
    return float((labels[nearest] == labels)[probes].double().mean())


def labelled(embeddings: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (n, d) as float32, or float64 where they are, and labels (n,) as int64 on their device.

    Raises TypeError for labels that are not integers, ValueError for another shape, or NaN or infinity.
    """
    vectors = torch.as_tensor(embeddings).detach()
    identities = torch.as_tensor(labels, device=vectors.device)
    if vectors.ndim != 2 or identities.shape != vectors.shape[:1]:
        wanted = "wanted embeddings (n, d) and labels (n,)"
        raise ValueError(f"{wanted}, got {tuple(vectors.shape)} and {tuple(identities.shape)}")
    if identities.is_floating_point() or identities.is_complex():
        raise TypeError(f"labels must be integers, got {identities.dtype}; convert them")
    if not vectors.isfinite().all():
        raise ValueError("embeddings hold NaN or infinity, wanted finite numbers; look for a diverged training run")
    return vectors if vectors.dtype == torch.float64 else vectors.float(), identities.long()
