"""How much of the vectors' similarity codes carry, how evenly they use their tokens, and how well these can be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gif.codes.clustering import kmeans
from gif.codes.identity_codes import IdentityCodes
from gif.codes.nodes import Nodes
from gif.codes.segments import ancestors, tree_sums
from gif.codes.splitmix import node_seeds
from gif.errors import InputError
from gif.vectors.quality import SAMPLE, sample_rows
from gif.vectors.store import CodeVectors
from gif_kernels import max_cosine
from gif_kernels.sphere import unit

KMEANS_ROUNDS = 20
KMEANS_RESTARTS = 3
RIDGE = 1e-3  # of the features' mean square
TRAINING_SHARE = 0.8
PROBED = 1 << 20  # identities that the probe is fitted to and tested on, at most
JUDGED_NODES = 64  # of a depth, whose cut is compared with k-means
_ROWS_A_BLOCK = 1 << 16


@dataclass(frozen=True)
class CodeQuality:
    """What `judge_codes` found.

    Per token: ``cosine``, the mean cosine of identities to the centroid of those that share the code up to it;
    ``entropy`` of its use, as a share of log2 v; ``readout``, the accuracy of `linear_probe`; ``kmeans_share``, its
    cosine as a share of what k-means without capacities reaches in the same nodes. ``neighbor_prefix`` and
    ``random_prefix``: tokens that nearest neighbours, and random pairs, share before they part.
    """

    cosine: tuple[float, ...]
    entropy: tuple[float, ...]
    readout: tuple[float, ...]
    kmeans_share: tuple[float, ...]
    neighbor_prefix: float
    random_prefix: float

    def measures(self) -> list[tuple[str, tuple[float, ...], str]]:
        """Each measure of the tokens: its name, its value for each token, and how to read it."""
        return [
            (
                "cosine to centroid",
                self.cosine,
                "to the mean of those with the same first tokens; 1 in the end",
            ),
            (
                "of free k-means",
                self.kmeans_share,
                "that cosine over k-means' without room for codes; 1: as good",
            ),
            ("token entropy", self.entropy, "1: all values are used alike"),
            ("linear read-out", self.readout, "share of new identities whose token a linear map finds"),
        ]

    def __str__(self) -> str:
        lines = [
            f"{name:<18} {' '.join(f'{value:.3f}' for value in values)}  ({meaning})"
            for name, values, meaning in self.measures()
        ]
        shared = f"{self.neighbor_prefix:.2f} by nearest neighbours, {self.random_prefix:.2f} by random pairs"
        return "\n".join(["codes, token by token:", *lines, f"first tokens shared: {shared}"])


def token_entropy(codes: IdentityCodes) -> tuple[float, ...]:
    """Entropy of each token's use, as a share of log2 v: 1 where all values are used alike."""
    return tuple(_entropy(column, codes.vocab_size) for column in codes.codes.unbind(1))


def judge_codes(codes: IdentityCodes, vectors: CodeVectors | Tensor, *, seed: int = 0) -> CodeQuality:
    """Judge codes (m, l) by the vectors (m, d), m >= 2, they were made from.

    Above 20,000 identities, neighbours, and k-means a depth, are judged on samples of about that many.

    Raises ValueError if there are not as many vectors as codes.
    """
    table = _checked_table(codes, vectors)
    tokens = codes.codes.to(table.device)
    sample = sample_rows(len(table), seed).to(table.device)
    rows, sampled = unit(table[sample].float()), tokens[sample]
    _, neighbor = max_cosine(rows)
    return CodeQuality(
        cosine=_cosines(codes, table),
        entropy=token_entropy(codes),
        readout=linear_probe(codes, vectors, seed=seed),
        kmeans_share=tuple(_kmeans_share(codes, table, depth, seed) for depth in range(codes.length)),
        neighbor_prefix=_shared_prefix(sampled, sampled[neighbor]),
        random_prefix=_shared_prefix(sampled, sampled.roll(len(sampled) // 2, 0)),
    )


def linear_probe(codes: IdentityCodes, vectors: CodeVectors | Tensor, *, seed: int = 0) -> tuple[float, ...]:
    """Held-out accuracy, token by token, of a linear read-out of the code from the vector: how learnable it is.

    Ridge regression to one-hot tokens, fitted in closed form on 80 % of the identities, or of a million of them, and
    tested on the others.

    Raises ValueError if there are not as many vectors as codes.
    """
    table = _checked_table(codes, vectors)
    v, l, d = codes.vocab_size, codes.length, table.shape[1]  # noqa: E741 (METHOD's l)
    tokens = codes.codes.to(table.device)
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:PROBED].to(table.device)
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
        raise InputError(f"vectors must be ({len(codes)}, d), one a code, got {tuple(table.shape)}")
    return table


def _cosines(codes: IdentityCodes, table: Tensor) -> tuple[float, ...]:
    """Mean cosine to the centroid for each prefix length: a node's unit rows add up to size times mean cosine."""
    cosines = [0.0] * (codes.length - 1) + [1.0]  # an identity is its own leaf
    if codes.length > 1:
        order, offsets, paths = (tensor.to(table.device) for tensor in codes.nodes(codes.length - 1))
        levels = ancestors(paths, codes.vocab_size, codes.length - 1)
        for depth, _, sums in tree_sums(table, order, offsets, levels, codes.vocab_size):
            cosines[depth - 1] += float(sums.norm(dim=1).double().sum()) / len(table)
    return tuple(cosines)


def _entropy(tokens: Tensor, vocab_size: int) -> float:
    share = tokens.long().bincount(minlength=vocab_size).double() / len(tokens)
    return float(torch.special.entr(share).sum()) / math.log(vocab_size)


def _kmeans_share(codes: IdentityCodes, table: Tensor, depth: int, seed: int) -> float:
    """Cosine to the children of nodes of ``depth``, as a share of the best of a few runs of k-means.

    1 where every node has a child a row.
    """
    ours = best = 0.0
    for rows, child in _nodes_to_judge(codes, table, depth, seed):
        index = torch.arange(len(rows), device=rows.device).expand(KMEANS_RESTARTS, -1)
        nodes = Nodes(rows, index, torch.ones_like(index, dtype=torch.bool))
        free = kmeans(nodes, codes.vocab_size, KMEANS_ROUNDS, node_seeds(seed, depth, np.arange(KMEANS_RESTARTS)))
        best += float(nodes.similarity(free).amax(-1).sum(1).max())
        centroids = nodes.centroids(child.expand(KMEANS_RESTARTS, -1), torch.zeros_like(free))[0]
        ours += float((rows * centroids[child]).sum())
    return ours / best if best else 1.0


def _nodes_to_judge(codes: IdentityCodes, table: Tensor, depth: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit rows (n, d) and next tokens (n,) of some nodes of ``depth`` that have more than v rows, all or a sample."""
    order, offsets, _ = codes.nodes(depth)
    large = (offsets.diff() > codes.vocab_size).nonzero()[:, 0]
    nodes = large[:: math.ceil(len(large) / JUDGED_NODES)] if len(large) else large
    for node in nodes.tolist():
        members = order[offsets[node] : offsets[node + 1]]
        if len(members) > SAMPLE // len(nodes):
            generator = torch.Generator().manual_seed(seed)
            members = members[torch.randint(len(members), (SAMPLE // len(nodes),), generator=generator)]
        rows = unit(table[members.to(table.device)].float())
        yield rows, codes.table.tokens(members)[:, depth].to(table.device)


def _shared_prefix(left: Tensor, right: Tensor) -> float:
    """Mean number of leading tokens that codes (n, l) have in common, row by row."""
    return float((left == right).long().cumprod(1).sum(1).double().mean())
