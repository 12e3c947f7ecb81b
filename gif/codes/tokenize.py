"""From code vectors to identity codes: balanced hierarchical k-means."""

from __future__ import annotations

import torch
from torch import Tensor

from gif.codes.identity_codes import LARGEST_VOCAB, IdentityCodes, check_code_space, code_length
from gif.codes.tree import ALIGNMENTS, Alignment, root
from gif.progress import progress
from gif.vectors.store import CodeVectors
from gif_kernels import checks

_ROWS_A_BLOCK = 1 << 18


def tokenize(
    vectors: CodeVectors | Tensor,
    *,
    vocab_size: int,
    length: int | None = None,
    slack: float = 0.0,
    capacity_factor: float = 1.5,
    iterations: int = 8,
    alignment: Alignment = "residual",
    keep_centroids: bool = True,
    seed: int = 0,
) -> IdentityCodes:
    """Give each identity a distinct code, its path in a tree of k-means clusters: similar identities share a prefix.

    Recursive spherical k-means with k = v (the paper's codes) within capacities: a node at depth j holds at most
    v^(l-j) identities, so that codes are distinct whatever the vectors, and at most ceil(capacity_factor n / v) of the
    n its parent holds.

    Args:
        vectors: CodeVectors, or a (m, d) tensor; only directions matter. Any float dtype; products are in float32.
        vocab_size: v, in [2, 256].
        length: l; by default the smallest with v^l >= m (1 + slack).
        slack: share of codes to leave free for identities that come later.
        capacity_factor: 1 makes a node's children equal in size, within one; larger keeps more of the similarity; with
            infinity only v^(l-j) binds.
        iterations: Lloyd rounds a node.
        alignment: "residual" numbers children so that a token means the same direction under every prefix; "none"
            numbers them at random: the paper's plain recursion.
        keep_centroids: keep the centroids of all nodes but the leaves with the codes, as float16.
        seed: the same seed gives the same codes.

    Raises TypeError for vectors that are not a floating-point tensor; ValueError if they are not (m, d), hold NaN,
    infinity or a row of zeros, or if m identities do not fit in v^l codes.
    """
    table = vectors.table if isinstance(vectors, CodeVectors) else vectors
    checks.floating("vectors", table, ("m", "d"), finite=False)
    checks.choice("alignment", alignment, ALIGNMENTS)
    if not (capacity_factor >= 1 and iterations >= 0):
        raise ValueError(f"wanted capacity_factor >= 1 and iterations >= 0, got {capacity_factor} and {iterations}")
    length = _checked_length(len(table), vocab_size, length, slack)
    table = table.detach()
    _check_directions(table)

    level = root(table, vocab_size, seed)
    codes = torch.empty(len(table), length, dtype=torch.uint8)
    centroids = []
    with progress("tokenize", codes.numel(), "tokens") as advance:
        for depth in range(length):
            limit = vocab_size ** (length - depth - 1)
            cut = level.split(capacity_factor=capacity_factor, limit=limit, iterations=iterations, advance=advance)
            names = level.names(cut, alignment, advance)
            tokens = names[level.node_of_row(), cut.child.long()]
            codes[level.order.cpu(), depth] = tokens.cpu()
            if depth < length - 1:
                level = level.descend(cut, names, tokens)
                centroids.append(level.centroids)
    return IdentityCodes(codes, vocab_size, centroids=centroids if keep_centroids else None)


def _checked_length(m: int, vocab_size: int, length: int | None, slack: float) -> int:
    shortest = code_length(m, vocab_size, slack)
    length = shortest if length is None else length
    if length < shortest:
        fits = (v for v in range(vocab_size + 1, LARGEST_VOCAB + 1) if code_length(m, v, slack) <= length)
        larger = next((f" or vocab_size >= {v}" for v in fits), "")
        raise ValueError(
            f"{m} identities with slack {slack} do not fit in codes of {length} tokens of {vocab_size}; "
            f"take length >= {shortest}{larger}"
        )
    check_code_space(vocab_size, length)
    return length


def _check_directions(table: Tensor) -> None:
    for rows in table.split(_ROWS_A_BLOCK):
        norm = torch.linalg.vector_norm(rows.float(), dim=1)
        if not bool((norm.isfinite() & (norm > 0)).all()):
            raise ValueError(
                "vectors hold NaN, infinity or a row of zeros; check the encoder and the images it was given"
            )
