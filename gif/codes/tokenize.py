"""From code vectors to identity codes: balanced hierarchical k-means."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from gif.codes.identity_codes import LARGEST_VOCAB, IdentityCodes, check_code_space, code_length
from gif.codes.tree import ALIGNMENTS, Alignment, Cutting, root
from gif.errors import InputError
from gif.progress import progress
from gif.resume import UnfinishedWork
from gif.vectors.store import CodeVectors
from gif_kernels import checks

CHECKPOINT_FORMAT = "gif.tokenize_checkpoint/1"
_DIGEST_ROWS = 4096
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
    centroid_levels: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
) -> IdentityCodes:
    """Give each identity a distinct code, its path in a tree of k-means clusters: similar identities share a prefix.

    Recursive spherical k-means with k = v (the paper's codes) within capacities: a node at depth j holds at most
    v^(l-j) identities, so that codes are distinct whatever the vectors, and at most ceil(capacity_factor n / v) of the
    n its parent holds.

    The vectors may be memory-mapped: they are read in blocks, and what is held besides is some 30 bytes an identity at
    most, and the centroids that are kept: 2 d bytes a node.

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
        centroid_levels: keep the centroids of nodes of this many tokens and fewer with the codes, as float16, for
            `IdentityCodes.extend`; by default all but the leaves'. The last of them, of l - 1 tokens, take most room.
        seed: the same seed gives the same codes.
        checkpoint: file that holds the finished levels; a later call with the same arguments continues from it to the
            same codes, and removes it when done.
        keep_checkpoint: leave the checkpoint, of all levels: for whoever saves the codes before removing it.

    Raises TypeError for vectors that are not a floating-point tensor; ValueError if they are not (m, d), hold NaN,
    infinity or a row of zeros, if m identities do not fit in v^l codes, or for a checkpoint of another run.
    """
    table = vectors.table if isinstance(vectors, CodeVectors) else vectors
    checks.floating("vectors", table, ("m", "d"), finite=False)
    checks.choice("alignment", alignment, ALIGNMENTS)
    if not (capacity_factor >= 1 and iterations >= 0):
        raise InputError(f"wanted capacity_factor >= 1 and iterations >= 0, got {capacity_factor} and {iterations}")
    length = _checked_length(len(table), vocab_size, length, slack)
    centroid_levels = length - 1 if centroid_levels is None else centroid_levels
    if not 0 <= centroid_levels < length:
        raise InputError(f"centroid_levels must lie in [0, {length}), the tokens of a code, got {centroid_levels}")
    table = table.detach()
    _check_directions(table)

    m = len(table)
    settings = (
        f"{m} x {table.shape[1]} {table.dtype} start={_digest(table)} v={vocab_size} l={length} "
        f"iterations={iterations} capacity_factor={capacity_factor} alignment={alignment} seed={seed}"
    )
    work = UnfinishedWork(checkpoint, CHECKPOINT_FORMAT, settings)
    columns: list[Tensor] = []
    codebooks: list[Tensor] = []
    if (saved := work.load()) is not None:
        columns = [saved[f"tokens.{j}"].to(table.device) for j in range(len(saved) // 2)]
        codebooks = [saved[f"codebook.{j}"].to(table.device) for j in range(len(saved) // 2)]
    level = root(table, vocab_size, seed)
    with progress("tokenize", m * length, "tokens") as advance:
        advance(m * len(columns))
        for depth in range(length):
            if depth == len(columns):
                cutting = Cutting(vocab_size ** (length - depth - 1), capacity_factor, iterations)
                tokens, codebook = level.tokens(cutting, alignment, advance)
                columns.append(tokens)
                codebooks.append(codebook)
                work.save(
                    {f"tokens.{j}": column for j, column in enumerate(columns)}
                    | {f"codebook.{j}": rows for j, rows in enumerate(codebooks)}
                )
            if depth < length - 1:
                level = level.descend(columns[depth])
    codes = IdentityCodes(
        torch.stack(columns, 1).cpu(),
        vocab_size,
        centroids=level.centroids(centroid_levels) if centroid_levels else None,
        directions=torch.stack(codebooks).half() if alignment == "residual" else None,
    )
    if not keep_checkpoint:
        work.remove()
    return codes


def _digest(table: Tensor) -> str:
    """Tells tables apart by rows at equal distances."""
    rows = table[:: max(1, len(table) // _DIGEST_ROWS)].cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(rows.numpy().data).hexdigest()[:12]


def _checked_length(m: int, vocab_size: int, length: int | None, slack: float) -> int:
    shortest = code_length(m, vocab_size, slack)
    length = shortest if length is None else length
    if length < shortest:
        fits = (v for v in range(vocab_size + 1, LARGEST_VOCAB + 1) if code_length(m, v, slack) <= length)
        larger = next((f" or vocab_size >= {v}" for v in fits), "")
        raise InputError(
            f"{m} identities with slack {slack} do not fit in codes of {length} tokens of {vocab_size}; "
            f"take length >= {shortest}{larger}"
        )
    check_code_space(vocab_size, length)
    return length


def _check_directions(table: Tensor) -> None:
    for rows in table.split(_ROWS_A_BLOCK):
        norm = torch.linalg.vector_norm(rows.float(), dim=1)
        if not bool((norm.isfinite() & (norm > 0)).all()):
            raise InputError(
                "vectors hold NaN, infinity or a row of zeros; check the encoder and the images it was given"
            )
