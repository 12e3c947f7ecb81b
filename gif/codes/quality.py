"""How much of the vectors' similarity codes carry, how evenly they use their tokens, and how well these can be read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gif.codes.balanced import Nodes, kmeans, node_seeds
from gif.codes.identity_codes import IdentityCodes
from gif.vectors.quality import sample_rows
from gif.vectors.store import CodeVectors
from gif_kernels import max_cosine
from gif_kernels.sphere import unit

KMEANS_ROUNDS = 20
KMEANS_STARTS = 3
RIDGE = 1e-3  # of the features' mean square
TRAINING_SHARE = 0.8
_ROWS_A_BLOCK = 1 << 16


@dataclass(frozen=True)
class CodeQuality:
    """What `judge_codes` found.

    Per token: ``cosine``, the mean cosine of identities to the centroid of those that share the code up to it;
    ``entropy`` of its use, as a share of log2 v; ``readout``, the accuracy of `linear_probe`. ``root_share``: the first
    token's cosine as a share of what k-means without capacities reaches. ``neighbor_prefix`` and ``random_prefix``:
    tokens that nearest neighbours, and random pairs, share before they part.
    """

    cosine: tuple[float, ...]
    entropy: tuple[float, ...]
    readout: tuple[float, ...]
    root_share: float
    neighbor_prefix: float
    random_prefix: float

    def __str__(self) -> str:
        def listed(values: tuple[float, ...]) -> str:
            return " ".join(f"{value:.3f}" for value in values)

        return (
            f"cosine to centroids {listed(self.cosine)} ({self.root_share:.1%} of free k-means at the root), "
            f"token entropy {listed(self.entropy)}, linear read-out {listed(self.readout)}, "
            f"prefix shared {self.neighbor_prefix:.2f} by neighbours, {self.random_prefix:.2f} by random pairs"
        )


def judge_codes(codes: IdentityCodes, vectors: CodeVectors | Tensor, *, seed: int = 0) -> CodeQuality:
    """Judge codes (m, l) by the vectors (m, d), m >= 2, they were made from.

    Above 20,000 identities, neighbours and the root's k-means are judged on a sample of that many.

    Raises ValueError if there are not as many vectors as codes.
    """
    table = _checked_table(codes, vectors)
    tokens = codes.codes.to(table.device)
    sample = sample_rows(len(table), seed).to(table.device)
    rows, sampled = unit(table[sample].float()), tokens[sample]
    _, neighbor = max_cosine(rows)
    return CodeQuality(
        cosine=_cosines(codes, table),
        entropy=tuple(_entropy(column, codes.vocab_size) for column in tokens.unbind(1)),
        readout=linear_probe(codes, vectors, seed=seed),
        root_share=_root_share(rows, sampled[:, 0].long(), codes.vocab_size, seed),
        neighbor_prefix=_shared_prefix(sampled, sampled[neighbor]),
        random_prefix=_shared_prefix(sampled, sampled.roll(len(sampled) // 2, 0)),
    )


def linear_probe(codes: IdentityCodes, vectors: CodeVectors | Tensor, *, seed: int = 0) -> tuple[float, ...]:
    """Held-out accuracy, token by token, of a linear read-out of the code from the vector: how learnable it is.

    Ridge regression to one-hot tokens, fitted in closed form on 80 % of the identities and tested on the others.

    Raises ValueError if there are not as many vectors as codes.
    """
    table = _checked_table(codes, vectors)
    v, l, d = codes.vocab_size, codes.length, table.shape[1]  # noqa: E741 (METHOD's l)
    tokens = codes.codes.to(table.device)
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).to(table.device)
    training, test = rows.tensor_split([math.ceil(TRAINING_SHARE * len(rows))])

    def features(block: Tensor) -> Tensor:
        return torch.nn.functional.pad(unit(table[block].float()), (0, 1), value=d**-0.5)  # and a constant

    gram = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=table.device)
    moments = torch.zeros(d + 1, l * v, dtype=torch.float64, device=table.device)
    for block in training.split(_ROWS_A_BLOCK):
        x = features(block)
        y = torch.nn.functional.one_hot(tokens[block].long(), v).view(-1, l * v).to(x)
        gram += x.T @ x
        moments += x.T @ y
    gram.diagonal().add_(RIDGE * len(training) / d)
    weights = torch.linalg.solve(gram, moments).float()
    hits = torch.zeros(l, device=table.device)
    for block in test.split(_ROWS_A_BLOCK):
        hits += ((features(block) @ weights).view(-1, l, v).argmax(2) == tokens[block]).sum(0)
    return tuple((hits / max(1, len(test))).tolist())


def _checked_table(codes: IdentityCodes, vectors: CodeVectors | Tensor) -> Tensor:
    table = vectors.table if isinstance(vectors, CodeVectors) else vectors
    if table.ndim != 2 or len(table) != len(codes):
        raise ValueError(f"vectors must be ({len(codes)}, d), one a code, got {tuple(table.shape)}")
    return table


def _cosines(codes: IdentityCodes, table: Tensor) -> tuple[float, ...]:
    """Mean cosine to the centroid for each prefix length: a node's unit rows add up to size times mean cosine."""
    nodes, node = codes.prefixes(codes.length - 1).to(table.device).unique(return_inverse=True)
    sums = torch.zeros(len(nodes), table.shape[1], device=table.device)
    for row in torch.arange(len(table), device=table.device).split(_ROWS_A_BLOCK):
        sums.index_add_(0, node[row], unit(table[row].float()))
    cosines = [1.0]  # an identity is its own leaf
    for _ in range(codes.length - 1):
        cosines.append(float(sums.norm(dim=1).sum()) / len(table))
        nodes, parent = (nodes // codes.vocab_size).unique(return_inverse=True)
        sums = torch.zeros(len(nodes), table.shape[1], device=table.device).index_add_(0, parent, sums)
    return tuple(reversed(cosines))


def _entropy(tokens: Tensor, vocab_size: int) -> float:
    share = tokens.long().bincount(minlength=vocab_size).double() / len(tokens)
    return float(torch.special.entr(share).sum()) / math.log(vocab_size)


def _root_share(rows: Tensor, child: Tensor, k: int, seed: int) -> float:
    index = torch.arange(len(rows), device=rows.device).expand(KMEANS_STARTS, -1)
    nodes = Nodes(rows, index, torch.ones_like(index, dtype=torch.bool))
    free = kmeans(nodes, k, KMEANS_ROUNDS, node_seeds(seed, 0, np.arange(KMEANS_STARTS)))
    best = float(nodes.similarity(free).amax(-1).mean(1).max())
    ours = nodes.centroids(child.expand(KMEANS_STARTS, -1), torch.zeros_like(free))[0]
    return float((rows * ours[child]).sum(1).mean()) / best


def _shared_prefix(left: Tensor, right: Tensor) -> float:
    """Mean number of leading tokens that codes (n, l) have in common, row by row."""
    return float((left == right).long().cumprod(1).sum(1).double().mean())
