"""From code vectors to identity codes: balanced hierarchical k-means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gif.codes.blocks import block_floats
from gif.codes.config import TokenizeConfig
from gif.codes.identity_codes import IdentityCodes
from gif.codes.tree import Cutting, root
from gif.distributed import check_device
from gif.errors import InputError
from gif.progress import progress
from gif.resume import UnfinishedWork
from gif.vectors.store import ROWS_A_BLOCK, CodeVectors, digest_rows
from gif_kernels import checks

CHECKPOINT_FORMAT = "gif.tokenize_checkpoint/1"
BYTES_A_ROW = 60  # held beside the vectors: order, codes, paths and candidates for a move
BLOCKS_HELD = 10  # of float32: gathered rows, similarities, membership, and temporaries of them


def tokenize(
    vectors: CodeVectors | Tensor,
    config: TokenizeConfig = TokenizeConfig(),  # noqa: B008 (frozen)
    *,
    checkpoint: str | Path | None = None,
    keep_checkpoint: bool = False,
    device: str | torch.device | None = None,
) -> IdentityCodes:
    """Give each identity a distinct code, its path in a tree of k-means clusters: similar identities share a prefix.

    Recursive spherical k-means with k = v (the paper's codes) within capacities: a node at depth j holds at most
    v^(l-j) identities, so that codes are distinct whatever the vectors, and at most ceil(capacity_factor n / v) of the
    n its parent holds. With a capacity_factor of infinity only v^(l-j) binds.

    The vectors may be memory-mapped: they are read in blocks, and what is held besides is some 30 bytes an identity at
    most, and the centroids that are kept: 2 d bytes a node.

    Args:
        vectors: CodeVectors, or a (m, d) tensor; only directions matter. Any float dtype; products are in float32. The
            codes belong to the identities that CodeVectors do.
        config: the codes' shape, and how they are cut; the same seed gives the same codes.
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
    length = config.length_for(len(table))
    centroid_levels = config.centroid_levels_for(length)
    place = working_device(table, device)
    m, content = len(table), None if checkpoint is None else digest_rows(table)
    table = table.detach().to(place)
    _check_directions(table)

    settings = {
        "m": m,
        "d": table.shape[1],
        "dtype": str(table.dtype),
        "vectors": content,
        **replace(config, length=length).settings(),
    }
    work = UnfinishedWork(checkpoint, CHECKPOINT_FORMAT, settings)
    columns: list[Tensor] = []
    codebooks: list[Tensor] = []
    if (saved := work.load()) is not None:
        columns = [saved[f"tokens.{j}"].to(table.device) for j in range(len(saved) // 2)]
        codebooks = [saved[f"codebook.{j}"].to(table.device) for j in range(len(saved) // 2)]
    level = root(table, config.vocab_size, config.seed)
    with progress("tokenize", m * length, "tokens") as advance:
        advance(m * len(columns))
        for depth in range(length):
            if depth == len(columns):
                cutting = Cutting(config.vocab_size ** (length - depth - 1), config.capacity_factor, config.iterations)
                tokens, codebook = level.tokens(cutting, config.alignment, advance)
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
        config.vocab_size,
        centroids=level.centroids(centroid_levels) if centroid_levels else None,
        directions=torch.stack(codebooks).half().cpu() if config.alignment == "residual" else None,
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


def _check_directions(table: Tensor) -> None:
    norms = (torch.linalg.vector_norm(rows.float(), dim=1) for rows in table.split(ROWS_A_BLOCK))
    if not bool(torch.stack([(norm.isfinite() & (norm > 0)).all() for norm in norms]).all()):  # one look at a device
        raise InputError("vectors hold NaN, infinity or a row of zeros; check the encoder and the images it was given")
