"""From code vectors to identity codes: balanced hierarchical k-means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gif.codes.blocks import block_floats
from gif.codes.code_table import CodeTable
from gif.codes.config import TokenizeConfig
from gif.codes.identity_codes import IdentityCodes
from gif.codes.tree import Cutting, Level, root
from gif.devices import check_device
from gif.distributed import first_decides, least_of_processes, rank, wait_for_all, world_size
from gif.errors import InputError
from gif.files import Blocks
from gif.progress import progress, say_resumed
from gif.resume import UnfinishedWork
from gif.vectors.store import ROWS_A_BLOCK, CodeVectors, digest_rows
from gif_kernels import checks

CHECKPOINT_FORMAT = "gif.tokenize_checkpoint/1"
BYTES_A_ROW = 24  # held beside the vectors and blocks, at most (see `gif.codes.tree`)
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

    The vectors may be memory-mapped: they are read in blocks, and what is held besides is 24 bytes an identity at most,
    blocks, and the centroids that are kept: 2 d bytes a node.

    In a process group every process calls this with the same vectors, best memory-mapped from one file: each cuts its
    share of the nodes, and of the root its share of the rows, and reads what it cuts from its file. All get the same
    codes, to the bit those of one process that computes with as many threads. The centroids are made on each of them.

    Args:
        vectors: CodeVectors, or a (m, d) tensor; only directions matter. Any float dtype; products are in float32. The
            codes belong to the identities that CodeVectors do.
        config: the codes' shape, and how they are cut; the same seed gives the same codes.
        checkpoint: file that holds the finished levels; a later call with the same arguments continues from it to the
            same codes, and removes it when done. Several processes keep one, on as many as will; the first writes it.
        keep_checkpoint: leave the checkpoint, of all levels: for whoever saves the codes before removing it.
        device: where to compute: "cpu", "cuda", or "auto" for a GPU that has room for the vectors and else the CPU. By
            default where the vectors are. One process copies the vectors there; several leave them where they are, and
            copy what they cut. The tree is the same on every device, but for identities to which two
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
    table = table.detach() if world_size() > 1 else table.detach().to(place)
    _check_directions(table)

    settings = {
        "m": m,
        "d": table.shape[1],
        "dtype": str(table.dtype),
        "vectors": content,
        **replace(config, length=length).settings(),
    }
    work = UnfinishedWork(checkpoint, CHECKPOINT_FORMAT, settings)
    saved = work.load() or {}
    wait_for_all()  # before it is written or removed
    done = len(saved) // 2
    codebooks = [saved[_codebook(depth)].to(place) for depth in range(done)]
    centroids: list[Tensor] | None = None
    level = root(table, config.vocab_size, length, config.seed, device=place)
    say_resumed("tokenize", done, length, "level")
    with progress("tokenize", m * length, "tokens", done=m * done) as advance:
        for depth in range(length):
            if depth < done:
                tokens = saved.pop(_tokens(depth)).to(place)
            else:
                cutting = Cutting(config.vocab_size ** (length - depth - 1), config.capacity_factor, config.iterations)
                tokens, codebook = level.tokens(cutting, config.alignment, advance)
                codebooks.append(codebook)
                _save(work, level, tokens, codebooks)
            if depth == length - 1 and centroid_levels:
                centroids = level.centroids(centroid_levels)
            level = level.descend(tokens)
    codes = IdentityCodes(
        CodeTable.ordered(level.numbers.cpu(), level.order.cpu(), config.vocab_size, length),
        config.vocab_size,
        centroids=centroids,
        directions=torch.stack(codebooks).half().cpu() if config.alignment == "residual" else None,
        identities=vectors.identities if isinstance(vectors, CodeVectors) else None,
    )
    if not keep_checkpoint and rank() == 0:
        work.remove()
    return codes


def _save(work: UnfinishedWork, level: Level, tokens: Tensor, codebooks: list[Tensor]) -> None:
    """Keep the tokens of ``level`` and of those above it, a column each, and the codebooks."""

    def column(depth: int) -> Iterator[Tensor]:
        below = level.vocab_size ** (level.depth - 1 - depth)
        return ((block // below % level.vocab_size).to(torch.uint8) for block in level.numbers.split(ROWS_A_BLOCK))

    columns = {_tokens(depth): Blocks((len(tokens),), torch.uint8, column(depth)) for depth in range(level.depth)}
    books = {_codebook(depth): rows for depth, rows in enumerate(codebooks)}
    first_decides(lambda: work.save({**columns, _tokens(level.depth): tokens, **books}))


def _tokens(depth: int) -> str:
    return f"tokens.{depth}"


def _codebook(depth: int) -> str:
    return f"codebook.{depth}"


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
    """What the work of `tokenize` would need of a GPU's memory and how much is free, where that is less; else empty.

    Of several processes none copies the vectors.
    """
    needed = len(table) * BYTES_A_ROW + BLOCKS_HELD * block_floats(device) * torch.float32.itemsize
    if table.device.type != device.type and world_size() == 1:
        needed += table.nbytes
    free = torch.cuda.mem_get_info(device)[0]
    return f"need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free" if needed > free else ""


def _check_directions(table: Tensor) -> None:
    begin, end = (len(table) * share // world_size() for share in (rank(), rank() + 1))
    norms = (torch.linalg.vector_norm(rows.float(), dim=1) for rows in table[begin:end].split(ROWS_A_BLOCK))
    good = torch.stack([(norm.isfinite() & (norm > 0)).all() for norm in norms]).all()  # one look at a device
    if not least_of_processes(int(good)):
        raise InputError("vectors hold NaN, infinity or a row of zeros; check the encoder and the images it was given")
