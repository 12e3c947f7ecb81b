"""`python -m benchmarks.tokens_alignment`: how well tokens can be read off the vectors, by how children are named.

Beside `tokenize`, with and without alignment, stands a residual quantiser: one codebook a level for all nodes, so that
tokens mean the same everywhere by construction, and the same capacities, so that codes are distinct too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.clusters import clustered
from gif.codes import CodeQuality, IdentityCodes, TokenizeConfig, code_length, judge_codes, tokenize
from gif.codes.clustering import kmeans
from gif.codes.nodes import Nodes, Scores
from gif.codes.prices import Market, balancing_prices
from gif.codes.repair import capacities, repair
from gif.codes.splitmix import node_seeds
from gif.documents import markdown_table
from gif.vectors.store import CodeVectors
from gif_kernels.sphere import unit

ROUNDS = 8
"""How often the quantiser's codebook is improved: rows are assigned within the capacities, then means are taken."""
PRICE_RATES = tuple(0.2 * 0.88**i for i in range(30))
"""Steps of the prices that begin at none, in units of the mean spread of similarities."""
COLUMNS = ("codes", "read-out of tokens", "cosine to centroids", "neighbours share", "random pairs share")


def main(
    *,
    identities: int = 20_000,
    width: int = 128,
    vocab_size: int = 20,
    capacity_factor: float = 1.5,
    seeds: int = 3,
    vectors: Path | None = None,
) -> None:
    """Cut codes in each way and print a table of what `judge_codes` says of them, means of all seeds.

    Args:
        identities: m.
        width: d of the vectors.
        vocab_size: v.
        capacity_factor: how much larger than the mean a child may be.
        seeds: how many tables of vectors.
        vectors: code vectors to cut instead of clusters within clusters; the first ``identities`` of them.
    """
    found: dict[str, list[CodeQuality]] = {}
    for seed in range(seeds):
        rows = clustered(identities, width, seed) if vectors is None else CodeVectors.load(vectors).table[:identities]
        for name, cut in WAYS.items():
            codes = cut(unit(rows.float()), vocab_size, capacity_factor, seed)  # IdentityCodes refuses codes alike
            found.setdefault(name, []).append(judge_codes(codes, rows))
    print(markdown_table(COLUMNS, [(name, *_described(qualities)) for name, qualities in found.items()]))


def _described(qualities: list[CodeQuality]) -> tuple[str, ...]:
    def means(values: list[tuple[float, ...]]) -> str:
        return " ".join(f"{mean:.3f}" for mean in np.mean(values, axis=0))

    return (
        means([quality.readout for quality in qualities]),
        means([quality.cosine for quality in qualities]),
        means([(quality.neighbor_prefix,) for quality in qualities]),
        means([(quality.random_prefix,) for quality in qualities]),
    )


def quantized(rows: Tensor, vocab_size: int, capacity_factor: float, seed: int) -> IdentityCodes:
    """Codes of unit ``rows`` (m, d) by residual quantisation within the capacities of the tree that the codes span."""
    m, v = len(rows), vocab_size
    length = code_length(m, v)
    residuals = rows.clone()
    codes = torch.zeros(m, length, dtype=torch.int64)
    node = torch.zeros(m, dtype=torch.int64)
    for depth in range(length):
        nodes = _nodes(rows, node)
        limit = v ** (length - depth - 1)
        codebook = _first_codebook(residuals, v, seed, depth)
        for _ in range(ROUNDS):
            token = _assign(residuals, nodes, codebook, capacity_factor, limit)
            sums = torch.zeros_like(codebook).index_add_(0, token, residuals)
            codebook = sums / token.bincount(minlength=v).clamp_min(1)[:, None]
        codes[:, depth] = token
        residuals -= codebook[token]
        node = node * v + token
    return IdentityCodes(codes, v)


def _nodes(rows: Tensor, node: Tensor) -> Nodes:
    """The rows of each value of ``node`` (m,), padded to the largest."""
    order = node.argsort(stable=True)
    sizes = node[order].unique_consecutive(return_counts=True)[1]
    place = torch.arange(int(sizes.max()))
    index = (sizes.cumsum(0) - sizes)[:, None] + place
    return Nodes(rows, order[index.clamp_max(len(rows) - 1)], place < sizes[:, None])


def _first_codebook(residuals: Tensor, v: int, seed: int, depth: int) -> Tensor:
    """Directions of k-means of all ``residuals`` (m, d), at the mean length: (v, d)."""
    index = torch.arange(len(residuals))[None]
    everything = Nodes(residuals, index, torch.ones_like(index, dtype=torch.bool))
    directions = kmeans(everything, v, ROUNDS, node_seeds(seed, depth, np.zeros(1, np.int64)))[0]
    return directions * (residuals @ directions.T).amax(1).mean()


class _Distances(Scores):
    """The nearness of residuals to a codebook: half the squared distance, negated, up to a constant of the row."""

    def __init__(self, nodes: Nodes, codebook: Tensor, similarity: Tensor) -> None:
        self._nodes = self._own = nodes
        self._centroids = codebook.expand(len(nodes.index), -1, -1)
        self._held = similarity


def _assign(residuals: Tensor, nodes: Nodes, codebook: Tensor, capacity_factor: float, limit: int) -> Tensor:
    """The token (m,) of each row: the nearest of ``codebook`` (v, d) within the capacities of its node."""
    v = len(codebook)
    nearness = residuals @ codebook.T - codebook.square().sum(1) / 2
    similarity = nearness[nodes.index]
    capacity = (capacity_factor * nodes.sizes / v).ceil().clamp_max(limit)[:, None].expand(-1, v)
    market = Market(similarity, nodes.mask, capacity)
    prices = balancing_prices(market, torch.zeros(len(capacity), v), PRICE_RATES)
    scores = _Distances(nodes, codebook, similarity)
    child = scores.dearest(prices)
    child = repair(scores, child, capacities(scores.count(child), capacity_factor, limit))
    token = torch.empty(len(residuals), dtype=torch.int64)
    token[nodes.index[nodes.mask]] = child[nodes.mask].long()
    return token


def _tree(alignment: Literal["none", "residual"]) -> Callable[[Tensor, int, float, int], IdentityCodes]:
    def cut(rows: Tensor, vocab_size: int, capacity_factor: float, seed: int) -> IdentityCodes:
        return tokenize(
            rows, TokenizeConfig(vocab_size=vocab_size, capacity_factor=capacity_factor, alignment=alignment, seed=seed)
        )

    return cut


WAYS: dict[str, Callable[[Tensor, int, float, int], IdentityCodes]] = {
    "tree, names at random": _tree("none"),
    "tree, aligned": _tree("residual"),
    "residual quantiser": quantized,
}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
