"""Codes for identities that come later: the free leaf nearest down the tree, nothing else moved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gif.codes.blocks import block_floats
from gif.codes.moves import rank_in_group
from gif.codes.splitmix import node_seeds, uniforms
from gif.errors import InputError
from gif_kernels import checks
from gif_kernels.sphere import unit

NEW_CHILD = 4.0  # more than two cosines differ by: a child that exists comes before one that does not


def place_newcomers(
    keys: Tensor,
    vectors: Tensor,
    vocab_size: int,
    length: int,
    centroids: Sequence[Tensor],
    directions: Tensor | None,
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    """Codes (n, l) uint8 for ``vectors`` (n, d), and the centroids with a row for each node that came to be.

    ``keys`` (m,) are the codes in use as increasing numbers in base v. At least n codes must be free; see
    `IdentityCodes.extend`.
    """
    rows = _checked_rows(vectors, [*centroids, *([] if directions is None else [directions])]).to(keys.device)
    node = torch.zeros(len(rows), dtype=torch.int64, device=keys.device)  # a newcomer's prefix so far
    base = torch.zeros_like(rows)
    extended = []
    for depth in range(length):
        below = vocab_size ** (length - depth - 1)
        parents, place = node.unique(return_inverse=True)
        children = parents[:, None] * vocab_size + torch.arange(vocab_size, device=keys.device)
        room = below - _count(keys, children, below)
        known = centroids[depth].to(keys.device) if depth < len(centroids) else None
        prefixes = (keys // below).unique_consecutive() if known is not None else keys[:0]
        scores = (
            uniforms(node_seeds(seed, depth, np.arange(len(rows))), vocab_size).to(rows)
            if directions is None
            else unit(rows - base) @ directions[depth].to(rows).mT
        )
        _prefer_known(scores, rows, children, place, prefixes, known)
        node = children[place, _allocate(scores, place, room)]
        if known is not None:
            merged_prefixes, merged = _with_new_nodes(prefixes, known, node, rows)
            extended.append(merged)
            base = merged[torch.searchsorted(merged_prefixes, node)].to(rows)
    places = vocab_size ** torch.arange(length - 1, -1, -1, device=keys.device)
    return (node[:, None] // places % vocab_size).to(torch.uint8), extended


def _checked_rows(vectors: Tensor, others: Sequence[Tensor]) -> Tensor:
    """``vectors`` as unit rows in float32."""
    width = others[0].shape[-1] if others else "d"
    checks.floating("vectors", vectors, ("n", width))
    rows = unit(vectors.detach().float())
    if not bool(rows.any(1).all()):
        raise InputError("vectors hold a row of zeros, which has no direction; drop that identity or its images")
    return rows


def _count(keys: Tensor, nodes: Tensor, below: int) -> Tensor:
    """Identities under each of ``nodes``, prefixes that leave ``below`` codes each."""
    return torch.searchsorted(keys, (nodes + 1) * below) - torch.searchsorted(keys, nodes * below)


def _prefer_known(
    scores: Tensor, rows: Tensor, children: Tensor, place: Tensor, prefixes: Tensor, known: Tensor | None
) -> None:
    """Replace the score (n, v) of each child that has a centroid: its cosine, above every child that has none."""
    if known is None:
        return
    where = torch.searchsorted(prefixes, children).clamp_max(len(prefixes) - 1)
    exists = prefixes[where] == children  # (parents, v)
    step = max(1, block_floats() // known.shape[1] // children.shape[1])
    for newcomers in torch.arange(len(rows), device=rows.device).split(step):
        parent = place[newcomers]
        cosine = (known[where[parent]].float() @ rows[newcomers, :, None])[:, :, 0]
        scores[newcomers] = torch.where(exists[parent], cosine + NEW_CHILD, scores[newcomers])


def _allocate(scores: Tensor, node: Tensor, room: Tensor) -> Tensor:
    """A child (n,) each, of highest ``scores`` (n, v) among those of ``node`` (n,) with ``room`` (nodes, v).

    Where more come than there is room the highest scores, then the lower rows, stay, and the others go on: v rounds or
    fewer.
    """
    child = torch.empty_like(node)
    room, v = room.clone(), scores.shape[1]
    waiting = torch.arange(len(scores), device=scores.device)
    while len(waiting):
        at = node[waiting]
        best, choice = scores[waiting].masked_fill(room[at] <= 0, -torch.inf).max(1)
        stays = rank_in_group(at * v + choice, -best) < room[at, choice]
        child[waiting[stays]] = choice[stays]
        room.view(-1).scatter_add_(0, (at * v + choice)[stays], -torch.ones_like(choice[stays]))
        waiting = waiting[~stays]
    return child


def _with_new_nodes(prefixes: Tensor, known: Tensor, node: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``prefixes`` and centroids, with those of each ``node`` (n,) that is new: the mean direction of its ``rows``."""
    is_new = prefixes[torch.searchsorted(prefixes, node).clamp_max(len(prefixes) - 1)] != node
    new, member = node[is_new].sort(stable=True)
    if not len(new):
        return prefixes, known
    new, sizes = new.unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(rows[is_new][member], "sum", lengths=sizes, axis=0)
    merged, order = torch.cat([prefixes, new]).sort()
    return merged, torch.cat([known, unit(sums).to(known.dtype)])[order]
