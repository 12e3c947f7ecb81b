"""Who is it: the nearest other image, and search in a gallery that not everyone is in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import normalize

from gif.errors import InputError
from gif.evaluation.verification import Roc, check_fars, thin
from gif_kernels import checks, max_cosine

RANKS = (1, 5, 10)
FPIRS = (0.01, 0.1)
"""The ranks and the false-positive identification rates that IJB results are given at."""

_PROBES_A_BLOCK = 1024


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
        raise InputError("no identity has two images, so none can be found; give some identity at least two")
    _, nearest = max_cosine(vectors)
    return float((labels[nearest] == labels)[probes].double().mean())


@dataclass(frozen=True, eq=False)
class Identification:
    """What `identify` found.

    ``ranks``: share of the mated probes found among the k best; ``tpir``: true-positive identification rate at each
    FPIR, NaN where no probe is unmated; ``mated``, ``unmated``: how many probes have, and have not, their person in the
    gallery; ``curve``: TPIR (``tpr``) against FPIR (``fpr``), at most 2,000 points, None where no probe is unmated.
    """

    ranks: dict[int, float]
    tpir: dict[float, float]
    mated: int
    unmated: int
    curve: Roc | None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curve, fit for JSON: NaN becomes None."""
        return {
            "rank": {str(rank): share for rank, share in self.ranks.items()},
            "tpir": {f"{fpir:g}": None if math.isnan(share) else share for fpir, share in self.tpir.items()},
            "mated": self.mated,
            "unmated": self.unmated,
        }


@torch.no_grad()
def identify(
    probes: ArrayLike | Tensor,
    probe_subjects: ArrayLike | Tensor,
    gallery: ArrayLike | Tensor,
    gallery_subjects: ArrayLike | Tensor,
    *,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> Identification:
    """Search each probe in a gallery by cosine: closed-set ranks, and open-set TPIR at FPIRs.

    A mated probe is found at rank k if fewer than k other entries score at least as high as its own person's: a tie is
    no hit. TPIR at an FPIR is the share of mated probes found at rank 1 with a score above the threshold, which is the
    best score of an unmated probe, the max(int(u FPIR) - 1, 0)-th, from 0, of the u sorted from the highest.

    Args:
        probes: (p, d).
        probe_subjects: (p,) integer, whose they are.
        gallery: (g, d).
        gallery_subjects: (g,) integer, each once.
        ranks: the k.
        fpirs: rates in [0, 1].

    Raises:
        TypeError, ValueError: a wrong dtype, shape or rate, NaN or infinity, a person twice in the gallery, or no mated
            probe.
    """
    check_fars(fpirs)
    vectors, subjects = labelled(probes, probe_subjects)
    entries, owners = labelled(gallery, gallery_subjects)
    owners, order = owners.sort()
    if bool((owners[1:] == owners[:-1]).any()):
        twice = int(owners[1:][owners[1:] == owners[:-1]][0])
        raise InputError(f"subject {twice} is in the gallery twice; merge its images into one template")
    place = torch.searchsorted(owners, subjects).clamp_(max=len(owners) - 1)
    mated = owners[place] == subjects
    if not mated.any():
        raise InputError("no probe's subject is in the gallery, so none can be found; give files of one protocol")

    entries = normalize(entries[order], dim=1)
    own, other, above = [], [], []  # score of the own entry, the best other score, how many others are as high
    for rows in torch.arange(len(vectors), device=vectors.device).split(_PROBES_A_BLOCK):
        scores = normalize(vectors[rows], dim=1) @ entries.T
        found = scores.gather(1, place[rows, None])
        scores.scatter_(1, place[rows, None], torch.where(mated[rows, None], -math.inf, found))
        own.append(found.squeeze(1))
        other.append(scores.amax(1))
        above.append((scores >= found).sum(1))
    own_score, other_score, others_above = torch.cat(own)[mated], torch.cat(other), torch.cat(above)[mated]
    accepted = own_score[own_score > other_score[mated]].sort().values.cpu().numpy()
    false = other_score[~mated].sort(descending=True).values.cpu().numpy()

    def tpir(threshold: float) -> float:
        return float((accepted > threshold).sum() / len(own_score))

    at = {fpir: tpir(false[max(int(len(false) * fpir) - 1, 0)]) if len(false) else math.nan for fpir in fpirs}
    curve = None
    if len(false):
        thresholds = np.append(np.unique(false)[::-1], -np.inf)
        false_share = (len(false) - np.searchsorted(false[::-1], thresholds, side="right")) / len(false)
        true_share = (len(accepted) - np.searchsorted(accepted, thresholds, side="right")) / len(own_score)
        curve = thin(Roc(false_share, true_share, thresholds), len(false))
    return Identification(
        ranks={k: float((others_above < k).double().mean()) for k in ranks},
        tpir=at,
        mated=len(own_score),
        unmated=len(false),
        curve=curve,
    )


def labelled(embeddings: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (n, d) as float32, or float64 where they are, and labels (n,) as int64 on their device.

    Raises TypeError for labels that are not integers, ValueError for another shape, or NaN or infinity.
    """
    vectors = torch.as_tensor(embeddings).detach()
    identities = whole_numbers("labels", labels).to(vectors.device)
    if vectors.ndim != 2 or identities.shape != vectors.shape[:1]:
        wanted = "wanted embeddings (n, d) and labels (n,)"
        raise InputError(f"{wanted}, got {tuple(vectors.shape)} and {tuple(identities.shape)}")
    if not vectors.isfinite().all():
        raise InputError("embeddings hold NaN or infinity, wanted finite numbers; look for a diverged training run")
    return vectors if vectors.dtype == torch.float64 else vectors.float(), identities


def whole_numbers(name: str, values: ArrayLike | Tensor) -> Tensor:
    """``values``, integers of any dtype, as int64. Raises TypeError for bool, floats and complex numbers."""
    given = torch.as_tensor(values)
    if given.numel() == 0 and not isinstance(values, Tensor | np.ndarray):
        return given.long()  # an empty list is float32 to torch
    if given.dtype not in checks.INTEGER:
        raise TypeError(f"{name} must be integers, got {given.dtype}; convert them")
    return given.long()
