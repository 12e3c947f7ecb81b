"""From code vectors to identity codes: balanced hierarchical k-means."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gif.codes.blocks import block_floats
from gif.codes.identity_codes import LARGEST_VOCAB, IdentityCodes, check_code_space, code_length
from gif.codes.tree import ALIGNMENTS, Alignment, Cutting, root
from gif.distributed import check_device
from gif.errors import InputError
from gif.progress import progress
from gif.resume import UnfinishedWork
from gif.vectors.store import CodeVectors, digest_rows
from gif_kernels import checks

CHECKPOINT_FORMAT = "gif.tokenize_checkpoint/1"
_ROWS_A_BLOCK = 1 << 18
BYTES_A_ROW = 60  # held beside the vectors: order, codes, paths and candidates for a move
BLOCKS_HELD = 10  # of float32: gathered rows, similarities, membership, and temporaries of them


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
    device: str | torch.device | None = None,
) -> IdentityCodes:
    """Give each identity a distinct code, its path in a tree of k-means clusters: similar identities share a prefix.

    Recursive spherical k-means with k = v (the paper's codes) within capacities: a node at depth j holds at most
    v^(l-j) identities, so that codes are distinct whatever the vectors, and at most ceil(capacity_factor n / v) of the
    n its parent holds.

    The vectors may be memory-mapped: they are read in blocks, and what is held besides is some 30 bytes an identity at
    most, and the centroids that are kept: 2 d bytes a node.

    Args:
        vectors: CodeVectors, or a (m, d) tensor; only directions matter. Any float dtype; products are in float32. The
            codes belong to the identities that CodeVectors do.
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
        device: where to compute: "cpu", "cuda", or "auto" for a GPU that has room for the vectors and else the CPU. By
            default where the vectors are. The tree is the same on every device, but for identities to which two
            children are alike within rounding, and the codes but for names that hang on those. They are on the CPU.

    Raises TypeError for vectors that are not a floating-point tensor; ValueError if they are not (m, d), hold NaN,
    infinity or a row of zeros, if m identities do not fit in v^l codes, for a checkpoint of another run, or a device
    that is not there or too small.
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
    place = working_device(table, device)
    m, content = len(table), None if checkpoint is None else digest_rows(table)
    table = table.detach().to(place)
    _check_directions(table)

    settings = {
        "m": m,
        "d": table.shape[1],
        "dtype": str(table.dtype),
        "vectors": content,
        "vocab_size": vocab_size,
        "length": length,
        "iterations": iterations,
        "capacity_factor": capacity_factor,
        "alignment": alignment,
        "seed": seed,
    }
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
        directions=torch.stack(codebooks).half().cpu() if alignment == "residual" else None,
        identities=vectors.identities if isinstance(vectors, CodeVectors) else None,
    )
    if not keep_checkpoint:
        work.remove()
    return codes


def working_device(table: Tensor, device: str | torch.device | None) -> torch.device:
    """Where `tokenize` computes with ``table`` (m, d), given its argument ``device``; raises as it does."""
    if device is None:
        return table.device
    if device == "auto":
        fits = torch.cuda.is_available() and not _lacking(table, torch.device("cuda"))
        return torch.device("cuda" if fits else "cpu")
    check_device(str(device))
    chosen = torch.device(device)
    if chosen.type == "cuda" and (lacking := _lacking(table, chosen)):
        raise InputError(f"{tuple(table.shape)} vectors of {table.dtype} {lacking} on {chosen}; take cpu, or float16")
    return chosen


def _lacking(table: Tensor, device: torch.device) -> str:
    """What the work of `tokenize` would need of a GPU's memory and how much is free, where that is less; else empty."""
    needed = len(table) * BYTES_A_ROW + BLOCKS_HELD * block_floats(device) * torch.float32.itemsize
    if table.device.type != device.type:
        needed += table.nbytes
    free = torch.cuda.mem_get_info(device)[0]
    return f"need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free" if needed > free else ""


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
    norms = (torch.linalg.vector_norm(rows.float(), dim=1) for rows in table.split(_ROWS_A_BLOCK))
    if not bool(torch.stack([(norm.isfinite() & (norm > 0)).all() for norm in norms]).all()):  # one look at a device
        raise InputError("vectors hold NaN, infinity or a row of zeros; check the encoder and the images it was given")
