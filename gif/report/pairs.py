"""All pairs of some images by their cosines: the hardest of either kind, and how scores are distributed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

ROWS = 512  # of a tile
BINS = 200
CANDIDATES = 64  # pairs that are kept for each that is wanted: an image is shown once


@dataclass(frozen=True)
class Pair:
    """Two images by their numbers, and the cosine of their embeddings."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class PairScores:
    """What `all_pairs` found.

    ``genuine`` and ``impostor`` are the shares of each kind's pairs in the bins between ``edges``; ``hardest_genuine``
    the pairs of one identity with the lowest cosines, ``hardest_impostor`` those of two with the highest.
    """

    edges: NDArray[np.float64]
    genuine: NDArray[np.float64]
    impostor: NDArray[np.float64]
    hardest_genuine: list[Pair]
    hardest_impostor: list[Pair]


@torch.inference_mode()
def all_pairs(embeddings: Tensor, labels: Tensor, wanted: int) -> PairScores:
    """Look at every pair of images: embeddings (n, d), labels (n,); ``wanted`` of the hardest pairs of either kind.

    In the lists of the hardest no image comes twice. Memory is a tile of 512 x n cosines.
    """
    rows = normalize(embeddings.float(), dim=1)
    edges = np.linspace(-1, 1, BINS + 1)
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    genuine: list[Pair] = []
    impostor: list[Pair] = []
    for begin, cosines, same, above in _tiles(rows, labels):
        bins = ((cosines + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        for kind, mask in enumerate((same & above, ~same & above)):
            counts[kind] += bins[mask].bincount(minlength=BINS).cpu()
        genuine += _extreme(-cosines.masked_fill(~(same & above), torch.inf), begin, -1, wanted)
        impostor += _extreme(cosines.masked_fill(~(~same & above), -torch.inf), begin, 1, wanted)
    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    return PairScores(
        edges,
        shares[0].numpy(),
        shares[1].numpy(),
        _distinct(sorted(genuine, key=lambda pair: pair.cosine), wanted),
        _distinct(sorted(impostor, key=lambda pair: -pair.cosine), wanted),
    )


def _tiles(rows: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """First row, cosines (k, n), where labels are the same, and where the column comes after the row."""
    columns = torch.arange(len(rows), device=rows.device)
    labels = labels.to(rows.device)
    for begin in range(0, len(rows), ROWS):
        own = slice(begin, begin + ROWS)
        yield begin, rows[own] @ rows.T, labels[own, None] == labels, columns > columns[own, None]


def _extreme(scores: Tensor, begin: int, sign: int, wanted: int) -> list[Pair]:
    """The pairs of a tile with the highest of ``scores``, which are ``sign`` times their cosines."""
    best = scores.flatten().topk(min(CANDIDATES * wanted, scores.numel()))
    found = best.values.isfinite()
    places = best.indices[found]
    width = scores.shape[1]
    first, second = (begin + places // width).tolist(), (places % width).tolist()
    return [Pair(*pair) for pair in zip(first, second, (sign * best.values[found]).tolist(), strict=True)]


def _distinct(pairs: list[Pair], wanted: int) -> list[Pair]:
    """The first pairs of images that no earlier one has."""
    seen: set[int] = set()
    kept: list[Pair] = []
    for pair in pairs:
        if len(kept) < wanted and not seen & {pair.first, pair.second}:
            kept.append(pair)
            seen |= {pair.first, pair.second}
    return kept
