"""Do identities with few images fare worse? The same task for each group of identities, by how many images they have.

A softmax pushes the centre of a rare identity away far more often than it pulls it, and rare centres drift together
(minority collapse; the supplement's section 6). To see it, groups must be compared at equal terms: of each group the
same number of identities and two images of each, so that galleries and pairs are equally many and only the rarity of
the identities differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gif.evaluation.identification import rank1
from gif.evaluation.verification import tar_at_far
from gif_kernels import max_cosine

EDGES = (2, 4, 8, 16)
IDENTITIES = 500
DRAWS = 10
FAR = 1e-3


@dataclass(frozen=True)
class Group:
    """Identities that have from ``low`` to ``high`` images; ``identities`` (k,) int64, at random, ascending.

    ``high`` is None where there is no upper end.
    """

    low: int
    high: int | None
    identities: Tensor

    @property
    def name(self) -> str:
        """Such as "4-7 images"."""
        if self.high is None:
            return f"{self.low}+ images"
        return f"{self.low}-{self.high} images" if self.high > self.low else f"{self.low} images"


def groups_by_images(
    labels: Tensor, *, edges: Sequence[int] = EDGES, identities: int = IDENTITIES, seed: int = 0
) -> list[Group]:
    """Groups of equally many identities of ``labels`` (n,), by their number of images; the rarest first.

    Group j has from edges[j] to edges[j + 1] - 1 images. Each is thinned at random to the size of the smallest, at most
    ``identities``; groups with fewer than 20 identities are left out.
    """
    counts = labels.bincount()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for low, following in zip(edges, [*edges[1:], None], strict=True):
        members = ((counts >= low) & (counts < (following or len(labels) + 1))).nonzero().flatten()
        if len(members) >= 20:
            shuffled = members[torch.randperm(len(members), generator=generator)]
            found.append(Group(low, following and following - 1, shuffled))
    size = min([identities, *(len(group.identities) for group in found)])
    return [Group(group.low, group.high, group.identities[:size].sort().values) for group in found]


def judge_group(embeddings: Tensor, labels: Tensor, group: Group, *, seed: int = 0) -> dict[str, float]:
    """Rank-1 and TAR@FAR=1e-3 of two images of each identity of a group, over all pairs; means of ten draws.

    Args:
        embeddings: (n, d), the group's images among them.
        labels: (n,) integer.
        group: whose images count; each identity has at least two here.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    member = torch.isin(labels, group.identities).nonzero().flatten()
    scores = []
    for _ in range(DRAWS):
        shuffled = member[torch.randperm(len(member), generator=generator)]
        ordered = shuffled[labels[shuffled].sort(stable=True).indices]
        follows = torch.zeros(len(ordered), dtype=torch.bool)  # whether the one before, and two before, has its label
        follows[2:] = labels[ordered[2:]] == labels[ordered[:-2]]
        pairs = ordered[~follows]
        unit, whose = normalize(embeddings[pairs].float(), dim=1), labels[pairs]
        row, column = torch.triu_indices(len(pairs), len(pairs), offset=1)
        tar = tar_at_far((unit @ unit.T)[row, column].numpy(), (whose[row] == whose[column]).numpy(), (FAR,))
        scores.append((rank1(unit, whose), tar[FAR]))
    found, accepted = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    return {"rank1": found, "tar": accepted}


def spread_of_centers(centers: Tensor, group: Group) -> dict[str, float]:
    """How far apart the centres (m, d) of a group's identities are: mean cosine of all pairs, and to the nearest."""
    unit = normalize(centers[group.identities].float(), dim=1)
    k = len(unit)
    mean = (float(unit.double().sum(0).square().sum()) - k) / (k * (k - 1))
    return {"mean_cosine": mean, "nearest_cosine": float(max_cosine(unit)[0].mean())}
